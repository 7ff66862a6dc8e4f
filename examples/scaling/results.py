"""OUT/results.jsonl: one line per measurement of a point, kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from points import Point

from rest_mega.telemetry.rows import read_rows

RESULTS = "results.jsonl"
FIGURES = ("tokens_per_second", "tflops_per_rank", "mfu", "bubble", "memory", "train")
"""What is measured and predicted."""


def keep(out: Path, row: dict[str, Any]) -> None:
    """Append a row; it is on the disk when this returns. A line that a crash cut short is closed
    first, so that it spoils no other."""
    path = out / RESULTS
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * bool(torn) + json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(out: Path, point: Point) -> list[dict[str, Any]]:
    """The good measurements of exactly this point."""
    key = dataclasses.asdict(point)
    return [row for row in read_rows(out / RESULTS) if row["ok"] and row["point"] == key]


def shared(out: Path, point: Point, number: int) -> dict[str, Any] | None:
    """The `number`-th measurement of the same layout and batch in another series, as this point's:
    series often begin alike. None where there is none."""
    key = dataclasses.asdict(point)
    own = {"series": point.series, "scaling": point.scaling}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(out / RESULTS):
        if row["ok"] and {**row["point"], **own} == key:
            found.setdefault(row["point"]["series"], []).append(row)
    twins = [rows[number - 1] for rows in found.values() if len(rows) >= number]
    return {**twins[0], "point": key} if twins else None


@dataclasses.dataclass(frozen=True)
class Seen:
    """A point and its figures: medians over its measurements, and their lowest and highest."""

    point: Point
    measured: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    predicted: dict[str, float]
    count: int


def seen(rows: Sequence[dict[str, Any]]) -> list[Seen]:
    """Every point that has good rows, in the order of its first one."""
    groups: dict[Point, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ok"]:
            groups.setdefault(Point(**row["point"]), []).append(row)
    return [_seen(point, group) for point, group in groups.items()]


def _seen(point: Point, rows: list[dict[str, Any]]) -> Seen:
    measured = [row["measured"] for row in rows if row.get("measured")]
    values = {name: [one[name] for one in measured] for name in FIGURES if measured}
    return Seen(
        point,
        {name: median(found) for name, found in values.items()},
        {name: min(found) for name, found in values.items()},
        {name: max(found) for name, found in values.items()},
        {name: median(row["predicted"][name] for row in rows) for name in FIGURES},
        len(rows),
    )
