"""The run's JSONL files: rows appended, dropped on resume, read back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS, TRAJECTORIES, EVENTS, RUN = (
    "metrics.jsonl",
    "trajectories.jsonl",
    "events.jsonl",
    "run.json",
)
WRITTEN = "time/at"
"""In a row of metrics: when it was written, in seconds since the epoch."""


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; ValueError for a number that JSON does not have."""
    if rows:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def drop_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`, and none of a half-written last line."""
    if path.is_file():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of this run; a half-written last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
