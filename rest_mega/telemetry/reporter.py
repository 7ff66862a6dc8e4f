"""Reporter: phases and metrics of every step -> console, files, trackers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.config import TelemetryConfig
from rest_mega.telemetry import sinks
from rest_mega.telemetry.console import open_console
from rest_mega.telemetry.profiler import Profiler
from rest_mega.telemetry.rows import METRICS, RUN, TRAJECTORIES, drop_after
from rest_mega.telemetry.timeline import Timeline


class Reporter:
    """Hands the run's news to its sinks on the one active rank; on every other rank it only times
    phases."""

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
        profiler: Profiler | None = None,
    ) -> None:
        """`resume_step`: the step that a checkpoint resumed from; what was reported after it is
        dropped. `timeline`, `profiler`: of this rank. ConfigError where a tracker cannot be
        reached."""
        self._timeline, self._last_step = timeline, resume_step or 0
        self._profiler = profiler
        self._seconds: dict[str, float] = {}
        self._sinks: dict[str, sinks.Sink] = {}
        self._started = time.perf_counter()
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TRAJECTORIES):
            drop_after(run_dir / name, -1 if resume_step is None else resume_step)
        tree = config_tree or {}
        (run_dir / RUN).write_text(
            json.dumps({"regions": list(region_names), "config": tree}, indent=1)
        )
        self._trackers = sinks.open_trackers(run_dir, config, tree, resume_step)
        self._sinks = {
            "console": open_console(config.console, total_steps, resume_step or 0),
            "files": sinks.Files(run_dir, config.trajectories),
            **self._trackers,
        }

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; the seconds become `time/<name>` of the next reported step."""
        self._tell(lambda sink: sink.phase(name))
        watched = self._profiler.phase(name) if self._profiler else contextlib.nullcontext()
        with watched, self._timed(name):
            yield

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
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
        if self._profiler is not None:
            self._profiler.reached(step)
        row = dict(metrics) | {f"time/{name}": value for name, value in seconds.items()}
        if "tokens/trained" in row and seconds:
            row["tokens/s"] = row["tokens/trained"] / max(sum(seconds.values()), 1e-9)
        row["time/elapsed"] = time.perf_counter() - self._started
        known = sinks.finite(row)
        self._tell(lambda sink: sink.step(step, known, trajectories))

    def event(self, kind: str, text: str) -> None:
        """Say something notable, and keep it in events.jsonl."""
        self._tell(lambda sink: sink.event(kind, text))

    def close(self) -> None:
        """Close the sinks; what happened since the last step belongs to it."""
        if self._timeline is not None:
            self._timeline.flush(self._last_step)
        self._tell(lambda sink: sink.close())
        self._sinks = {}

    def _tell(self, what: Callable[[sinks.Sink], None]) -> None:
        """Every sink. A tracker that fails is left out from here on, and an event says so: a server
        that is gone must not end a run."""
        for name, sink in list(self._sinks.items()):
            try:
                what(sink)
            except Exception as error:
                if name not in self._trackers:
                    raise
                del self._sinks[name]
                self.event("tracker", f"{name} gets nothing more of this run: {error!r}")
