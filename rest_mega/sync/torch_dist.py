"""Megatron distributed checkpoints (`torch_dist`) as files: Hugging Face rows read from one, room
for parameters made in a new one.

No byte goes through mcore's or torch's loader: `.metadata` tells in which item of which file a
chunk lies, the item (an archive of torch.save) where its bytes are, and only those are read.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rest_mega.config import ConfigError
from rest_mega.sync.byte_ranges import Extent, Files, reserve
from rest_mega.sync.places import Place, Places
from rest_mega.trainer.checkpoint_pickles import read_metadata

NOT_PARAMETERS = ("optimizer.", "chained_", "rng_state", "rerun_state")
"""How the keys of a training checkpoint begin that hold no parameter."""
FILE_BYTES = 4 * 2**30
"""A new file is begun beyond this size."""
ITEM_BYTES = 32 * 2**20
"""Of a parameter in one item: a rank that loads a part of it reads no other items."""


def is_torch_dist(folder: Path) -> bool:
    """Whether `folder` is a Megatron distributed checkpoint."""
    return (folder / ".metadata").is_file()


@dataclass(frozen=True)
class Chunk:
    """A stored box of a key's tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int
    """Bytes of `file` that hold the item."""


class TorchDistRows:
    """The Hugging Face tensors in a checkpoint, at whatever layout it was saved."""

    def __init__(self, folder: Path, places: Places) -> None:
        """Reads `.metadata` and the items' headers; ConfigError names keys that are missing,
        unexpected or misshapen, and files that are damaged."""
        self._folder, self._files = folder, Files()
        metadata = read_metadata(folder)
        stored = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if hasattr(tensor, "chunks") and not key.startswith(NOT_PARAMETERS)
        }
        _check_keys(folder, stored, places)
        self._dtypes = {key: tensor.properties.dtype for key, tensor in stored.items()}
        self._chunks = _index(folder, stored, metadata.storage_data, places)
        chunks = {chunk for stored_in in self._chunks.values() for chunk in stored_in}
        self._extents = {chunk: _find_bytes(folder / chunk.file, chunk) for chunk in chunks}
        self._spans: dict[str, list[tuple[int, int, Place, int]]] = {}
        for place in places.parameters:
            row = 0
            for piece in place.pieces:
                span = (piece.start, piece.stop, place, row)
                self._spans.setdefault(piece.hf_name, []).append(span)
                row += piece.stop - piece.start

    def names(self) -> list[str]:
        """In the model's order."""
        return list(self._spans)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._dtypes[self._spans[name][0][2].key]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the rows of the Hugging Face tensor from `start` on."""
        stop = start + out.shape[0]
        for first, last, place, row in self._spans[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                self._read(place, row + low - first, out[low - start : high - start])

    def _read(self, place: Place, start: int, out: torch.Tensor) -> None:
        """Rows of one parameter, from all chunks that hold some of them."""
        filled, depth = 0, len(place.prefix)
        for chunk in self._chunks[place.key, place.prefix]:
            top, rows = chunk.offsets[depth], chunk.sizes[depth]
            low, high = max(start, top), min(start + out.shape[0], top + rows)
            if low < high:
                inner = math.prod(chunk.sizes[depth + 1 :])
                skip = _linear(place.prefix, chunk) * rows + low - top
                target = out[low - start : high - start]
                self._copy(chunk, skip * inner, target, depth)
                filled += (high - low) * inner
        if filled != out.numel():
            raise ConfigError(
                f"{self._folder} holds {filled} of {out.numel()} values of rows {start} to "
                f"{start + out.shape[0]} of {place.name}; fetch or convert the checkpoint anew"
            )

    def _copy(self, chunk: Chunk, skip: int, out: torch.Tensor, depth: int) -> None:
        extent = self._extents[chunk]
        offset = extent.offset + skip * extent.dtype.itemsize
        if out.dim() < 2 or chunk.sizes[-1] == out.shape[-1]:
            self._files.read(extent.file, offset, out)
            return
        part = torch.empty((out.shape[0], chunk.sizes[-1]), dtype=out.dtype)
        self._files.read(extent.file, offset, part)
        out[:, chunk.offsets[-1] : chunk.offsets[-1] + chunk.sizes[-1]] = part


def _linear(prefix: tuple[int, ...], chunk: Chunk) -> int:
    """Index of `prefix` among the parameters that lie stacked in the chunk."""
    index = 0
    for at, offset, size in zip(prefix, chunk.offsets, chunk.sizes, strict=False):
        index = index * size + at - offset
    return index


def _check_keys(folder: Path, stored: dict[str, Any], places: Places) -> None:
    expected = {place.key: place for place in places.parameters}
    missing = [key for key in expected if key not in stored]
    unknown = [key for key in stored if key not in expected]
    if missing or unknown:
        raise ConfigError(
            f"{folder} does not hold the parameters that its config.json promises: missing "
            f"{missing[:5]} ({len(missing)} in all), unexpected {unknown[:5]} ({len(unknown)} in "
            "all); check that the checkpoint and the Hugging Face folder belong together"
        )
    for key, place in expected.items():
        found, want = tuple(stored[key].size), place.stack + place.shape
        needed = place.pieces[-1].stop
        padded = place.padded and found[1:] == want[1:] and found[:1] >= (needed,)
        if found != want and not padded:
            raise ConfigError(f"{folder}: {key} has shape {found}, config.json asks for {want}")


def _index(
    folder: Path, stored: dict[str, Any], storage: dict[Any, Any], places: Places
) -> dict[tuple[str, tuple[int, ...]], list[Chunk]]:
    """(key, prefix) -> the chunks with some of that parameter."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    depths = {place.key: len(place.prefix) for place in places.parameters}
    index: dict[tuple[str, tuple[int, ...]], list[Chunk]] = collections.defaultdict(list)
    for key, tensor in stored.items():
        for box in tensor.chunks:
            item = storage.get(MetadataIndex(key, torch.Size(box.offsets)))
            chunk = _chunk(folder, key, box, item, tuple(tensor.size))
            leading = zip(chunk.offsets[: depths[key]], chunk.sizes, strict=False)
            for prefix in itertools.product(*(range(o, o + n) for o, n in leading)):
                index[key, prefix].append(chunk)
    return index


