"""Reporter: phases and metrics of every step -> progress bar, metrics.jsonl, TensorBoard,
trajectories.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.config import TelemetryConfig
from rest_mega.telemetry.rows import EVENTS, METRICS, RUN, TRAJECTORIES, append, drop_after
from rest_mega.telemetry.timeline import Timeline

LIVE = (
    ("reward/mean", "reward {:.2f}"),
    ("success/train", "success {:.0%}"),
    ("tokens/s", "{:.0f} tok/s"),
    ("entropy/policy", "entropy {:.3f}"),
    ("entropy/TOOL_NAME", "name {:.2f}"),
    ("entropy/ARG_VALUE", "args {:.2f}"),
    ("entropy/REASONING", "think {:.2f}"),
    ("entropy/ANSWER", "answer {:.2f}"),
    ("train/loss", "loss {:+.3f}"),
)
"""Metrics shown on the console, in order, where a step has them; after the entropy of all tokens
that of the regions that tell most."""
BAR = "{desc:8} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Reporter:
    """Writes the run's files on the one active rank; on every other rank it only times phases."""

    def __init__(
        self,
        run_dir: Path,
        config: TelemetryConfig,
        *,
        total_steps: int,
        active: bool,
        resume_step: int | None = None,
        region_names: Sequence[str] = (),
        config_tree: Mapping[str, Any] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """`resume_step`: the step that a checkpoint resumed from; what was reported after it is
        dropped. `timeline`: of this rank, where it keeps one."""
        self._timeline, self._last_step = timeline, resume_step or 0
        self._active, self._dir, self._config = active, run_dir, config
        self._seconds: dict[str, float] = {}
        self._bar: Any = None
        self._board: Any = None
        self._started = time.perf_counter()
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TRAJECTORIES):
            drop_after(run_dir / name, -1 if resume_step is None else resume_step)
        (run_dir / RUN).write_text(
            json.dumps({"regions": list(region_names), "config": config_tree or {}}, indent=1)
        )
        self._open_console(total_steps, resume_step or 0)
        if config.tensorboard:
            self._board = _tensorboard(run_dir / "tensorboard", resume_step)

    def _open_console(self, total: int, done: int) -> None:
        live = self._config.console == "bar" or (
            self._config.console == "auto" and sys.stderr.isatty()
        )
        if live:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, bar_format=BAR, dynamic_ncols=True, smoothing=0.1
            )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; the seconds become `time/<name>` of the next reported step."""
        if self._bar is not None:
            self._bar.set_description_str(name)
        if self._timeline is not None:
            self._timeline.begin()
        begin, start = time.time(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            if self._timeline is not None:
                self._timeline.add(name, begin, seconds)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        trajectories: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Report one step (or an evaluation at a step) with the phases timed since the last
        report."""
        seconds, self._seconds = self._seconds, {}
        self._last_step = step
        if self._timeline is not None:
            self._timeline.flush(step)
        if not self._active:
            return
        row = dict(metrics) | {f"time/{name}": value for name, value in seconds.items()}
        if "tokens/trained" in row and seconds:
            row["tokens/s"] = row["tokens/trained"] / max(sum(seconds.values()), 1e-9)
        row["time/elapsed"] = time.perf_counter() - self._started
        append(self._dir / METRICS, [{"step": step} | {k: _finite(v) for k, v in row.items()}])
        append(self._dir / TRAJECTORIES, trajectories[: self._config.trajectories])
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._show(step, row)

    def _show(self, step: int, row: Mapping[str, float]) -> None:
        evaluation = {
            k: v for k, v in row.items() if k.startswith("eval/") and k.endswith("_success")
        }
        if evaluation:
            self._say(
                f"step {step}: held-out "
                + ", ".join(f"{_mode(k)} success {v:.1%}" for k, v in evaluation.items())
            )
        parts = [text.format(row[name]) for name, text in LIVE if name in row]
        if "train/loss" not in row:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._say(f"step {step}: " + ", ".join(parts))

    def event(self, kind: str, text: str) -> None:
        """Say something notable above the bar, and keep it in events.jsonl."""
        if self._active:
            append(self._dir / EVENTS, [{"time": time.time(), "kind": kind, "text": text}])
            self._say(text)

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Close the bar and the event files; what happened since the last step belongs to it."""
        if self._timeline is not None:
            self._timeline.flush(self._last_step)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None


def _mode(name: str) -> str:
    return name.removeprefix("eval/").removesuffix("_success")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # A new run in an old directory purges everything that was written there before.
    return SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)
