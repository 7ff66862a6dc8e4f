"""Plays a benchmark's tasks on an engine, as a training rollout is played, and keeps every
verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rest_mega.config import EvaluationConfig, RolloutConfig, RunConfig, one_of, require
from rest_mega.data.bfcl_rows import split
from rest_mega.evaluation.results import Results
from rest_mega.evaluation.suite import Played, Suite, Task, chosen, open_suite, played_of
from rest_mega.rollout.collect import Collector, PromptTooLongError
from rest_mega.rollout.engine import Sampling

Tick = Callable[[], object]
"""Called once for every sample that is done."""


@dataclass(frozen=True)
class Benchmark:
    """A suite with the tasks of it that are asked for."""

    suite: Suite
    tasks: Sequence[Task]
    samples: int

    @property
    def pairs(self) -> list[tuple[Task, int]]:
        """Every sample to draw, the first of all tasks before the second of any."""
        return [(task, n) for n in range(self.samples) for task in self.tasks]


def open_benchmarks(config: EvaluationConfig) -> list[Benchmark]:
    """What `evaluation.suites` names; ConfigError for a suite, a category or data that is none."""
    for name in config.data:
        one_of("key of evaluation.data", name, config.suites)
    return [_open(name, categories, config) for name, categories in config.suites.items()]


def _open(name: str, categories: Sequence[str], config: EvaluationConfig) -> Benchmark:
    suite = open_suite(name, config.data.get(name, ""))
    tasks = suite.tasks(categories)
    if config.side == "test":
        tasks = [task for task in tasks if split(task.prompt.id) == "test"]
    tasks = chosen(tasks, config.limit, config.seed)
    require(bool(tasks), f"suite {name} has no task in {', '.join(categories) or 'its data'}")
    return Benchmark(suite, tasks, config.samples)


def sampling_of(config: EvaluationConfig) -> Sampling:
    """How replies are drawn."""
    if config.temperature == 0:
        return Sampling(greedy=True)
    return Sampling(config.temperature, config.top_p)


def rollout_of(suite: Suite, config: EvaluationConfig, rollout: RolloutConfig) -> RolloutConfig:
    """The limits of an episode of the suite."""
    return dataclasses.replace(
        rollout,
        max_turns=suite.max_turns,
        max_new_tokens=config.max_new_tokens or rollout.max_new_tokens,
        max_tokens=config.max_tokens or rollout.max_tokens,
    )


def settings_of(
    config: RunConfig, benchmark: Benchmark, chat_template: str, weights: str
) -> dict[str, Any]:
    """What decides the numbers: results belong together where it is the same. The categories, the
    limit and the number of samples are not part of it. `weights`: which of the model's."""
    evaluation, suite = config.evaluation, benchmark.suite
    limits = rollout_of(suite, evaluation, config.rollout)
    return {
        "suite": suite.name,
        "version": suite.version,
        "model": config.evaluation.endpoint.url or config.run.load or config.model.path,
        "weights": weights,
        "dtype": config.model.dtype,
        "dialect": suite.dialect or config.tokenizer.dialect,
        "mode": evaluation.endpoint.mode if evaluation.endpoint.url else config.rollout.engine,
        "chat_template": hashlib.blake2b(chat_template.encode(), digest_size=8).hexdigest(),
        "seed": evaluation.seed,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "max_turns": limits.max_turns,
        "max_new_tokens": limits.max_new_tokens,
        "max_tokens": limits.max_tokens,
    }


def play(
    collector: Collector,
    benchmark: Benchmark,
    pairs: Sequence[tuple[Task, int]],
    sampling: Sampling,
    seed: int,
    results: Results,
    *,
    together: int,
    tick: Tick,
) -> bool:
    """Draw and judge those of `pairs` that are not done; False when a stop was asked for.

    What is drawn depends on the seed, the task's id and the number of the sample. `together`: how
    many are begun at a time; an engine that decodes whole batches finishes none before all.
    """
    known = {task.prompt.id: task for task in benchmark.tasks}
    judge = judge_of(benchmark.suite, results, tick)

    def keep(_: str, trajectory: Any) -> None:
        played = played_of(trajectory, collector.dialect)
        judge(known[trajectory.prompt.id], trajectory.sibling, played)

    todo = [(task, n) for task, n in pairs if (task.prompt.id, n) not in results.done]
    for begin in range(0, len(todo), together):
        groups = []
        for task, sample in todo[begin : begin + together]:
            try:
                groups.append(collector.open(task.prompt, 1, f"benchmark/{seed}", sample))
            except PromptTooLongError as error:
                judge(task, sample, Played((), "prompt_length", note=str(error)))
        if not collector.play(groups, sampling, keep=keep):
            return False
    return True


def judge_of(suite: Suite, results: Results, tick: Tick) -> Callable[[Task, int, Played], None]:
    """Judges a sample and keeps it, from any thread; one at a time, for a benchmark's own checker
    may have state of its own."""
    lock = threading.Lock()

    def judge(task: Task, sample: int, played: Played) -> None:
        with lock:
            results.add(task, sample, played, suite.judge(task, played))
            tick()

    return judge
