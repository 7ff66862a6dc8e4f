"""The console: a line per step for logs, or a live display of two lines that fits the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rest_mega.telemetry.sinks import Sink

LIVE = (
    ("reward/mean", "reward {:.2f}"),
    ("success/train", "success {:.0%}"),
    ("tokens/s", "{:.0f} tok/s"),
    ("train/loss", "loss {:+.3f}"),
    ("entropy/policy", "entropy {:.3f}"),
    ("entropy/TOOL_NAME", "name {:.2f}"),
    ("entropy/ARG_VALUE", "args {:.2f}"),
    ("entropy/REASONING", "think {:.2f}"),
    ("entropy/ANSWER", "answer {:.2f}"),
)
"""Metrics shown, in order, where a step has them and the line has room; after the entropy of all
tokens that of the regions that tell most."""
BAR = "{desc:8} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}"


def lines_of(step: int, row: Mapping[str, Any]) -> list[str]:
    """A reported row in words: held-out success where it was measured, a step's metrics."""
    lines = []
    names = [n for n in row if n.startswith("eval/") and n.endswith("_success")]
    if found := [f"{_mode(n)} success {row[n]:.1%}" for n in names if row[n] is not None]:
        lines.append(f"step {step}: held-out " + ", ".join(found))
    if "train/loss" in row:
        lines.append(f"step {step}: " + ", ".join(parts_of(row)))
    return lines


def parts_of(row: Mapping[str, Any]) -> list[str]:
    """Each metric of LIVE that the row has, in words."""
    return [text.format(row[name]) for name, text in LIVE if row.get(name) is not None]


def fitting(parts: Sequence[str], columns: int) -> str:
    """As many of the parts, from the first, as fit into so many columns."""
    line = ""
    for part in parts:
        longer = f"{line} {part}" if line else part
        if len(longer) > columns:
            break
        line = longer
    return line


def open_console(kind: str, total: int, done: int) -> Sink:
    """`kind`: telemetry.console; `total` steps of which `done` are."""
    live = kind == "bar" or (kind == "auto" and sys.stderr.isatty())
    return Live(total, done) if live else Plain()


class Plain(Sink):
    """A line per step and per event, on stderr."""

    def step(self, step: int, row: Mapping[str, Any], trajectories: Sequence[Any] = ()) -> None:
        """Say what the row has."""
        for line in lines_of(step, row):
            self.event("step", line)

    def event(self, kind: str, text: str) -> None:
        """Say it."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Live(Sink):
    """Progress and phase in one line, the newest step's metrics in another; events above them."""

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total, initial=done, bar_format=BAR, dynamic_ncols=True, smoothing=0.1
        )
        self._text: Any = tqdm(total=0, position=1, bar_format="{desc}", dynamic_ncols=True)

    def phase(self, name: str) -> None:
        """Show that it begins."""
        self._bar.set_description_str(name)

    def step(self, step: int, row: Mapping[str, Any], trajectories: Sequence[Any] = ()) -> None:
        """Evaluations stay on the screen, the metrics of a step until the next."""
        for line in lines_of(step, row):
            if "held-out" in line:
                self.event("step", line)
        if "train/loss" in row:
            self._text.set_description_str(fitting(parts_of(row), _columns() - 1))
            self._bar.update(step - self._bar.n)

    def event(self, kind: str, text: str) -> None:
        """Say it above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._text.close()
        self._bar.close()


def _columns() -> int:
    """Of the terminal behind stderr; 80 where it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


def _mode(name: str) -> str:
    return name.removeprefix("eval/").removesuffix("_success")
