"""Runs one function in a forked child while training goes on: the child sees memory as it was at
the fork."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_FORK = multiprocessing.get_context("fork")


class Background:
    """A call in a child process; its result arrives by a pipe that only the child writes to."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._pipe, theirs = _FORK.Pipe(duplex=False)
        self._child = _FORK.Process(target=_answer, args=(call, theirs))
        self._child.start()
        theirs.close()

    def ready(self) -> bool:
        """True once the child has answered or died: `result` then does not wait."""
        return self._pipe.poll()

    def result(self) -> Any:
        """What the call returned; waits for it. OSError with the child's traceback when it
        raised or died."""
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            ok, value = False, "the process that wrote died without a word"
        self._child.join()
        self._pipe.close()
        if not ok:
            raise OSError(value)
        return value


def _answer(call: Callable[[], Any], pipe: Connection) -> None:
    try:
        answer = (True, call())
    except OSError as error:
        answer = (False, str(error))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
