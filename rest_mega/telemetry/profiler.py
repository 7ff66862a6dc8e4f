"""Profiler: in a window of steps, torch's traces of phases, and all ranks' pipelines in one trace.

    RUN/profile/rank_N.step_S.PHASE.json    torch's own trace of a phase: operators, kernels
    RUN/profile/rank_N.jsonl                phases, micro-batches, sends and receives of a rank
    RUN/profile/pipeline.json               those of all ranks, by rank 0's clock

The .json files are Chrome traces: open them in ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rest_mega.config import ProfileConfig
from rest_mega.telemetry.rows import append, read_rows

PROFILE, PIPELINE = "profile", "pipeline.json"


class Profiler:
    """Of one rank. megatron-core calls it as its timers: `profiler(name).start()`, `.stop()`."""

    def __init__(
        self,
        run_dir: Path,
        config: ProfileConfig,
        rank: int,
        place: str,
        *,
        step: int = 0,
        clock_offset: float = 0.0,
        on_gpu: bool = False,
    ) -> None:
        """`place`: the rank in words; `step`: the last that is over; `clock_offset`: how far this
        rank's clock is ahead of rank 0's, in seconds."""
        self._folder, self._config, self._rank, self._place = run_dir / PROFILE, config, rank, place
        self._offset, self._on_gpu = clock_offset, on_gpu
        self._begun: dict[str, float] = {}
        self._spans: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}
        if config.window:
            self._folder.mkdir(parents=True, exist_ok=True)
            if step < config.window[0]:  # otherwise a resumed run goes on with it
                (self._folder / f"rank_{rank}.jsonl").unlink(missing_ok=True)
        self.reached(step)

    def reached(self, step: int) -> None:
        """`step` is over: write what it brought; the next may be in the window."""
        append(self._folder / f"rank_{self._rank}.jsonl", self._spans)
        self._spans, self._counts, self._step = [], {}, step + 1
        window = self._config.window
        self.open = bool(window) and window[0] <= self._step <= window[-1]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the run: a span, torch's trace of it where the config asks for one, on a GPU
        an NVTX range."""
        with self._nvtx(name), self._torch(name):
            self.start(name)
            try:
                yield
            finally:
                self.stop(name)

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        """megatron-core's timer of that name."""
        return Timer(self, name)

    def start(self, name: str) -> None:
        """A span begins."""
        if self.open:
            self._begun[name] = self._now()

    def stop(self, name: str) -> None:
        """The span ends."""
        begin = self._begun.pop(name, None)
        if begin is not None and self.open:
            span = {"step": self._step, "name": name, "start": begin - self._offset}
            self._spans.append(span | {"seconds": self._now() - begin, "place": self._place})

    def _now(self) -> float:
        """Once what was asked of the GPU is done: its work belongs to the span that asked."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.time()

    @contextlib.contextmanager
    def _nvtx(self, name: str) -> Iterator[None]:
        if not self._on_gpu:
            yield
            return
        import torch

        with torch.cuda.nvtx.range(f"rest_mega {name}"):
            yield

    @contextlib.contextmanager
    def _torch(self, name: str) -> Iterator[None]:
        if not self.open or name not in self._config.phases:
            yield
            return
        from torch.profiler import ProfilerActivity, profile

        number = self._counts[name] = self._counts.get(name, 0) + 1
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        with profile(activities=kinds) as trace:
            yield
        again = f".{number}" if number > 1 else ""
        file = f"rank_{self._rank}.step_{self._step}.{name}{again}.json"
        trace.export_chrome_trace(str(self._folder / file))


class Spans(Protocol):
    """What keeps the spans of megatron-core's timers."""

    def start(self, name: str) -> None:
        """A span begins."""

    def stop(self, name: str) -> None:
        """The span ends."""


class Timer:
    """One of megatron-core's timers: starts and stops the spans of its name."""

    def __init__(self, spans: Spans, name: str) -> None:
        self._spans, self._name = spans, name

    def start(self, barrier: bool = False) -> None:
        """A barrier would hide who waits for whom: there is none."""
        self._spans.start(self._name)

    def stop(self, barrier: bool = False) -> None:
        """The end."""
        self._spans.stop(self._name)


def merge(run_dir: Path) -> Path | None:
    """Write RUN/profile/pipeline.json from the spans of all ranks; None where there are none."""
    events: list[Mapping[str, Any]] = []
    for file in sorted((run_dir / PROFILE).glob("rank_*.jsonl")):
        rank, rows = int(file.stem.split("_")[1]), read_rows(file)
        events += [_event(rank, row) for row in rows]
        if rows:
            about = {"name": f"rank {rank}: {rows[0]['place']}"}
            events.append({"ph": "M", "name": "process_name", "pid": rank, "args": about})
            events.append(
                {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
            )
    if not events:
        return None
    path = run_dir / PROFILE / PIPELINE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    os.replace(partial, path)
    return path


def _event(rank: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A complete event; microseconds."""
    return {
        "ph": "X",
        "name": row["name"],
        "pid": rank,
        "tid": 0,
        "ts": 1e6 * row["start"],
        "dur": 1e6 * row["seconds"],
        "args": {"step": row["step"]},
    }
