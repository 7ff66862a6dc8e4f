"""The run directory: one run at a time, moved aside for a fresh one."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from rest_mega.config import ConfigError

LOCK = ".lock"
"""In the run directory: held by the run, and says by which process."""


class RunDirectory:
    """`path`, held by this process until `release` or its end, however it ends."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """Make the directory and lock it; with `fresh` what it holds is moved aside first.

        ConfigError when another run holds it. The lock is the kernel's (POSIX record lock), so
        nothing is left to clean up after a kill; children do not inherit it.
        """
        self.path = path
        self.unlocked = ""
        """Why the file system could not lock the directory; empty: it is locked."""
        path.mkdir(parents=True, exist_ok=True)
        self._file = self._lock()
        if fresh and any(p.name != LOCK for p in path.iterdir()):
            _move_aside(path)
            self._file.close()
            path.mkdir()
            self._file = self._lock()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _lock(self) -> TextIO:
        file = (self.path / LOCK).open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ConfigError(
                    f"run.dir={str(self.path)!r} is in use by {file.read().strip()}: end that run, "
                    "or use another run.dir"
                ) from error
            self.unlocked = str(error)
        return file

    def release(self) -> None:
        """Let another run have it."""
        self._file.close()


def _move_aside(path: Path) -> None:
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, target)
