"""Between the ranks: clocks, the speed of each, and collectives that are right and fast.

A collective's first result is compared with what it must be; then it is repeated for its share of
the time. Bandwidth is nccl-tests' bus bandwidth (github.com/NVIDIA/nccl-tests,
doc/PERFORMANCE.md): bytes / seconds x 2 (n - 1) / n for an all-reduce among n, bytes / seconds for
a broadcast and a hop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from rest_mega.diagnosis.findings import ERROR, OK, WARNING, Finding, told
from rest_mega.trainer.parallel import Parallel

CPU_BYTES, GPU_BYTES = 16 * 2**20, 256 * 2**20
"""Of a tensor that is sent: large enough that latency does not count."""
CLOCK_S = 1.0
SLOW = 1.5
"""Times the median, from which a rank is told to be slow."""
MATMULS = 10


@dataclass(frozen=True)
class Link:
    """A collective to try in this rank's group of a kind."""

    name: str
    run: Callable[[torch.Tensor], None]
    prepare: Callable[[torch.Tensor], None]
    right: Callable[[torch.Tensor], bool]
    share: float
    """Bus bandwidth over bytes / seconds."""


def look(place: Parallel, seconds: float) -> list[Finding]:
    """Try everything for about `seconds`; collective. The findings speak of all ranks."""
    found = [_clocks(place), _compute(place)]
    size = CPU_BYTES if place.device.type == "cpu" else GPU_BYTES
    tensor = torch.empty(size // 4, dtype=torch.float32, device=place.device)
    links = list(_links(place))
    for link in links:
        found.append(_try(place, link, tensor, seconds / len(links)))
    return found


def _clocks(place: Parallel) -> Finding:
    offsets = _of_all(place, place.clock_offset())
    worst = int(np.abs(offsets).argmax())
    if abs(offsets[worst]) > CLOCK_S:
        text = f"rank {worst}'s is {offsets[worst]:+.1f} s off rank 0's: logs are out of order"
        return Finding(WARNING, "clocks", text, "run chrony or ntpd on every machine")
    return Finding(OK, "clocks", f"within {CLOCK_S:.0f} s of each other")


def _compute(place: Parallel) -> Finding:
    """Ranks beside each other at the same matmul: a slow one makes all wait."""
    gpu = place.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=place.device)
    a @ a
    _synchronise(place)
    place.barrier()
    begin = time.perf_counter()
    for _ in range(MATMULS):
        a @ a
    _synchronise(place)
    seconds = _of_all(place, time.perf_counter() - begin)
    median = float(np.median(seconds))
    slow = [rank for rank, one in enumerate(seconds) if one > SLOW * median]
    speed = 2 * n**3 * MATMULS / median / 1e12
    text = f"{speed:,.2f} TFLOP/s a rank ({n} x {n} {str(dtype).removeprefix('torch.')})"
    if not slow:
        return Finding(OK, "compute", text)
    text += f"; {told(slow)}: {max(seconds) / median:.1f} times as long as the median"
    remedy = "is something else running there? on a GPU: nvidia-smi -q -d PERFORMANCE, dcgmi diag"
    return Finding(WARNING, "compute", text, remedy)


def _links(place: Parallel) -> Iterator[Link]:
    world = dist.group.WORLD
    assert world is not None
    yield _all_reduce("all ranks", world)
    yield _broadcast("all ranks", world)
    for name, group in (("tensor", place.groups.tp), ("data", place.groups.dp)):
        if 1 < dist.get_world_size(group) < place.world_size:
            yield _all_reduce(f"{name} groups", group)
    if place.config.pipeline > 1:
        yield _hop("pipeline groups", place.groups.pp)


def _all_reduce(name: str, group: dist.ProcessGroup) -> Link:
    size, rank = dist.get_world_size(group), dist.get_rank(group)

    def prepare(tensor: torch.Tensor) -> None:
        tensor.copy_(_pattern(tensor)).mul_(rank + 1)

    def run(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=group)

    def right(tensor: torch.Tensor) -> bool:
        return torch.equal(tensor, _pattern(tensor) * (size * (size + 1) // 2))

    return Link(f"all-reduce, {name} of {size}", run, prepare, right, 2 * (size - 1) / size)


def _broadcast(name: str, group: dist.ProcessGroup) -> Link:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first = dist.get_global_rank(group, 0)

    def prepare(tensor: torch.Tensor) -> None:
        tensor.copy_(_pattern(tensor)).mul_(float(rank == 0))

    def run(tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, first, group=group)

    def right(tensor: torch.Tensor) -> bool:
        return torch.equal(tensor, _pattern(tensor))

    return Link(f"broadcast, {name} of {size}", run, prepare, right, 1.0)


def _hop(name: str, group: dist.ProcessGroup) -> Link:
    """Every stage sends to the next and receives from the one before, the last to the first."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ahead = dist.get_global_rank(group, (rank + 1) % size)
    behind = dist.get_global_rank(group, (rank - 1) % size)
    sent: list[torch.Tensor] = []

    def prepare(tensor: torch.Tensor) -> None:
        sent[:] = [_pattern(tensor) * (rank + 1)]

    def run(tensor: torch.Tensor) -> None:
        pair = [
            dist.P2POp(dist.isend, sent[0], ahead, group),
            dist.P2POp(dist.irecv, tensor, behind, group),
        ]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    def right(tensor: torch.Tensor) -> bool:
        return torch.equal(tensor, _pattern(tensor) * ((rank - 1) % size + 1))

    return Link(f"hop, {name} of {size}", run, prepare, right, 1.0)


def _pattern(tensor: torch.Tensor) -> torch.Tensor:
    """Small whole numbers, whose sums over some thousand ranks are exact in fp32."""
    return torch.arange(tensor.numel(), device=tensor.device).remainder_(7).to(tensor.dtype)


def _try(place: Parallel, link: Link, tensor: torch.Tensor, seconds: float) -> Finding:
    link.prepare(tensor)
    link.run(tensor)
    _synchronise(place)
    wrong = np.flatnonzero(_of_all(place, float(not link.right(tensor))))
    if len(wrong):
        text = f"{link.name}: the numbers that arrive are wrong, {told(wrong.tolist())}"
        remedy = (
            "with NCCL_P2P_DISABLE=1 right: turn off ACS and the IOMMU for the GPUs' switches; "
            "else NCCL_DEBUG=WARN, dcgmi diag -r 3 there"
        )
        return Finding(ERROR, "links", text, remedy)
    tensor.zero_()
    once = _timed(place, link, tensor, 1)
    count = int(np.clip(seconds / max(once), 1, 1000))
    each = _timed(place, link, tensor, count) / count
    slowest = int(each.argmax())
    speed = tensor.nbytes / each[slowest] * link.share / 1e9
    text = f"{link.name}: exact; {tensor.nbytes / 2**20:.0f} MiB in {each[slowest] * 1e3:.1f} ms"
    return Finding(OK, "links", f"{text}, {speed:.2f} GB/s bus bandwidth")


def _timed(place: Parallel, link: Link, tensor: torch.Tensor, count: int) -> np.ndarray:
    """Seconds of `count` repetitions, of every rank."""
    place.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        link.run(tensor)
    _synchronise(place)
    return _of_all(place, time.perf_counter() - begin)


def _of_all(place: Parallel, value: float) -> np.ndarray:
    """Every rank's value, in rank order; collective."""
    values = np.zeros(place.world_size)
    values[place.rank] = value
    return place.sum(values)


def _synchronise(place: Parallel) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
