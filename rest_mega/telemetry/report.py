"""The run's files -> report.html: one self-contained page with curves and trajectories, and the
final line."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rest_mega.telemetry.reporter import METRICS, RUN, TRAJECTORIES, read_rows

MOST_TRAJECTORIES = 400
"""Trajectories embedded at most, spread evenly over the run."""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html; it needs no server and no network. Returns its path."""
    run = json.loads((run_dir / RUN).read_text())
    data = {
        "regions": run["regions"],
        "metrics": read_rows(run_dir / METRICS),
        "trajectories": _thin(read_rows(run_dir / TRAJECTORIES)),
        "outcome": outcome(run_dir),
        "title": str(run_dir),
        "config": run["config"],
    }
    page = (
        resources.files("rest_mega.telemetry").joinpath("report.html").read_text(encoding="utf-8")
    )
    page = page.replace("__TITLE__", html.escape(str(run_dir))).replace("__DATA__", embed(data))
    path = run_dir / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever text the model wrote."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _thin(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(rows) <= MOST_TRAJECTORIES:
        return list(rows)
    return [rows[i * len(rows) // MOST_TRAJECTORIES] for i in range(MOST_TRAJECTORIES)]


def outcome(run_dir: Path) -> dict[str, list[float]]:
    """Held-out success [first, last] per mode of sampling; empty when there was no evaluation."""
    found: dict[str, list[float]] = {}
    for row in read_rows(run_dir / METRICS):
        for name, value in row.items():
            if name.startswith("eval/") and name.endswith("_success") and value is not None:
                first = found.setdefault(
                    name.removeprefix("eval/").removesuffix("_success"), [value, value]
                )
                first[1] = value
    return found


def summary_line(run_dir: Path) -> str:
    """The one line at the end of a run: held-out success before and after, and where the report
    is."""
    changes = [f"{mode} {a:.1%} -> {b:.1%}" for mode, (a, b) in outcome(run_dir).items()]
    success = f"held-out success: {', '.join(changes)}; " if changes else ""
    return f"{success}report: {run_dir / 'report.html'}"
