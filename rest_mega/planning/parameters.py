"""How many parameters each pipeline stage's ranks hold, from the table of names and shapes."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from rest_mega.config import ParallelConfig
from rest_mega.sync.names import Row, hf_names, hf_shape, rows
from rest_mega.trainer.model import Architecture


@dataclass(frozen=True)
class Held:
    """Parameters on one rank."""

    dense: int
    """Summed over all data-parallel ranks."""
    expert: int
    """Summed over the ranks that hold the same experts."""
    matrices: int
    """Those among both that are hidden matrices: what Muon turns."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert


def stage_layers(a: Architecture, parallel: ParallelConfig, stage: int) -> list[int]:
    """Layers of pipeline rank `stage`; chunk v of rank p holds block v * PP + p."""
    each = a.layers // (parallel.pipeline * parallel.virtual_pipeline)
    blocks = (v * parallel.pipeline + stage for v in range(parallel.virtual_pipeline))
    return [block * each + i for block in blocks for i in range(each)]


@functools.lru_cache(maxsize=4096)  # layouts are tried by thousands
def stage_parameters(a: Architecture, parallel: ParallelConfig, stage: int) -> Held:
    """What a rank of pipeline rank `stage` holds: the same on all of its tensor ranks.

    A tied head on another stage than the embedding is a second copy, as in Megatron.
    """
    tp, last = parallel.tensor, stage == parallel.pipeline - 1
    shapes = {mixture: _layer(a, mixture, tp) for mixture in (False, True)}
    dense = expert = matrices = 0
    for layer in stage_layers(a, parallel, stage):
        for spread, count, is_matrix in shapes[a.is_mixture(layer)]:
            share = count // parallel.expert if spread else count
            dense, expert = dense + share * (not spread), expert + share * spread
            matrices += share * is_matrix
    table = a.padded_vocab(tp) // tp * a.hidden
    dense += table * (stage == 0)
    dense += table * (last and not (a.tied and stage == 0))
    dense += a.hidden * last
    return Held(dense, expert, matrices)


def model_parameters(a: Architecture) -> int:
    """All parameters of the Hugging Face model, unpadded, a tied head once."""
    whole = ParallelConfig()
    padding = (a.padded_vocab(1) - a.vocab_size) * a.hidden
    return stage_parameters(a, whole, 0).total - padding * (1 if a.tied else 2)


@functools.lru_cache(maxsize=4096)
def active_parameters(a: Architecture) -> int:
    """Weights that a token meets in matrix products, the head's among them."""
    count = a.vocab_size * a.hidden
    for layer in range(a.layers):
        count += active_in_layer(a, layer)
    return count


@functools.lru_cache(maxsize=4096)
def active_in_layer(a: Architecture, layer: int) -> int:
    """Weights of `layer` that a token meets in matrix products."""
    share = 1.0 if a.experts is None else a.experts.per_token / a.experts.count
    return sum(
        round(count * share) if spread else count
        for spread, count, is_matrix in _layer(a, a.is_mixture(layer), 1)
        if is_matrix
    )


@functools.lru_cache(maxsize=4096)
def _layer(a: Architecture, mixture: bool, tp: int) -> list[tuple[bool, int, bool]]:
    """(spread over experts, elements on a tensor rank, is a matrix) of each parameter of such a
    layer, all experts together."""
    number = next((i for i in range(a.layers) if a.is_mixture(i) is mixture), None)
    if number is None:
        return []
    present, found, seen = set(hf_names(a)), [], set()
    for row in rows(a):
        if "{i}" not in row.mcore or row.layers == ("dense" if mixture else "mixture"):
            continue
        names = [re.sub(r"\{e\}", "0", hf.replace("{i}", str(number))) for hf in row.hf]
        if names[0] not in present or names[0] in seen:
            continue  # a norm has one row for each kind of layer, local and fused
        seen.add(names[0])
        shapes = [hf_shape(name, a) for name in names]
        found.append(_held(row, shapes, a, tp))
    return found


def _held(
    row: Row, shapes: list[tuple[int, ...]], a: Architecture, tp: int
) -> tuple[bool, int, bool]:
    spread = "{e}" in row.mcore
    count = sum(math.prod(shape) for shape in shapes)
    if spread:
        assert a.experts is not None
        count *= a.experts.count
    elif row.layout != "whole":
        count //= tp
    return spread, count, len(shapes[0]) > 1
