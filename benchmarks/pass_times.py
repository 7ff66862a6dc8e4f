"""When a rank's stage computes: forward and backward passes by megatron-core's own timers."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from rest_mega.telemetry.profiler import Timer
from rest_mega.trainer.parallel import Parallel

PASSES = ("forward-compute", "backward-compute")
"""megatron-core's timers around one pass of one chunk (schedules.py: `forward_step` with loss and
head, and `backward_step`). Sends and receives lie outside, exchanges inside a layer (TP, CP, EP)
within."""


class PassTimes:
    """Call it as megatron-core calls its timers: `passes(name).start()`, `.stop()`.

    On a CPU by the host's clock; on a GPU by CUDA events of the current stream, so that nothing
    waits while it is measured.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: dict[str, list[Any]] = {}
        self._base: Any = None
        self._zero = 0.0

    def begin(self) -> None:
        """Forget what was; times count from now. Waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks, self._zero, self._base = {name: [] for name in PASSES}, time.time(), None
        if self._on_gpu:
            self._base = torch.cuda.Event(enable_timing=True)
            self._base.record()

    def spans(self) -> list[tuple[float, float]]:
        """(begin, end) of every pass since `begin`, in seconds since the epoch by this host."""
        return sorted(span for spans in self.by_name().values() for span in spans)

    def by_name(self) -> dict[str, list[tuple[float, float]]]:
        """The same, of forward and backward passes apart, each in its order."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found = {}
        for name, marks in self._marks.items():
            times = [
                self._zero + self._base.elapsed_time(m) / 1e3 if self._on_gpu else m for m in marks
            ]
            found[name] = list(zip(times[::2], times[1::2], strict=True))
        return found

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        """megatron-core's timer of that name."""
        return Timer(self, name)

    def start(self, name: str) -> None:
        """A pass begins or, as `stop`, ends; other timers of megatron-core are left alone."""
        if name not in self._marks:
            return
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name].append(event)
        else:
            self._marks[name].append(time.time())

    stop = start


def waiting(
    place: Parallel, passes: PassTimes, offset: float, seconds: float
) -> list[dict[str, float]]:
    """Of every rank, in rank order: `bubble`, the share of its replica's pipeline (from the first
    pass of any of the replica's ranks to the end of the last) in which it runs no pass, and `idle`,
    the share of the whole phase of `seconds`. `offset`: how far this rank's clock is ahead of
    rank 0's. Collective."""
    spans = passes.spans()
    mine = {
        "replica": place.data_rank,
        "first": spans[0][0] - offset,
        "last": spans[-1][1] - offset,
        "busy": sum(end - begin for begin, end in spans),
    }
    ranks = [json.loads(text) for text in place.gather_text(json.dumps(mine))]
    found = []
    for rank in ranks:
        replica = [one for one in ranks if one["replica"] == rank["replica"]]
        window = max(one["last"] for one in replica) - min(one["first"] for one in replica)
        found.append({"bubble": 1 - rank["busy"] / window, "idle": 1 - rank["busy"] / seconds})
    return found
