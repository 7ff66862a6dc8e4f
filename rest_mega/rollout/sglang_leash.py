"""Runs a server, and ends its whole process group when the run that started it is gone.

    python sglang_leash.py PID-OF-THE-RUN COMMAND [ARGUMENT ...]

A script of its own, standard library only: the kernel tells a process of its parent's end, and the
children of a server that is only just starting do not listen for theirs yet.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def when_the_parent_ends(number: int) -> None:
    """Linux sends this process the signal once the thread that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def main(run: int, command: list[str]) -> int:
    """The command's exit code, 128 + signal where a signal ended it."""
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
    when_the_parent_ends(signal.SIGUSR1)
    if os.getppid() != run:
        return 1
    child = subprocess.Popen(command, preexec_fn=lambda: when_the_parent_ends(signal.SIGKILL))
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
