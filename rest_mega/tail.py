"""`rest-mega tail`: what a run says, from its files: one that goes on, was resumed, or is over."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rest_mega.config import require
from rest_mega.run_directory import LOCK
from rest_mega.telemetry.console import lines_of
from rest_mega.telemetry.rows import EVENTS, METRICS, RUN, WRITTEN

_POLL_S = 0.5


def main(words: Sequence[str]) -> int:
    """Print and follow until the run is over; returns the exit code. ConfigError for no run."""
    parser = argparse.ArgumentParser(
        prog="rest-mega tail",
        description="Steps and events of a run as they come, until it is over; from any machine "
        "that sees its directory.",
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--lines", type=int, default=20, help="of what was before, at most (20)")
    parser.add_argument("--wait", action="store_true", help="go on when the run is over: it may be "
                        "resumed")  # fmt: skip
    given = parser.parse_args(list(words))
    require((given.run / RUN).is_file(), f"{given.run} is no run directory: it has no {RUN}")
    follow(given.run, given.lines, wait=given.wait)
    return 0


def follow(
    run: Path, lines: int, *, wait: bool = False, pause: Callable[[float], None] = time.sleep
) -> None:
    """Print the last `lines` lines, then what comes, until nobody holds the run directory (`wait`:
    without end)."""
    files = [Followed(run / EVENTS, _event), Followed(run / METRICS, _row)]
    before = _new(files)
    _print(before[-lines:] if lines > 0 else [])
    while True:
        going = wait or is_held(run)
        _print(_new(files))
        if not going:
            return
        pause(_POLL_S)


def _new(files: Sequence[Followed]) -> list[str]:
    """The new lines of all files, in the order in which they were written."""
    told = sorted((at, i, words) for i, file in enumerate(files) for at, words in file.new())
    return [line for _, _, words in told for line in words]


class Followed:
    """The new lines of a JSONL file; also where a resumed run has replaced the file by one with
    fewer lines: then those of its rows that were not seen yet."""

    def __init__(self, path: Path, words: Callable[[Any], list[str]]) -> None:
        self._path, self._words = path, words
        self._seen: set[str] = set()
        self._file, self._at = -1, 0

    def new(self) -> list[tuple[float, list[str]]]:
        """(when, in words) of every row that was written since the last call."""
        try:
            with self._path.open("rb") as file:
                number = os.fstat(file.fileno())
                if number.st_ino != self._file or number.st_size < self._at:
                    self._file, self._at = number.st_ino, 0
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]  # the rest is still being written
        self._at += len(whole)
        fresh = [line for line in whole.decode().splitlines() if line not in self._seen]
        self._seen.update(fresh)
        rows = [json.loads(line) for line in fresh]
        return [(row.get("time", row.get(WRITTEN, 0.0)), self._words(row)) for row in rows]


def _event(row: Any) -> list[str]:
    return [time.strftime("%H:%M:%S ", time.localtime(row["time"])) + str(row["text"])]


def _row(row: Any) -> list[str]:
    return lines_of(row["step"], row)


def is_held(run: Path) -> bool:
    """Whether a process, of any machine, holds the lock of the run directory; asks without taking
    it."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with (run / LOCK).open("r+b") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:  # no lock file, or a file system without locks: nothing can be said
        return False
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def _print(lines: Sequence[str]) -> None:
    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
