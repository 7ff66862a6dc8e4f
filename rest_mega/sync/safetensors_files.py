"""Safetensors files: their headers, ranges of their tensors, and files written header first.

Format: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, data_offsets),
the tensors' bytes without gaps (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rest_mega.config import ConfigError
from rest_mega.sync.byte_ranges import Extent, Files, reserve

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
"""The format's own limit."""

SHARD_BYTES = 5 * 2**30
"""Tensors of one file at most, unless one tensor alone is larger."""


class SafetensorsRows:
    """The tensors of a checkpoint folder: model.safetensors, or shards named by
    model.safetensors.index.json."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers; ConfigError for a file that is missing, truncated or none."""
        self._files = Files()
        self._extents: dict[str, Extent] = {}
        for file in shards(folder):
            for name, extent in read_header(file).items():
                if name in self._extents:
                    raise ConfigError(
                        f"{name} stands in {self._extents[name].file} and in {file}; remove one"
                    )
                self._extents[name] = extent
            self._files.open(file)

    def names(self) -> list[str]:
        """In the files' order."""
        return list(self._extents)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._extents[name].dtype

    def extent(self, name: str) -> Extent:
        """File, place, shape and dtype."""
        return self._extents[name]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the rows from `start` on."""
        extent = self._extents[name]
        row = math.prod(extent.shape[1:]) * extent.dtype.itemsize
        self._files.read(extent.file, extent.offset + start * row, out)


def shards(folder: Path) -> list[Path]:
    """The checkpoint's files; ConfigError when there are none."""
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
        return sorted({folder / name for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is no safetensors index ({error}); fetch it anew") from error


def read_header(file: Path) -> dict[str, Extent]:
    """Every tensor's place; ConfigError unless the header is whole and the file exactly as long as
    it says."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        extents = {name: _extent(file, 8 + length, entry) for name, entry in header.items()}
        _check_gapless(list(extents.values()), 8 + length, file.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is missing, truncated or no safetensors file ({error}); fetch it anew"
        ) from error
    return extents


def _extent(file: Path, data: int, entry: Mapping[str, Any]) -> Extent:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']}, known: {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    extent = Extent(file, data + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if begin < 0 or min(extent.shape, default=0) < 0 or extent.nbytes != end - begin:
        raise ValueError(f"{end - begin} bytes for shape {extent.shape}")
    return extent


def _check_gapless(extents: list[Extent], begin: int, size: int) -> None:
    for extent in sorted(extents, key=lambda e: (e.offset, e.nbytes)):
        if extent.offset != begin:
            raise ValueError(f"a gap or overlap at byte {begin}")
        begin += extent.nbytes
    if begin != size:
        raise ValueError(f"{size} bytes instead of {begin}")


# ------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """File name -> its tensors in the order of writing: wider dtypes first, as the format's own
    writer does, so that all are aligned."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > limit:
            groups.append([])
        groups[-1].append(entry)
    return {
        shard_name(number, len(groups)): sorted(group, key=lambda e: -e.dtype.itemsize)
        for number, group in enumerate(groups, start=1)
    }


def shard_name(number: int, count: int) -> str:
    """transformers' name of one of `count` files."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total: int) -> None:
    """model.safetensors.index.json of several files, given by the tensors in them; nothing for
    one."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def lay_out(file: Path, entries: Sequence[Entry]) -> dict[str, Extent]:
    """Write the header of a new file and give it its length; where each tensor's bytes belong.
    OSError when there is no room for them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        reserve(stream, 8 + len(text) + end)
    return read_header(file)
