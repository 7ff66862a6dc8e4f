"""A run's files -> what the report shows of it, as columns: metrics, timelines, trajectories.

Long runs are thinned evenly; `shown` and `of` say so. Tokens are numbers into `vocabulary`, and
what is known of sampled tokens alone is kept for these alone, as float16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.config import ConfigError
from rest_mega.telemetry.rows import METRICS, RUN, TRAJECTORIES, WRITTEN, read_rows
from rest_mega.telemetry.timeline import read_timelines

MOST_ROWS, MOST_SPANS, MOST_TRAJECTORIES, MOST_TOKENS = 4_000, 60_000, 1_000, 2_000_000
"""Of a run in the report, at most: rows of metrics, phases of all ranks, trajectories, tokens."""

TOKEN_COLUMNS = {
    "logprob": "logprob",
    "weight": "weight",
    "token_gap": "gap",
    "entropy": "entropy",
    "token_advantage": "advantage",
}
"""Of sampled tokens, where the run knows them: name in the page -> name in a row's `sampled`."""


def read_run(run_dir: Path) -> dict[str, Any]:
    """Everything the report has of one run; ConfigError where the directory is no run's."""
    try:
        run = json.loads((run_dir / RUN).read_text(encoding="utf-8"))
        about = {"regions": run["regions"], "config": run["config"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run_dir} is no run directory: its {RUN} says {error!r}; name the run.dir of a run"
        ) from error
    return about | {
        "title": str(run_dir),
        "metrics": metric_columns(read_rows(run_dir / METRICS)),
        "timelines": [span_columns(*one) for one in _thin_spans(read_timelines(run_dir))],
        "trajectories": trajectory_columns(*_read_trajectories(run_dir / TRAJECTORIES)),
    }


