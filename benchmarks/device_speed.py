"""What a rank's device does in large pieces, by all ranks at once: matmuls, memory, link.

Ranks that share cores, caches or memory share them here as well: the figures are those of one rank
beside all the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist

from rest_mega.trainer.parallel import Parallel

SECONDS = 0.5
"""Each figure is the median of the rounds that fit into this time, and of three at least."""


@dataclass(frozen=True)
class Speed:
    """One rank's, the slowest rank's of all."""

    flops: float
    """FLOP/s of a square matmul in the parameters' dtype."""
    bandwidth: float
    """Bytes/s of a copy larger than the caches: read and written bytes together."""
    link: float
    """Bytes/s that a rank sends in an all-reduce over all ranks (a ring's 2 (n - 1) / n of the
    tensor); 0 for one rank."""
    memory: float
    """Bytes of the device that a rank has: of the GPU, or of the host over its ranks."""


def measure(place: Parallel, dtype: torch.dtype) -> dict[str, float]:
    """Speed as a dictionary; the same on every rank. Collective."""
    gpu = place.device.type == "cuda"
    side, copied, sent = (8192, 2**30, 2**28) if gpu else (768, 2**26, 2**22)
    a = torch.randn(side, side, device=place.device, dtype=dtype)
    out = torch.empty_like(a)
    matmul = _seconds(place, lambda: torch.mm(a, a, out=out))
    source = torch.zeros(copied // 4, device=place.device)
    target = torch.empty_like(source)
    copy = _seconds(place, lambda: target.copy_(source))
    link, n = 0.0, place.world_size
    if n > 1:
        message = torch.zeros(sent // 4, device=place.device)
        link = 2 * (n - 1) / n * sent / _seconds(place, lambda: dist.all_reduce(message))
    if gpu:
        memory = float(torch.cuda.get_device_properties(place.device).total_memory)
    else:
        memory = psutil.virtual_memory().total / n
    return asdict(Speed(2 * side**3 / matmul, 2 * copied / copy, link, memory))


def _seconds(place: Parallel, work: Callable[[], object]) -> float:
    """Seconds of the median round on the slowest rank; all ranks begin a round together."""
    took: list[float] = []
    work()
    rounds = 3
    while len(took) < rounds:
        place.barrier()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        if len(took) == 1:
            slowest = float(place.maximum(np.array([took[0]]))[0])
            rounds = max(3, min(100, int(SECONDS / slowest)))
    return float(place.maximum(np.array([np.median(took)]))[0])
