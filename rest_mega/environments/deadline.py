"""Deadlines for functions of this process: each runs on a reusable daemon thread that can be left
behind.

What this gives, and what not:
- a call handed over and answered costs tens of microseconds, since idle threads wait for the next
  call;
- a call past its deadline is left behind at once. An exception is raised inside its thread, so that
  a loop in Python ends there, and a call that waits in C (sleep, a socket) ends when it returns;
- memory, files and network are not limited: tools are trusted code. Those that are not are declared
  `isolated` and run in a process of their own (workers.py).

A function may ask how long it has (`remaining`), and wait for its turn off the clock (`uncounted`).
"""

from __future__ import annotations

import ctypes
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")

_GRACE_S = 2.0
"""A function that asked for `remaining()` ends by itself at its deadline, and is given this long to
clean up before its thread is left behind."""


class DeadlineError(Exception):
    """The function had not returned at its deadline."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """The result of `function()`, or the Exception it raised; DeadlineError when it takes longer
    than `seconds`."""
    worker, clock = _idle_worker(), _Clock(seconds)
    worker.jobs.put((function, clock))
    while (left := clock.left() + (_GRACE_S if clock.watched else 0)) > 0:
        try:
            value, error = worker.results.get(timeout=left)
        except queue.Empty:
            continue
        _IDLE.put(worker)
        if error is not None:
            raise error
        return cast(T, value)
    worker.leave_behind()
    raise DeadlineError(f"no result within {seconds:g} s")


def remaining() -> float:
    """Seconds left to the function that runs within a deadline on this thread; infinite outside of
    one."""
    clock: _Clock | None = getattr(_THREAD, "clock", None)
    if clock is None:
        return math.inf
    clock.watched = True
    return max(clock.left(), 0.0)


@contextmanager
def uncounted() -> Iterator[None]:
    """Time spent inside does not count against the deadline of this thread's function: for waits
    that are no fault of the call (a free worker process, the start of a server)."""
    clock: _Clock | None = getattr(_THREAD, "clock", None)
    if clock is None:
        yield
        return
    clock.stop()
    try:
        yield
    finally:
        clock.go_on()


def together(jobs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """The results of all jobs, in order, of which at most `at_once` run at the same time.

    An error of a job is raised once no other job runs.
    """
    if min(at_once, len(jobs)) < 2:
        return [job() for job in jobs]
    results: list[Any] = [None] * len(jobs)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        todo.put(number)

    def pull() -> None:
        with suppress(queue.Empty):
            while True:
                number = todo.get_nowait()
                results[number] = _outcome(jobs[number])

    helpers = [_idle_worker() for _ in range(min(at_once, len(jobs)))]
    for helper in helpers:
        helper.jobs.put((pull, None))
    for helper in helpers:
        helper.results.get()
        _IDLE.put(helper)
    for _, error in results:
        if error is not None:
            raise error
    return [value for value, _ in results]


class _Clock:
    """Counts down; can be stopped meanwhile."""

    def __init__(self, seconds: float) -> None:
        self._until, self._stopped_at = time.monotonic() + seconds, math.inf
        self.watched = False

    def left(self) -> float:
        return self._until - min(time.monotonic(), self._stopped_at)

    def stop(self) -> None:
        self._stopped_at = time.monotonic()

    def go_on(self) -> None:
        self._until += time.monotonic() - self._stopped_at
        self._stopped_at = math.inf


_Job = tuple[Callable[[], Any], _Clock | None]


class _Worker(threading.Thread):
    """Runs one job after another; daemon, so that a stuck one never holds up the end of the
    program."""

    def __init__(self) -> None:
        super().__init__(name="rest_mega tool", daemon=True)
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            function, _THREAD.clock = job
            self.results.put(_outcome(function))

    def leave_behind(self) -> None:
        """Never used again: ends as soon as its call lets go of the thread."""
        self.jobs.put(None)
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )


_THREAD = threading.local()
"""`clock` of the job that runs on the thread."""

_IDLE: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
"""Threads that wait for a call; as many as there were calls at one time."""


def _idle_worker() -> _Worker:
    while True:
        try:
            worker = _IDLE.get_nowait()
        except queue.Empty:
            return _Worker()
        if worker.is_alive():  # a fork leaves its parent's threads behind
            return worker


def _outcome(job: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return job(), None
    except Exception as error:
        return None, error
    except BaseException as error:  # a tool's SystemExit ends the call, not the program
        return None, RuntimeError(f"{type(error).__name__}: {error}")