def spread(count: int, most: int) -> list[int]:
    """`most` of 0..count-1, evenly, the last always one of them; all where they are no more."""
    if count <= most:
        return list(range(count))
    return [(i + 1) * count // most - 1 for i in range(most)]


# ------------------------------------------------------------------ metrics


def metric_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Step of every row, and a float32 column per metric, NaN where a row has none."""
    plain = [row for row in rows if "train/loss" in row]
    other = [row for row in rows if "train/loss" not in row]
    kept = [part[i] for part in (plain, other) for i in spread(len(part), MOST_ROWS)]
    kept.sort(key=lambda row: int(row["step"]))
    names = sorted({name for row in kept for name in row if name not in ("step", WRITTEN)})
    return {
        "step": np.array([row["step"] for row in kept], np.int32),
        "columns": {name: _floats((row.get(name) for row in kept), np.float32) for name in names},
    }


def _floats(values: Any, dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.array([math.nan if v is None else v for v in values], np.float64).astype(dtype)


# ------------------------------------------------------------------ timelines


def _thin_spans(timelines: Sequence[tuple[Any, Sequence[Any]]]) -> list[tuple[Any, list[Any]]]:
    """The phases of as many steps, evenly spread, as fit."""
    steps = sorted({row["step"] for _, phases in timelines for row in phases})
    total = sum(len(phases) for _, phases in timelines)
    most = len(steps) * MOST_SPANS // max(total, MOST_SPANS)
    kept = {steps[i] for i in spread(len(steps), most)} if most else set()
    return [(who, [row for row in phases if row["step"] in kept]) for who, phases in timelines]


def span_columns(who: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rank's phases: `start` in seconds since the epoch; `wait_*` of its waits, `wait_of` the
    index of the phase."""
    names = sorted({str(row["phase"]) for row in phases})
    waits = [(i, at, s) for i, row in enumerate(phases) for at, s in row.get("waits", ())]
    return {
        **{name: who[name] for name in ("rank", "place", "host")},
        "names": names,
        "name": np.array([names.index(row["phase"]) for row in phases], np.uint8),
        "step": np.array([row["step"] for row in phases], np.int32),
        "start": np.array([row["start"] for row in phases], np.float64),
        "seconds": np.array([row["seconds"] for row in phases], np.float32),
        "wait_of": np.array([i for i, _, _ in waits], np.uint32),
        "wait_at": np.array([at for _, at, _ in waits], np.float32),
        "wait_seconds": np.array([s for _, _, s in waits], np.float32),
    }


# ------------------------------------------------------------------ trajectories


def _read_trajectories(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows that are shown, how many there are); of a large file only those are parsed."""
    if not path.is_file():
        return [], 0
    with path.open("rb") as file:
        count = sum(1 for line in file if line.endswith(b"\n"))
    most, rows = MOST_TRAJECTORIES, list[dict[str, Any]]()
    while most:
        chosen = set(spread(count, most))
        with path.open("rb") as file:
            rows = [json.loads(line) for i, line in enumerate(file) if i in chosen]
        if sum(len(row["text"]) for row in rows) <= MOST_TOKENS:
            break
        most = min(most, len(rows)) // 2
    return rows, count


def trajectory_columns(rows: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """A column per fact of a trajectory, and all tokens one after another; `token_at` and
    `sampled_at` say where those of each begin, one more than there are trajectories."""
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(text, len(numbers)) for row in rows for text in row["text"]]
    parts = sorted({name for row in rows for name in row["parts"]})
    sampled = {name: _sampled(rows, key) for name, key in TOKEN_COLUMNS.items()}
    return {
        "shown": len(rows),
        "of": total,
        "vocabulary": list(numbers),
        "step": np.array([row["step"] for row in rows], np.int32),
        "prompt": [row["prompt"] for row in rows],
        "kind": [row["kind"] for row in rows],
        "sibling": np.array([row["sibling"] for row in rows], np.int32),
        "reward": _each(rows, lambda row: row["reward"]),
        "parts": {
            name: _floats((r["parts"].get(name) for r in rows), np.float32) for name in parts
        },
        "advantage": _each(rows, lambda row: row["advantage"]),
        "success": np.array([{True: 1, False: 0}.get(row["success"], -1) for row in rows], np.int8),
        "stop": [row["stop"] for row in rows],
        "gap": _each(rows, _largest_gap),
        "flags": np.array([_flags(row) for row in rows], np.uint8),
        "turns": [json.dumps(row["turns"], ensure_ascii=False) for row in rows],
        "token_at": _starts([len(row["text"]) for row in rows]),
        "sampled_at": _starts([len(row["sampled"]["logprob"]) for row in rows]),
        "id": np.array(ids, np.uint16 if len(numbers) < 2**16 else np.uint32),
        "region": _joined(rows, "region", np.uint8),
        "turn": _joined(rows, "turn", np.int16),
        **{name: column for name, column in sampled.items() if not np.isnan(column).all()},
    }


MALFORMED, FAILED_CALL, TRUNCATED = 1, 2, 4
"""Bits of `flags`."""


def _flags(row: Mapping[str, Any]) -> int:
    malformed = not all(turn["well_formed"] for turn in row["turns"])
    failed = any(o["status"] != "ok" for turn in row["turns"] for o in turn["outcomes"])
    truncated = bool(row["stop"] != "answered")
    return MALFORMED * malformed | FAILED_CALL * failed | TRUNCATED * truncated


def _largest_gap(row: Mapping[str, Any]) -> float | None:
    """Largest |trainer - engine| of its tokens, in nats; None where none was trained."""
    return max((abs(gap) for gap in row["sampled"].get("gap", ()) if gap is not None), default=None)


def _each(rows: Sequence[Mapping[str, Any]], of: Callable[[Any], float | None]) -> Any:
    return _floats((of(row) for row in rows), np.float32)


def _starts(lengths: Sequence[int]) -> Any:
    return np.cumsum([0, *lengths]).astype(np.uint32)


def _joined(rows: Sequence[Mapping[str, Any]], name: str, dtype: Any) -> Any:
    return np.array([value for row in rows for value in row[name]], dtype)


def _sampled(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The column of all sampled tokens, NaN for those of a trajectory that lacks it."""
    missing = ([None] * len(row["sampled"]["logprob"]) for row in rows)
    columns = [row["sampled"].get(name) or none for row, none in zip(rows, missing, strict=True)]
    return _floats((value for column in columns for value in column), np.float16)
