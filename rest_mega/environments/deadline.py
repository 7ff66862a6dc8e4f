"""A deadline for a function of this process: it runs on a reusable daemon thread that can be left
behind.

What this gives, and what not:
- a call handed over and answered costs tens of microseconds, since idle threads wait for the next
  call;
- a call past its deadline is left behind at once. An exception is raised inside its thread, so that
  a loop in Python ends there, and a call that waits in C (sleep, a socket) ends when it returns;
- memory, files and network are not limited: tools are trusted code. Run others in a process of
  their own.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any


class DeadlineError(Exception):
    """The function had not returned at its deadline."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """The result of `function()`, or the Exception it raised; DeadlineError when it takes longer
    than `seconds`."""
    worker = _idle_worker()
    worker.jobs.put(function)
    try:
        value, error = worker.results.get(timeout=seconds)
    except queue.Empty:
        worker.leave_behind()
        raise DeadlineError(f"no result within {seconds:g} s") from None
    _IDLE.put(worker)
    if error is not None:
        raise error
    return value


class _Worker(threading.Thread):
    """Runs one job after another; daemon, so that a stuck one never holds up the end of the
    program."""

    def __init__(self) -> None:
        super().__init__(name="rest_mega tool", daemon=True)
        self.jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            self.results.put(_outcome(job))

    def leave_behind(self) -> None:
        """Never used again: ends as soon as its call lets go of the thread."""
        self.jobs.put(None)
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )


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
