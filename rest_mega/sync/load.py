"""Hugging Face safetensors, a converted checkpoint or a seed -> this rank's parameters, reading
only this rank's ranges."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch

from rest_mega.config import ConfigError
from rest_mega.sync import manifest
from rest_mega.sync.byte_ranges import Buffer, blocks
from rest_mega.sync.names import Piece, cut, hf_names, hf_shape, named_parameters, pieces
from rest_mega.sync.safetensors_files import SafetensorsRows
from rest_mega.sync.torch_dist import is_torch_dist
from rest_mega.trainer.checkpoint import refusing
from rest_mega.trainer.checkpoint_pickles import refuse_foreign
from rest_mega.trainer.model import Architecture
from rest_mega.trainer.parallel import Parallel


class Pieces(Protocol):
    """Where slices of Hugging Face tensors come from."""

    def read(self, piece: Piece) -> torch.Tensor:
        """The slice `piece` of its tensor."""


class SafetensorsSource:
    """A checkpoint folder: model.safetensors, or shards named by model.safetensors.index.json."""

    def __init__(self, path: str, architecture: Architecture) -> None:
        """Reads the headers and checks every name and shape; ConfigError names what is missing or
        misshapen."""
        self._architecture, self._buffer = architecture, Buffer()
        self._rows = open_rows(Path(path), architecture)

    def read(self, piece: Piece) -> torch.Tensor:
        """Only the bytes of the slice are read when it runs along axis 0, else whole rows block by
        block."""
        name, dtype = piece.hf_name, self._rows.dtype(piece.hf_name)
        rows, *columns = hf_shape(name, self._architecture)
        length = piece.stop - piece.start
        if piece.axis == 0:
            out = torch.empty((length, *columns), dtype=dtype)
            self._rows.read(name, piece.start, out)
            return out
        out = torch.empty((rows, length), dtype=dtype)
        for start, stop in blocks((rows, *columns), dtype):
            block = self._buffer.take((stop - start, *columns), dtype)
            self._rows.read(name, start, block)
            out[start:stop] = block[:, piece.start : piece.stop]
        return out


def open_rows(folder: Path, architecture: Architecture) -> SafetensorsRows:
    """The folder's tensors, after a check of every name and shape; ConfigError names what is
    missing, unexpected or misshapen."""
    rows = SafetensorsRows(folder)
    found = rows.names()
    expected = {name: hf_shape(name, architecture) for name in hf_names(architecture)}
    missing = [name for name in expected if name not in found]
    ignorable = {"lm_head.weight"} if architecture.tied else set()
    unknown = [name for name in found if name not in expected and name not in ignorable]
    unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
    if missing or unknown:
        raise ConfigError(
            f"{folder} does not hold the tensors that its config.json promises: missing "
            f"{missing[:5]} ({len(missing)} in all), unexpected {unknown[:5]} ({len(unknown)} in "
            "all); check that the weights and config.json belong together"
        )
    for name, shape in expected.items():
        extent = rows.extent(name)
        if extent.shape != shape:
            raise ConfigError(
                f"{extent.file}: {name} has shape {extent.shape}, config.json asks for {shape}"
            )
    return rows


class TorchDistSource:
    """A Megatron distributed checkpoint, which mcore itself reads at any layout."""

    def __init__(self, path: str) -> None:
        """ConfigError when a pickle of the checkpoint is damaged or forged."""
        refuse_foreign(Path(path))
        self._path = path

    def load(self, chunks: list[Any]) -> None:
        """Set every parameter of this rank's chunks; collective over all ranks. ConfigError when
        files do not hold what the model needs."""
        from megatron.core import dist_checkpointing

        models = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        with refusing(
            f"{self._path} does not load",
            "check that it belongs to the model's config.json, or convert it anew",
        ):
            loaded = dist_checkpointing.load(models, self._path)
            for index, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"model{index}"])


class RandomSource:
    """Fresh weights: normal with std 0.02 (projections into the residual stream scaled by
    1/sqrt(2L)), norms one, biases zero. A tensor depends on the seed and its name alone, so every
    layout draws the same
    model."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self._architecture, self._seed = architecture, seed

    def read(self, piece: Piece) -> torch.Tensor:
        """The slice of the tensor drawn for `piece.hf_name`."""
        name, a = piece.hf_name, self._architecture
        shape = hf_shape(name, a)
        if name.endswith("norm.weight"):
            return torch.ones(shape).narrow(piece.axis, piece.start, piece.stop - piece.start)
        if name.endswith(".bias"):
            return torch.zeros(shape).narrow(piece.axis, piece.start, piece.stop - piece.start)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        residual = name.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight"))
        std = 0.02 / (2 * a.layers) ** 0.5 if residual else 0.02
        full = torch.empty(shape).normal_(std=std, generator=generator)
        return full.narrow(piece.axis, piece.start, piece.stop - piece.start)


Source = Pieces | TorchDistSource


def open_source(path: str, init: str, architecture: Architecture, seed: int) -> Source:
    """The source that ModelConfig names: `load` reads Hugging Face files or a converted checkpoint
    whose manifest fits, `random` draws."""
    if init != "load":
        return RandomSource(architecture, seed)
    manifest.check(Path(path), architecture)
    return (
        TorchDistSource(path)
        if is_torch_dist(Path(path))
        else SafetensorsSource(path, architecture)
    )


@torch.no_grad()
def load(
    chunks: list[Any],
    source: Source,
    architecture: Architecture,
    parallel: Parallel,
) -> None:
    """Set every parameter of this rank's chunks from `source`; vocabulary padding becomes zero.
    Collective over all ranks."""
    if isinstance(source, TorchDistSource):
        source.load(chunks)
        return
    for name, parameter in named_parameters(chunks):
        offset = 0
        parts = pieces(name, architecture, *cut(name, parallel))
        for piece in parts:
            length = piece.stop - piece.start
            parameter.narrow(piece.axis, offset, length).copy_(source.read(piece))
            offset += length
        parameter.narrow(parts[0].axis, offset, parameter.shape[parts[0].axis] - offset).zero_()
