"""Rows of tensors on their way: read, cast where asked, and summed beside the reading and writing.

The sum is CRC-32: it guards against damage, not against forgery, and a damage at random escapes it
once in 2^32. zlib does 3.8 GiB per second of a core (`benchmarks/convert.py`), more than the 2.6
of copying a file; SHA-256, even with SHA instructions, 1.7, BLAKE2b 0.9.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from tqdm import tqdm

from rest_mega.config import ConfigError
from rest_mega.sync.byte_ranges import Buffer, Rows, blocks, raw_bytes
from rest_mega.sync.names import hf_names, hf_shape
from rest_mega.sync.safetensors_files import Entry
from rest_mega.trainer.model import Architecture

ALGORITHM = "crc32"


class Checksums:
    """One running sum per tensor; rows must come in order."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        self._waiting: list[Future[None]] = []

    def update(self, name: str, rows: torch.Tensor) -> None:
        """Add the bytes of a contiguous CPU tensor, which must stay as it is until `settle`."""
        self._waiting.append(self._worker.submit(self._add, name, raw_bytes(rows)))

    def _add(self, name: str, data: memoryview) -> None:
        self._sums[name] = zlib.crc32(data, self._sums.get(name, 0))

    def settle(self) -> None:
        """Wait until all rows so far have been read."""
        for future in self._waiting:
            future.result()
        self._waiting.clear()

    def finish(self) -> dict[str, str]:
        """Name -> the sum, 8 hexadecimal digits."""
        self.settle()
        self._worker.shutdown()
        return {name: f"{value:08x}" for name, value in self._sums.items()}


class Mover:
    """Reads rows, casts them where asked, and keeps the sums of what was read and what came of
    it."""

    def __init__(self, rows: Rows, architecture: Architecture, quiet: bool) -> None:
        self._rows, self._scratch = rows, Buffer()
        self._read, self._made = Checksums(), Checksums()
        total = _total_bytes(rows, architecture)
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=quiet or None)

    def dtype(self, name: str) -> torch.dtype:
        """Of the source."""
        return self._rows.dtype(name)

    def names(self) -> list[str]:
        """Of the source, in its order."""
        return self._rows.names()

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows of a Hugging Face tensor, the next after those filled before; it
        must stay as it is until `settle`."""
        dtype = self._rows.dtype(name)
        if dtype == out.dtype:
            self._rows.read(name, start, out)
            self._read.update(name, out)
        else:
            raw = self._scratch.take(tuple(out.shape), dtype)
            self._rows.read(name, start, raw)
            self._read.update(name, raw)
            out.copy_(raw)
            _check_range(name, raw, out)
            self._read.settle()
            self._made.update(name, out)
        self._bar.update(out.numel() * dtype.itemsize)

    def settle(self) -> None:
        """Wait until what was filled may be overwritten."""
        self._read.settle()
        self._made.settle()

    def finish(self) -> tuple[dict[str, str], dict[str, str]]:
        """Sums by name: of the source's bytes, and in the result's dtype."""
        self._bar.close()
        read, made = self._read.finish(), self._made.finish()
        return read, read | made


def _total_bytes(rows: Rows, architecture: Architecture) -> int:
    return sum(
        Entry(name, hf_shape(name, architecture), rows.dtype(name)).nbytes
        for name in hf_names(architecture)
    )


def _check_range(name: str, raw: torch.Tensor, out: torch.Tensor) -> None:
    if bool((raw.float().isfinite() & ~out.isfinite()).any()):
        raise ConfigError(
            f"{name} has values beyond the range of {dtype_name(out.dtype)} (up to "
            f"{float(raw.float().abs().nan_to_num(0, 0).max()):.3g}); use --dtype bf16 or fp32"
        )


def read_back(rows: Rows, architecture: Architecture, quiet: bool) -> dict[str, str]:
    """The sums of every tensor."""
    sums, buffers = Checksums(), (Buffer(), Buffer())
    total = _total_bytes(rows, architecture)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet or None) as bar:
        for name in hf_names(architecture):
            shape, dtype = hf_shape(name, architecture), rows.dtype(name)
            for number, (start, stop) in enumerate(blocks(shape, dtype)):
                block = buffers[number % 2].take((stop - start, *shape[1:]), dtype)
                rows.read(name, start, block)
                sums.settle()  # of the other buffer, summed while this one was filled
                sums.update(name, block)
                bar.update(block.nbytes)
            sums.settle()
    return sums.finish()


def dtype_name(dtype: torch.dtype) -> str:
    """As transformers writes it."""
    return str(dtype).removeprefix("torch.")
