"""One benchmark from its tasks to its files and metrics; all ranks together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_mega.config import EvaluationConfig, RolloutConfig
from rest_mega.evaluation.failures import write_failures
from rest_mega.evaluation.figures import kinds, many_samples, table
from rest_mega.evaluation.play import Benchmark, Tick, play, sampling_of
from rest_mega.evaluation.results import (
    Results,
    packages,
    read_samples,
    read_settings,
    results_of,
)
from rest_mega.rollout.collect import Collector

if TYPE_CHECKING:  # torch and megatron are not needed where an endpoint is evaluated
    from rest_mega.trainer.parallel import Parallel


def evaluate_benchmark(
    place: Parallel,
    collector: Collector | None,
    benchmark: Benchmark,
    config: EvaluationConfig,
    rollout: RolloutConfig,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    show: bool,
) -> dict[str, float]:
    """Play what is not done yet, and write the folder's report; metrics eval/<suite>/<row>, equal
    on all ranks, empty when a stop was asked for.

    Every player plays its share with its `collector`; other ranks pass none. `show`: a progress bar
    on the head.
    """
    stopped = False
    if collector is not None:
        results = Results(folder, settings, place.player)
        mine = benchmark.pairs[place.player :: len(place.players)]
        done = sum((task.prompt.id, n) in results.done for task, n in mine)
        with progress(benchmark, len(mine), done, show and place.is_head) as tick:
            sampling, together = sampling_of(config), _together(rollout)
            stopped = not play(
                collector, benchmark, mine, sampling, config.seed, results,
                together=together, tick=tick,
            )  # fmt: skip
    if place.sum_one(float(stopped)) > 0:
        return {}
    text = json.dumps(write_report(benchmark, folder) if place.is_head else {})
    return dict(json.loads(place.gather_text(text)[0]))


def _together(rollout: RolloutConfig) -> int:
    """Episodes begun at a time: as many as the engine decodes together."""
    if rollout.engine != "sglang":
        return rollout.batch_size
    servers = max(len(rollout.sglang.urls), rollout.sglang.servers)
    return 4 * rollout.sglang.in_flight * servers


@contextlib.contextmanager
def progress(benchmark: Benchmark, total: int, done: int, show: bool) -> Iterator[Tick]:
    """A bar on the terminal; a line now and then elsewhere."""
    from tqdm import tqdm

    name, interval = benchmark.suite.name, 0.1 if sys.stderr.isatty() else 60.0
    with tqdm(total=total, initial=done, desc=name, mininterval=interval, disable=not show) as bar:
        yield bar.update


def write_report(benchmark: Benchmark, folder: Path) -> dict[str, float]:
    """summary.json, table.txt and failures.html of what is done; the metrics."""
    rows = read_samples(folder)
    results = results_of(rows, benchmark.tasks)
    lines = benchmark.suite.summary(results)
    settings = read_settings(folder)
    summary = {
        "rows": [dataclasses.asdict(line) for line in lines],
        "samples": many_samples(results),
        "failures": kinds(results),
        "settings": settings,
        "packages": packages(),
    }
    text = table(lines, results)
    _write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    _write(folder / "table.txt", text)
    title = f"{benchmark.suite.name}: failures of {settings.get('model', '?')}"
    write_failures(folder / "failures.html", title, text, rows, benchmark.tasks)
    name = benchmark.suite.name
    return {f"eval/{name}/{line.name.replace(' ', '_')}": line.score for line in lines}


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
