"""SIGINT and SIGTERM -> an orderly end of the run; a second signal ends this process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SAME_SECONDS = 2.0
"""Signals this close together are one request: a terminal and a launcher both pass on a Ctrl-C."""


class Stop:
    """Remembers that a signal asked the run to end; True when called after one came."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self.signal = 0
        """Number of the signal that asked; 0: none did."""
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def watch(self) -> None:
        """Take over both signals; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Give both signals back to those who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __call__(self) -> bool:
        """True once a signal came."""
        return self._asked_at is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._process:
            self._in_a_child(number)
        elif self._asked_at is None:
            self._asked_at, self.signal = now, number
        elif now - self._asked_at > SAME_SECONDS:
            _end(number)

    def _in_a_child(self, number: int) -> None:
        # mcore forks a process that writes the checkpoint: a Ctrl-C is sent to it too, and it must
        # finish its file. Its parent ends it by SIGTERM.
        if number == signal.SIGTERM:
            _end(number)


def _end(number: int) -> None:
    """Die of the signal, as if it had never been taken over."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
