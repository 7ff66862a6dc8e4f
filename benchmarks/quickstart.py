"""Held-out success before and after the quick-start, a row per run, as a Markdown table.

    for s in 0 1 2; do
      make quickstart ARGS="run.seed=$s run.dir=runs/quickstart/seed_$s run.fresh=true"
    done
    .venv/bin/python benchmarks/quickstart.py runs/quickstart/seed_*

Entropy is the mean of -log p of the sampled tokens in nats; the last column is the time from the
first phase to the last in minutes, evaluations included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rest_mega.telemetry.rows import METRICS, read_rows

NAMES = ("sampled_success", "greedy_success", "sampled_entropy")


def row(run: Path) -> dict[str, Any]:
    """First and last value of each evaluation metric of a run, and the minutes it took."""
    rows = read_rows(run / METRICS)
    if not any(f"eval/{NAMES[0]}" in r for r in rows):
        raise SystemExit(f"{run / METRICS} holds no evaluation: name folders of finished runs")
    found: dict[str, Any] = {"minutes": rows[-1]["time/elapsed"] / 60}
    for name in NAMES:
        values = [r[f"eval/{name}"] for r in rows if r.get(f"eval/{name}") is not None]
        found[name] = (values[0], values[-1])
    return found


def table(runs: Sequence[Path]) -> str:
    """The table, with the mean of the gains below."""
    lines = [
        "| run | sampled success | greedy success | entropy | minutes |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [row(run) for run in runs]
    for run, r in zip(runs, rows, strict=True):
        cells = [f"{a:.1%} -> {b:.1%}" for a, b in (r[NAMES[0]], r[NAMES[1]])]
        cells.append("{:.3f} -> {:.3f}".format(*r[NAMES[2]]))
        lines.append(f"| {run.name} | {' | '.join(cells)} | {r['minutes']:.1f} |")
    gains = [[100 * (r[n][1] - r[n][0]) for r in rows] for n in NAMES[:2]]
    spread = [f"+{statistics.mean(g):.1f} points (least +{min(g):.1f})" for g in gains]
    return "\n".join([*lines, f"| gain | {' | '.join(spread)} | | |"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    print(table(parser.parse_args().runs))


if __name__ == "__main__":
    main()
