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

ROUNDS, ROUND_S = 5, 0.15
"""Rounds of which a figure is the median, and about the seconds of one."""


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


def mean(speeds: list[dict[str, float]]) -> dict[str, float] | None:
    """Of several measurements; None of none."""
    if not speeds:
        return None
    return {name: sum(one[name] for one in speeds) / len(speeds) for name in speeds[0]}


def _seconds(place: Parallel, work: Callable[[], object]) -> float:
    """Seconds of `work` in the median round on the slowest rank. A round repeats it so often that
    ranks which begin a little apart, since they share a core, are at it together."""

    def round_of(times: int) -> float:
        place.barrier()
        start = time.perf_counter()
        for _ in range(times):
            work()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def slowest(seconds: float) -> float:
        return float(place.maximum(np.array([seconds]))[0])

    round_of(1)
    times = max(1, round(ROUND_S / slowest(round_of(3))))
    return slowest(float(np.median([round_of(times) for _ in range(ROUNDS)])))
