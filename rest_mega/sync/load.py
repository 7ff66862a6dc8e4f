"""Hugging Face safetensors (or a seed) -> this rank's parameters, reading only this rank's
ranges."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from rest_mega.config import ConfigError
from rest_mega.sync.names import Piece, hf_names, hf_shape, named_parameters, pieces
from rest_mega.trainer.model import Architecture
from rest_mega.trainer.parallel import Parallel


class Source(Protocol):
    """Where Hugging Face tensors come from."""

    def read(self, piece: Piece) -> torch.Tensor:
        """The slice `piece` of its tensor."""


class SafetensorsSource:
    """A checkpoint folder: model.safetensors, or shards named by model.safetensors.index.json."""

    def __init__(self, path: str, architecture: Architecture) -> None:
        """Opens the headers and checks every name and shape; ConfigError names what is missing or
        misshapen."""
        self._files: dict[Path, Any] = {}
        self._where = {
            name: file
            for file in _shards(Path(path))
            for name in self._open(file).keys()  # noqa: SIM118  # a file handle, no dictionary
        }
        expected = {name: hf_shape(name, architecture) for name in hf_names(architecture)}
        missing = [name for name in expected if name not in self._where]
        ignorable = {"lm_head.weight"} if architecture.tied else set()
        unknown = [name for name in self._where if name not in expected and name not in ignorable]
        unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
        if missing or unknown:
            raise ConfigError(
                f"{path} does not hold the tensors that its config.json promises: missing "
                f"{missing[:5]} "
                f"({len(missing)} in all), unexpected {unknown[:5]} ({len(unknown)} in all); "
                "check that the weights and config.json belong together"
            )
        for name, shape in expected.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise ConfigError(
                    f"{self._where[name]}: {name} has shape {found}, config.json asks for {shape}"
                )

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            try:
                self._files[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{file} is missing, truncated or no safetensors file ({error}); fetch it anew"
                ) from error
        return self._files[file]

    def _slice(self, name: str) -> Any:
        return self._open(self._where[name]).get_slice(name)

    def read(self, piece: Piece) -> torch.Tensor:
        """Only the bytes of the slice are read when it runs along axis 0."""
        tensor = self._slice(piece.hf_name)
        return (
            tensor[piece.start : piece.stop]
            if piece.axis == 0
            else tensor[:, piece.start : piece.stop]
        )


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
            "name the folder of a Hugging Face checkpoint, or (for model.path) set "
            "model.init=random to draw the weights"
        )
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is no safetensors index ({error}); fetch it anew") from error
    return sorted({folder / name for name in names})


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
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / (2 * a.layers) ** 0.5 if residual else 0.02
        full = torch.empty(shape).normal_(std=std, generator=generator)
        return full.narrow(piece.axis, piece.start, piece.stop - piece.start)


def open_source(path: str, init: str, architecture: Architecture, seed: int) -> Source:
    """The source that ModelConfig names: `load` reads files, `random` draws."""
    return (
        SafetensorsSource(path, architecture)
        if init == "load"
        else RandomSource(architecture, seed)
    )


@torch.no_grad()
def load(chunks: list[Any], source: Source, architecture: Architecture, parallel: Parallel) -> None:
    """Set every parameter of this rank's chunks from `source`; vocabulary padding becomes zero."""
    for name, parameter in named_parameters(chunks):
        offset = 0
        parts = pieces(name, architecture, parallel.tensor_rank, parallel.config.tensor)
        for piece in parts:
            length = piece.stop - piece.start
            parameter.narrow(piece.axis, offset, length).copy_(source.read(piece))
            offset += length
        parameter.narrow(parts[0].axis, offset, parameter.shape[parts[0].axis] - offset).zero_()
