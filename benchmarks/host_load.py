"""Measurements on a host that others use too: taken while it is quiet, or taken again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import psutil

from rest_mega.trainer.parallel import Parallel

LOOK_S = 0.3
Result = TypeVar("Result")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--quiet and --patience, what `Quiet` is made of."""
    parser.add_argument("--quiet", type=float, default=1.0, help="share of the cores for others")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for quiet")


class Quiet:
    """Runs work while other processes take at most a share `most` of this host's cores; for runs
    whose ranks are all on one host. With `most` 1 it runs at once."""

    def __init__(self, place: Parallel, most: float, patience: float) -> None:
        """`patience`: seconds until TimeoutError, from now."""
        self._place, self._most, self._process = place, most, psutil.Process()
        self._patience, self._end = patience, time.monotonic() + patience

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """What `work` gave the first time that it was quiet from begin to end, and the share of the
        cores that others took meanwhile (the host counts in hundredths of a second). Collective;
        `work` may run several times."""
        while True:
            self._wait()
            start, busy, own = time.perf_counter(), _busy(), self._own()
            result = work()
            seconds, used = time.perf_counter() - start, _busy() - busy
            ours = self._place.sum_one(self._own() - own)
            share = (used - ours) / seconds / (psutil.cpu_count() or 1)
            others = self._largest(min(1.0, max(0.0, share)))
            if others <= self._most:
                return result, others

    def _wait(self) -> None:
        """Until the host looks quiet to rank 0."""
        while self._most < 1:
            first = self._place.rank == 0
            seen = psutil.cpu_percent(LOOK_S) / 100 if first else 0.0
            late = first and time.monotonic() > self._end
            if self._largest(float(late)):
                raise TimeoutError(
                    f"others took more than {self._most:.0%} of this host's cores for most of "
                    f"{self._patience:.0f} s: wait, or allow more (--quiet)"
                )
            if self._largest(seen) <= self._most:
                return

    def _largest(self, value: float) -> float:
        return float(self._place.maximum(np.array([value]))[0])

    def _own(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _busy() -> float:
    times = psutil.cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - waiting)
