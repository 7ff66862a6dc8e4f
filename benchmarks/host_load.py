"""How much of this host's CPU time went to processes that are no rank of the run."""

from __future__ import annotations

import time

import psutil

from rest_mega.trainer.parallel import Parallel


class HostLoad:
    """From `begin` to `others`; meant for runs whose ranks are all on one host."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._start = time.perf_counter(), _busy(), self._own()

    def others(self, place: Parallel) -> float:
        """Share of all cores' time since `begin`, in [0, 1], by rank 0's clock. The host counts in
        hundredths of a second. Collective."""
        before, busy, own = self._start
        seconds, used = time.perf_counter() - before, _busy() - busy
        ours = place.sum_one(self._own() - own)
        return min(1.0, max(0.0, (used - ours) / seconds / (psutil.cpu_count() or 1)))

    def _own(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _busy() -> float:
    times = psutil.cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - waiting)
