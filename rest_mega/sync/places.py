"""Where mcore's distributed checkpoints keep each parameter: keys, shapes and offsets, asked of
mcore itself.

A GPTModel without memory (meta device) at TP 1, PP 1 tells through its `sharded_state_dict` how it
would be saved: most keys stack a parameter of all layers (and experts) on leading axes. Every
layout loads from these keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rest_mega.config import ModelConfig
from rest_mega.sync.names import Piece, hf_shape, named_parameters, pieces
from rest_mega.trainer.model import Architecture, build
from rest_mega.trainer.parallel import Parallel


@dataclass(frozen=True)
class Place:
    """One whole parameter in a checkpoint: `key[prefix]`."""

    name: str
    key: str
    prefix: tuple[int, ...]
    """Index on the leading axes: the layer, then the expert."""
    stack: tuple[int, ...]
    """Sizes of the leading axes."""
    shape: tuple[int, ...]
    """The parameter's own, vocabulary padding included."""
    pieces: tuple[Piece, ...]
    """What it is made of, along axis 0; rows beyond are vocabulary padding."""
    padded: bool
    """Whether its number of rows may differ: mcore pads the vocabulary by layout."""


@dataclass(frozen=True)
class Places:
    """All that a checkpoint of one architecture must hold."""

    parameters: tuple[Place, ...]
    objects: tuple[tuple[str, Any], ...]
    """What mcore stores beside tensors: (key, value)."""


def find_places(architecture: Architecture, parallel: Parallel) -> Places:
    """Ask mcore; `parallel` is that of a single process."""
    assert parallel.config.replica_size == 1, parallel.config
    config = ModelConfig(layers="local")
    with torch.device("meta"):
        meta = dataclasses.replace(parallel, device=torch.device("meta"))
        (chunk,) = build(architecture, config, meta)
    state = _flat(chunk.sharded_state_dict())
    numbered = zip(chunk.named_parameters(), named_parameters([chunk]), strict=True)
    return Places(
        tuple(_place(name, state[local], p, architecture) for (local, p), (name, _) in numbered),
        tuple((item.unique_key, item.data) for item in _objects(state)),
    )


def _flat(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Name -> its sharded tensors (gate and up are two) or objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    flat: dict[str, list[Any]] = {}
    for name, item in state.items():
        built = item.build() if isinstance(item, ShardedTensorFactory) else item
        values = built.values() if isinstance(built, dict) else built
        flat[name] = list(values) if isinstance(built, (dict, list)) else [built]
    return flat


def _objects(state: dict[str, list[Any]]) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    for items in state.values():
        yield from (item for item in items if isinstance(item, ShardedObject))


def _place(name: str, parts: list[Any], parameter: Any, architecture: Architecture) -> Place:
    first, shape = parts[0], tuple(parameter.shape)
    depth = len(first.global_shape) - len(shape)
    assert tuple(first.global_shape[depth:]) == shape, (name, first)
    return Place(
        name=name,
        key=first.key,
        prefix=tuple(first.global_offset[:depth]),
        stack=tuple(first.global_shape[:depth]),
        shape=shape,
        pieces=tuple(_by_rows(p, architecture) for p in pieces(name, architecture, 0, 1)),
        padded=first.allow_shape_mismatch,
    )


def _by_rows(piece: Piece, architecture: Architecture) -> Piece:
    """At TP 1 a piece along axis 1 has all columns, so all rows."""
    if piece.axis == 0:
        return piece
    rows, columns = hf_shape(piece.hf_name, architecture)
    assert (piece.start, piece.stop) == (0, columns), piece
    return Piece(piece.hf_name, 0, 0, rows)