def _chunk(folder: Path, key: str, box: Any, item: Any, size: tuple[int, ...]) -> Chunk:
    offsets, sizes, name = tuple(box.offsets), tuple(box.sizes), getattr(item, "relative_path", "")
    inside = len(offsets) == len(sizes) == len(size) and all(
        o >= 0 and n > 0 and o + n <= whole
        for o, n, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside or not name or Path(name).name != name:
        raise ConfigError(
            f"{folder}/.metadata: the chunk {offsets} + {sizes} of {key} {size} has no place in a "
            "file of the folder; fetch or convert the checkpoint anew"
        )
    if getattr(item, "transform_descriptors", None):
        raise ConfigError(f"{folder}: {key} is stored compressed or encrypted; save it plainly")
    return Chunk(offsets, sizes, name, int(item.offset), int(item.length))


def _find_bytes(file: Path, chunk: Chunk) -> Extent:
    """Where the bytes of a chunk lie: torch.load without data tells (it gives storages their
    `_checkpoint_offset` under FakeTensorMode)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.checkpoint.utils import _create_file_view

    begin, length = chunk.begin, chunk.length
    try:
        with file.open("rb") as stream, FakeTensorMode():
            view: Any = _create_file_view(stream, begin, length)
            tensor = torch.load(view, weights_only=True)
        if tuple(tensor.shape) != chunk.sizes or not tensor.is_contiguous():
            raise ValueError(f"shape {tuple(tensor.shape)}, strides {tensor.stride()}")
        inner = tensor.untyped_storage()._checkpoint_offset
        inner += tensor.storage_offset() * tensor.dtype.itemsize
        extent = Extent(file, begin + inner, chunk.sizes, tensor.dtype)
        if inner + extent.nbytes > length:
            raise ValueError(f"{extent.nbytes} bytes do not fit")
    except Exception as error:  # a damaged archive raises almost anything
        raise ConfigError(
            f"{file}, bytes {begin} to {begin + length}, hold no chunk of shape {chunk.sizes} "
            f"({type(error).__name__}: {error}); fetch or convert the checkpoint anew"
        ) from error
    return extent


# ------------------------------------------------------------------ writing


class _Stream(io.BufferedWriter):
    """Remembers where torch.save, told to skip the data, left a hole for them."""

    hole = 0

    def seek(self, target: int, whence: int = 0) -> int:
        """As any stream's."""
        self.hole = self.tell()
        return super().seek(target, whence)


class TorchDistWriter:
    """Makes room for parameters, one after the other, and at the end writes what tells where they
    are. Rows that nobody writes are zeros."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._stream: _Stream | None = None
        self._tensors: dict[str, Any] = {}
        self._storage: dict[Any, Any] = {}

    def add(self, place: Place, start: int, stop: int, dtype: torch.dtype) -> Extent:
        """Where the rows of a parameter from `start` to `stop` belong, in one item of a file."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        shape = (1,) * len(place.prefix) + (stop - start, *place.shape[1:])
        offsets = torch.Size((*place.prefix, start, *(0 for _ in place.shape[1:])))
        self._tensor(place, dtype).chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
        with torch.serialization.skip_data():
            item = self._save(MetadataIndex(place.key, offsets), torch.empty(shape, dtype=dtype))
        assert self._stream is not None
        return Extent(self._folder / item.relative_path, self._stream.hole, shape, dtype)

    def add_object(self, key: str, value: Any) -> None:
        """What mcore stores beside tensors, as it does itself: a list of one."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        self._tensors[key] = BytesStorageMetadata()
        self._save(MetadataIndex(key), [value])

    def _tensor(self, place: Place, dtype: torch.dtype) -> Any:
        from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

        if place.key not in self._tensors:
            size = torch.Size(place.stack + place.shape)
            properties = TensorProperties(dtype=dtype)
            self._tensors[place.key] = TensorStorageMetadata(properties, size, [])
        return self._tensors[place.key]

    def _save(self, index: Any, value: Any) -> Any:
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        stream, name = self._file()
        begin = stream.tell()
        with _without_crc():
            torch.save(value, stream)
        self._storage[index] = _StorageInfo(name, begin, stream.tell() - begin)
        return self._storage[index]

    def _file(self) -> tuple[_Stream, str]:
        if self._stream is not None and self._stream.tell() >= FILE_BYTES:
            self._close()
        if self._stream is None:
            self._stream = _Stream(io.FileIO(self._folder / f"__0_{self._count}.distcp", "x"))
            self._count += 1
        return self._stream, f"__0_{self._count - 1}.distcp"

    def _close(self) -> None:
        if self._stream is not None:
            with self._stream as stream:
                reserve(stream, stream.tell())
            self._stream = None

    def finish(self) -> None:
        """Write torch's `.metadata` and mcore's metadata.json and common.pt; OSError when there is
        no room for all of this."""
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.metadata import Metadata
        from torch.distributed.checkpoint.storage import WriteResult

        self._close()
        results = [WriteResult(i, info.length, info) for i, info in self._storage.items()]
        FileSystemWriter(self._folder).finish(Metadata(self._tensors), [results])
        # Megatron-LM would reorder QKV rows of a checkpoint without a version.
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, self._folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """torch's archives need no checksum of their own: nothing reads it, and it halves the speed."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
