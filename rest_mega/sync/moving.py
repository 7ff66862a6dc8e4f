"""Rows of tensors on their way: read, summed, cast where asked, written; several tensors at a time.

The sum is XXH3 of 128 bits: it guards against damage, not against forgery. It is a tenth of the
work of copying a file where zlib's CRC-32 is as much as the copy, SHA-256 and BLAKE2b two to four
times as much (`benchmarks/convert.py`). Reading, summing and writing release the interpreter's
lock, so threads share the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from tqdm import tqdm

from rest_mega.config import ConfigError
from rest_mega.sync.byte_ranges import Buffer, Files, Rows, blocks, raw_bytes
from rest_mega.sync.names import hf_names, hf_shape
from rest_mega.sync.safetensors_files import Entry
from rest_mega.trainer.model import Architecture

ALGORITHM = "xxh3_128"
THREADS = min(4, os.cpu_count() or 1)

Sums = dict[str, str]
"""Hugging Face name -> the sum of its bytes in order, 32 hexadecimal digits."""
_Running = dict[str, xxhash.xxh3_128]


@dataclass(frozen=True)
class Move:
    """`name[start:stop]` along axis 0 goes to `file` from byte `offset` on, as `dtype`."""

    name: str
    start: int
    stop: int
    file: Path
    offset: int
    dtype: torch.dtype


class Mover:
    """Makes moves, and keeps the sums of what was read and of what came of it."""

    def __init__(self, rows: Rows, architecture: Architecture, quiet: bool) -> None:
        self._rows, self._architecture = rows, architecture
        self._read: _Running = {}
        self._made: _Running = {}
        self._targets = Files(os.O_WRONLY)
        self._bar = _bar(rows, architecture, quiet)

    def run(self, tasks: Sequence[Sequence[Move]]) -> tuple[Sums, Sums]:
        """The sums of the source's bytes, and in the result's dtypes. All moves of a tensor stand
        in one task, in the order of its rows. ConfigError for a source that cannot be read or a
        value beyond a dtype's range, OSError when there is no room."""
        with ThreadPoolExecutor(THREADS, "moves") as pool, self._bar:
            for _ in pool.map(self._carry, tasks):
                pass
        return _written(self._read), _written(self._read | self._made)

    def _carry(self, moves: Sequence[Move]) -> None:
        buffers = Buffer(), Buffer()
        for move in moves:
            columns, dtype = self._columns(move.name), self._rows.dtype(move.name)
            offset = move.offset
            for start, stop in blocks((move.stop - move.start, *columns), dtype):
                raw = buffers[0].take((stop - start, *columns), dtype)
                self._rows.read(move.name, move.start + start, raw)
                _add(self._read, move.name, raw)
                out = raw
                if dtype != move.dtype:
                    out = buffers[1].take(tuple(raw.shape), move.dtype).copy_(raw)
                    _check_range(move.name, raw, out)
                    _add(self._made, move.name, out)
                self._targets.write(move.file, offset, out)
                offset += out.nbytes
                _advance(self._bar, raw)

    def _columns(self, name: str) -> tuple[int, ...]:
        return hf_shape(name, self._architecture)[1:]


def read_back(rows: Rows, architecture: Architecture, quiet: bool) -> Sums:
    """The sums of every tensor."""
    sums: _Running = {}
    bar = _bar(rows, architecture, quiet, "verify")

    def read(name: str) -> None:
        (_, *columns), dtype, buffer = hf_shape(name, architecture), rows.dtype(name), Buffer()
        for start, stop in blocks(hf_shape(name, architecture), dtype):
            block = buffer.take((stop - start, *columns), dtype)
            rows.read(name, start, block)
            _add(sums, name, block)
            _advance(bar, block)

    with ThreadPoolExecutor(THREADS, "verify") as pool, bar:
        for _ in pool.map(read, hf_names(architecture)):
            pass
    return _written(sums)


def _add(sums: _Running, name: str, rows: torch.Tensor) -> None:
    sums.setdefault(name, xxhash.xxh3_128()).update(raw_bytes(rows))


def _written(sums: _Running) -> Sums:
    return {name: running.hexdigest() for name, running in sums.items()}


def _bar(rows: Rows, architecture: Architecture, quiet: bool, what: str | None = None) -> tqdm:
    total = _total_bytes(rows, architecture)
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=quiet or None)


def _advance(bar: tqdm, rows: torch.Tensor) -> None:
    with bar.get_lock():
        bar.update(rows.nbytes)


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


def dtype_name(dtype: torch.dtype) -> str:
    """As transformers writes it."""
    return str(dtype).removeprefix("torch.")
