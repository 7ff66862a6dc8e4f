"""Checksums of tensors that pass by row by row, computed beside the reading and writing.

SHA-256: with the CPU's SHA instructions it is as fast as zlib's CRC-32 (`benchmarks/convert.py`
prints both), and no damage has the same sum by chance.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from rest_mega.sync.byte_ranges import raw_bytes

ALGORITHM = "sha256"


class Checksums:
    """One running sum per tensor; rows must come in order."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        self._waiting: list[Future[None]] = []

    def update(self, name: str, rows: torch.Tensor) -> None:
        """Add the bytes of a contiguous CPU tensor, which must stay as it is until `settle`."""
        running = self._sums.setdefault(name, hashlib.new(ALGORITHM))
        self._waiting.append(self._worker.submit(running.update, raw_bytes(rows)))

    def settle(self) -> None:
        """Wait until all rows so far have been read."""
        for future in self._waiting:
            future.result()
        self._waiting.clear()

    def finish(self) -> dict[str, str]:
        """Name -> the sum in hexadecimal."""
        self.settle()
        self._worker.shutdown()
        return {name: running.hexdigest() for name, running in self._sums.items()}
