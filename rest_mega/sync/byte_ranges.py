"""Tensors as contiguous byte ranges of files, read and written some rows at a time through memory
that is reused.

`pread` instead of a memory map: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from rest_mega.config import ConfigError

BLOCK_BYTES = 2**20
"""Bytes of a tensor that are held at a time; one row at least. So few stay in a core's cache from
their reading to their writing: 32 MiB made conversions half as fast."""


@dataclass(frozen=True)
class Extent:
    """Where a contiguous tensor's bytes lie."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Rows(Protocol):
    """Hugging Face tensors whose rows (axis 0) can be read in any portions."""

    def names(self) -> list[str]:
        """All tensors, in the order in which reading them is cheapest."""

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` ([rows, ...], contiguous, of the stored dtype) with the rows from `start`
        on."""


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Files:
    """Reads and writes ranges of files, each opened once: what replaces a file later is not seen.
    Any number of threads may do so."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags, self._lock = flags, threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def open(self, file: Path) -> int:
        """Its descriptor, closed with this object; ConfigError when it cannot be read."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = self._open(file)
            return self._descriptors[file]

    def _open(self, file: Path) -> int:
        try:
            descriptor = os.open(file, self._flags)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({error.strerror}); fetch it anew") from error
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read(self, file: Path, offset: int, out: torch.Tensor) -> None:
        """Fill the contiguous CPU tensor `out`; ConfigError when the file is gone or too short."""
        view, descriptor = raw_bytes(out), self.open(file)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise ConfigError(f"{file} ends before byte {offset + len(view)}; fetch it anew")
            view, offset = view[count:], offset + count

    def write(self, file: Path, offset: int, rows: torch.Tensor) -> None:
        """Put the bytes of a contiguous CPU tensor there; OSError when there is no room."""
        view, descriptor = raw_bytes(rows), self.open(file)
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


def reserve(stream: BinaryIO, nbytes: int) -> None:
    """Make the file that long, its new bytes zero, with room for all of them on the disk: OSError
    when it is full, before the work begins, and writing takes an eighth less time."""
    stream.flush()
    os.posix_fallocate(stream.fileno(), 0, nbytes)


class Buffer:
    """Memory that is used again and again for blocks of any dtype and shape."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor whose storage is exactly its own bytes; the one taken before
        must not be used any more."""
        count = math.prod(shape)
        if count * dtype.itemsize > len(self._memory):
            self._memory = bytearray(count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).view(shape)


def blocks(shape: tuple[int, ...], dtype: torch.dtype, limit: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of at most `limit` bytes (0: BLOCK_BYTES), or one row."""
    row = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, (limit or BLOCK_BYTES) // max(row, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
