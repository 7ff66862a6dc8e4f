"""Whole Hugging Face tensors on their way to SGLang: checked, in buckets, kept on disk.

A bucket is a list of (name, tensor). Names and shapes are checked here because the server ignores
unknown names and dies of wrong shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

Bucket = list[tuple[str, torch.Tensor]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def expected_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Every parameter that a checkpoint of `path`'s config.json holds, and its shape; no memory is
    taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rest_mega.rollout.embedded_engine import named_as_files

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in named_as_files(model).items()}


def checked(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream in the server's dtype on the CPU; ValueError at an unknown, repeated or misshapen
    tensor, before it is handed on, and at the end for missing ones."""
    left = dict(shapes)
    for name, tensor in tensors:
        want = left.pop(name, None)
        if want != tuple(tensor.shape):
            why = "sent twice" if want is None and name in shapes else f"{want} by its config.json"
            raise ValueError(f"the server's {name!r} is {why}, not {tuple(tensor.shape)}")
        yield name, tensor.detach().to("cpu", dtype).contiguous()
    if left:
        raise ValueError(
            f"{len(left)} parameters were not sent to the server, for example {sorted(left)[:3]}"
        )


def buckets(stream: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """Lists of tensors of at most `limit` bytes, unless one tensor alone is larger."""
    held: Bucket = []
    size = 0
    for name, tensor in stream:
        if held and size + tensor.nbytes > limit:
            yield held
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield held


class Kept:
    """The newest weights as a checkpoint folder: for servers that load from disk, and for a server
    that has to be started again while the trainer's ranks are busy elsewhere."""

    def __init__(self, folder: Path, model_path: str) -> None:
        self._root, self._model = folder, Path(model_path)
        self.folder: Path | None = None
        """A complete checkpoint, None before the first."""
        self._open: Path | None = None
        self._files: dict[str, str] = {}

    def begin(self, version: int) -> None:
        """A new folder; the last one stays until this one is complete. What a killed run has left
        behind goes first."""
        if self.folder is None:
            shutil.rmtree(self._root, ignore_errors=True)
        self._open = self._root / f"version_{version}"
        shutil.rmtree(self._open, ignore_errors=True)
        self._open.mkdir(parents=True)
        shutil.copyfile(self._model / "config.json", self._open / "config.json")
        self._files = {}

    def add(self, bucket: Bucket) -> None:
        """One file of the checkpoint."""
        from safetensors.torch import save_file

        assert self._open is not None
        name = f"model-{len(set(self._files.values())):05d}.safetensors"
        save_file(dict(bucket), str(self._open / name), metadata={"format": "pt"})
        self._files |= dict.fromkeys([tensor for tensor, _ in bucket], name)

    def end(self) -> None:
        """The folder is complete; older ones go."""
        assert self._open is not None
        index = json.dumps({"metadata": {}, "weight_map": self._files})
        (self._open / "model.safetensors.index.json").write_text(index)
        if self.folder is not None and self.folder != self._open:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = self._open

    def read(self) -> Iterator[Bucket]:
        """The buckets as they were added."""
        from safetensors.torch import load_file

        assert self.folder is not None
        for file in sorted(self.folder.glob("*.safetensors")):
            yield list(load_file(str(file)).items())

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._root, ignore_errors=True)
