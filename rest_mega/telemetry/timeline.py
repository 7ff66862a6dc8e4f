"""Timeline: the phases of one rank, and when it waited in them -> RUN/phases/rank_N.jsonl.

A process first says who the rank is; every other line is a phase that is over: its begin by rank
0's clock (seconds since the epoch), its seconds, and `waits`: [seconds after the begin, seconds]
of each host collective in it, which is time spent waiting for other ranks.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rest_mega.telemetry.rows import append, drop_after, read_rows

PHASES = "phases"
SHORTEST_S = 1e-3
"""Waits below it are not worth a line."""

Waits = Callable[[], Sequence[tuple[float, float]]]
"""(begin, end) of what was waited since the last call, by this rank's clock."""


def kept(rank: int, world_size: int, most: int) -> bool:
    """Whether the rank is among the at most `most` that keep a timeline: evenly spread, the first
    always one of them."""
    if world_size <= most:
        return True
    return most > 0 and (rank == 0 or rank * most // world_size != (rank - 1) * most // world_size)


class Timeline:
    """Of one rank."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        place: str,
        *,
        waits: Waits,
        clock_offset: float = 0.0,
        resume_step: int | None = None,
    ) -> None:
        """`place`: the rank in words; `clock_offset`: how far its clock is ahead of rank 0's."""
        self._path = run_dir / PHASES / f"rank_{rank}.jsonl"
        self._who: dict[str, Any] | None = {
            "rank": rank, "place": place, "host": socket.gethostname()
        }  # fmt: skip
        self._waits, self._offset = waits, clock_offset
        self._rows: list[dict[str, Any]] = []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(self._path, -1 if resume_step is None else resume_step)

    def begin(self) -> None:
        """What was waited so far is in no phase."""
        self._waits()

    def add(self, name: str, begin: float, seconds: float) -> None:
        """A phase that is over; `begin` by this rank's clock."""
        waits = [
            [round(a - begin, 4), round(b - a, 4)] for a, b in self._waits() if b - a >= SHORTEST_S
        ]
        row = {"phase": name, "start": round(begin - self._offset, 4), "seconds": round(seconds, 4)}
        self._rows.append(row | ({"waits": waits} if waits else {}))

    def flush(self, step: int) -> None:
        """Write what is over by now as part of `step`."""
        rows = self._rows if self._who is None else [self._who, *self._rows]
        append(self._path, [{"step": step} | row for row in rows])
        self._rows, self._who = [], None


def read_timelines(run_dir: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(who, phases in order) of every rank that kept one, by rank."""
    found = []
    for path in (run_dir / PHASES).glob("rank_*.jsonl"):
        match = re.fullmatch(r"rank_(\d+)\.jsonl", path.name)
        rows = read_rows(path)
        phases = [row for row in rows if "phase" in row]
        unknown = {"rank": int(match.group(1)) if match else 0, "place": "", "host": ""}
        told = [row for row in rows if "rank" in row]
        found.append((told[-1] if told else unknown, phases))
    return sorted(found, key=lambda one: int(one[0]["rank"]))
