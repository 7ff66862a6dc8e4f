"""Draws learning curves of runs side by side: success in training and on held-out tasks.

    .venv/bin/pip install matplotlib
    .venv/bin/python benchmarks/learning_curves.py --out curves.svg \
        embedded=runs/quickstart/seed_0,runs/quickstart/seed_1 sglang=runs/sglang_0

Lines are means over a label's runs (training: of five steps), bands reach from the lowest run to
the highest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.telemetry.rows import METRICS, read_rows

PANELS = {
    "success/train": "training, sampled",
    "eval/sampled_success": "held out, sampled",
    "eval/greedy_success": "held out, greedy",
}
WIDTH = 5
"""Training steps of which a point is the mean."""


def curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; training means over `WIDTH` steps."""
    rows = [r for r in read_rows(run / METRICS) if r.get(name) is not None]
    steps, values = [r["step"] for r in rows], [float(r[name]) for r in rows]
    if name == "success/train":
        starts = range(0, len(values) - WIDTH + 1, WIDTH)
        means = [float(np.mean(values[start : start + WIDTH])) for start in starts]
        return [steps[start + WIDTH - 1] for start in starts], means
    return steps, values


def draw(labels: Mapping[str, Sequence[Path]], out: Path) -> None:
    """A panel per metric, a colour per label."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rest_mega"  # the same runs give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 3.2), sharey=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for label, runs in labels.items():
            _line(axis, [curve(run, name) for run in runs], f"{label} ({len(runs)} runs)")
        axis.set(title=title, xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success")
    axes[0].legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def _line(axis: Any, curves: Sequence[tuple[list[int], list[float]]], label: str) -> None:
    steps = curves[0][0]
    values = np.array([dict(zip(*one, strict=True))[step] for one in curves for step in steps])
    values = values.reshape(len(curves), len(steps))
    (line,) = axis.plot(steps, values.mean(0), marker="o", markersize=3, label=label)
    axis.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("labels", nargs="+", help="LABEL=RUN[,RUN...]")
    parser.add_argument("--out", type=Path, required=True, help="an .svg file")
    given = parser.parse_args()
    pairs = [word.partition("=") for word in given.labels]
    draw({label: [Path(run) for run in runs.split(",")] for label, _, runs in pairs}, given.out)


if __name__ == "__main__":
    main()
