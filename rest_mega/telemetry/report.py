"""`rest-mega report`: the files of runs -> one self-contained page with curves, timelines and
trajectories; and the final line of a run."""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rest_mega.config import require
from rest_mega.telemetry.columns import pack
from rest_mega.telemetry.profiler import merge
from rest_mega.telemetry.report_data import read_run
from rest_mega.telemetry.rows import METRICS, read_rows

REPORT = "report.html"
SCRIPTS = ("data.js", "draw.js", "charts.js", "timeline.js", "tokens.js", "trajectories.js",
           "main.js")  # fmt: skip
"""Of the page, in the order in which they stand in it."""
MOST_RUNS = 8


def main(words: Sequence[str]) -> int:
    """Write the report of the runs named; returns the exit code. ConfigError for a folder that is
    no run."""
    parser = argparse.ArgumentParser(
        prog="rest-mega report",
        description="One page of a run, or of several side by side, that needs neither server nor "
        "network; a run that is still going may be looked at too.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("--output", type=Path, help="default: report.html in the first RUN, or "
                        "compare.html for several")  # fmt: skip
    given = parser.parse_args(list(words))
    name = REPORT if len(given.runs) == 1 else "compare.html"
    for run in given.runs:
        merge(run)  # a run that is not over has not done so yet
    path = write_report(*given.runs, path=given.output or given.runs[0] / name)
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


def write_report(*run_dirs: Path, path: Path | None = None) -> Path:
    """Write the page of these runs to `path` (default: into the first); returns its path.

    ConfigError where one is no run directory.
    """
    require(
        len(run_dirs) <= MOST_RUNS, f"{len(run_dirs)} runs do not fit into one page; give at most "
        f"{MOST_RUNS}",
    )  # fmt: skip
    runs = [read_run(run_dir) | {"outcome": outcome(run_dir)} for run_dir in run_dirs]
    path = path or run_dirs[0] / REPORT
    partial = path.with_name(path.name + ".partial")
    title = " | ".join(map(str, run_dirs))
    partial.write_text(page(title, pack({"runs": runs})), encoding="utf-8")
    os.replace(partial, path)
    return path


def page(title: str, data: str) -> str:
    """The page with its style, its scripts and its data in it."""
    folder = resources.files("rest_mega.telemetry").joinpath("page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    parts = {
        "/*STYLE*/": read("page.css"),
        "/*SCRIPTS*/": "\n".join(map(read, SCRIPTS)),
        "<!--TITLE-->": html.escape(title),
        "<!--DATA-->": data,
    }
    text = read("page.html")
    for place, part in parts.items():
        before, after = text.split(place)
        text = before + part + after
    return text


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
    return f"{success}report: {run_dir / REPORT}"
