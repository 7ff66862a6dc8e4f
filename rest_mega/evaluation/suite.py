"""A benchmark as the runner sees it: tasks to play, a judge of what was played, rows of a table.

The runner plays a task's prompt as a training rollout is played (same collector, engine, tools), or
against an OpenAI-compatible endpoint, hands what came of it to `Suite.judge`, and keeps the
verdict. Prompt ids, output ids, texts and calls are kept by the runner: a verdict's `details` need
only hold what the suite alone knows (the decoded calls as its checker saw them, sub-scores).
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from rest_mega.config import one_of
from rest_mega.records import Prompt, Trajectory, Turn

Z = 1.959963984540054
"""Of two-sided 95 % intervals."""


@dataclass(frozen=True)
class Task:
    """One entry of a suite. `prompt.id` is unique in the suite."""

    prompt: Prompt
    """What the model is told: messages, tools (whole specs for the environment "none"), and where
    calls are answered the environment with its row."""
    category: str
    gold: Any = None
    """For the suite's judge alone."""
    source: str = ""
    """What the entry was made from; entries of one source are on one side of a train/test split.
    Empty: the prompt's id."""


@dataclass(frozen=True)
class Played:
    """One episode of a task, whatever played it."""

    turns: tuple[Turn, ...]
    """Assistant turns in order, with parsed calls and the answers they got. An empty tuple: the
    prompt was longer than the model's context, and nothing was sampled."""
    stop: str
    """As in records.Trajectory: answered | turn_limit | token_limit | length; or prompt_length
    (nothing was sampled) and failed (an endpoint refused the request)."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """The environment's verdict; empty for environments that do not judge."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of the prompt; empty where an endpoint does not tell them."""
    output_ids: tuple[tuple[int, ...], ...] = ()
    """Sampled tokens of each turn; empty where an endpoint does not tell them."""
    note: str = ""
    """Why nothing was sampled."""
    dialect: str = ""
    """In which the turns' texts were read; empty: their calls came as such from an endpoint."""


@dataclass(frozen=True)
class Verdict:
    """What the judge found."""

    valid: bool
    kind: str = ""
    """Kind of failure, a short name by which failures are grouped; empty when valid."""
    reason: str = ""
    """The checker's words."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For the audit; plain JSON."""


@dataclass(frozen=True)
class Result:
    """The verdict on one sample of one task."""

    task: Task
    sample: int
    """0..k-1, the number of the draw."""
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One line of the table: a share with its 95 % interval, all in [0, 1]."""

    name: str
    score: float
    low: float
    high: float
    count: int
    """Tasks in it."""


class Suite(Protocol):
    """A benchmark, pinned. Opening one reads and checks its data; ConfigError with file and line
    for a bad one."""

    name: str
    version: str
    """What was pinned: package and version, or digest of the data; kept with every result."""
    dialect: str
    """Dialect that the prompts demand; empty: the policy's own."""
    max_turns: int
    """Assistant turns of one episode at most."""

    def categories(self) -> tuple[str, ...]:
        """All categories, in the order of the table."""

    def tasks(self, categories: Sequence[str] = ()) -> list[Task]:
        """The tasks of these categories (all unless given), in the order of the data. ConfigError
        for an unknown one."""

    def judge(self, task: Task, played: Played) -> Verdict:
        """The verdict on one episode; never raises for anything that a model may write."""

    def summary(self, results: Sequence[Result]) -> list[Row]:
        """A row for each category that has results, then the overall scores, as the benchmark's
        authors compute them (use `share` and `mean`)."""


SUITES: Mapping[str, str] = MappingProxyType(
    {
        "api-bank": "rest_mega.evaluation.api_bank:ApiBank",
        "bfcl": "rest_mega.evaluation.bfcl_suite:Bfcl",
        "bfcl-prompt": "rest_mega.evaluation.bfcl_suite:BfclPrompt",
    }
)
"""Name -> "module:factory"; the factory takes the path of the data (empty: the suite's own)."""


def open_suite(name: str, data: str = "") -> Suite:
    """The suite of that name. ConfigError where the name, the data or a package is missing."""
    one_of("suite", name, SUITES)
    module, _, factory = SUITES[name].partition(":")
    make: Callable[[str], Suite] = getattr(importlib.import_module(module), factory)
    return make(data)


def chosen(tasks: Sequence[Task], limit: int, seed: int) -> list[Task]:
    """At most `limit` tasks of each category (0: all), in their order.

    Drawn by a hash of (seed, id): a smaller limit's tasks are among a larger one's, whatever else
    the suite has.
    """
    if limit == 0:
        return list(tasks)
    kept: set[str] = set()
    for category in dict.fromkeys(task.category for task in tasks):
        ids = [task.prompt.id for task in tasks if task.category == category]
        kept.update(sorted(ids, key=lambda name: _rank(seed, name))[:limit])
    return [task for task in tasks if task.prompt.id in kept]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()


def played_of(trajectory: Trajectory, dialect: str = "") -> Played:
    """A trajectory as the judge sees it, with the dialect of its replies."""
    ids = trajectory.ids_T.tolist()
    first = trajectory.turns[0].start if trajectory.turns else len(ids)
    return Played(
        turns=trajectory.turns,
        stop=trajectory.stop,
        result=trajectory.result,
        prompt_ids=tuple(ids[:first]),
        output_ids=tuple(tuple(ids[turn.start : turn.end]) for turn in trajectory.turns),
        dialect=dialect,
    )


def share(name: str, results: Sequence[Result]) -> Row:
    """Share of valid samples. One sample per task: Wilson's interval (1927); several: the mean over
    tasks of each task's share, with its normal interval, for samples of one task are alike.

    Raises ValueError where there are no results.
    """
    by_task: dict[str, list[bool]] = {}
    for result in results:
        by_task.setdefault(result.task.prompt.id, []).append(result.verdict.valid)
    if not by_task:
        raise ValueError(f"{name}: there are no results to take a share of")
    means = [sum(valid) / len(valid) for valid in by_task.values()]
    score, count = sum(means) / len(means), len(means)
    if len(results) == count:
        return Row(name, score, *wilson(score, count), count)
    error = Z * math.sqrt(sum((m - score) ** 2 for m in means) / max(count - 1, 1) / count)
    return Row(name, score, max(0.0, score - error), min(1.0, score + error), count)


def wilson(score: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent samples (Wilson, JASA 22, 1927)."""
    centre = score + Z * Z / (2 * count)
    spread = Z * math.sqrt(score * (1 - score) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean(name: str, rows: Sequence[Row], weights: Sequence[float] = ()) -> Row:
    """Weighted mean of independent rows (equal weights unless given). Its interval adds the rows'
    half widths in squares, on each side by itself.

    Raises ValueError where there are no rows, or the weights do not fit them.
    """
    given = list(weights) or [1.0] * len(rows)
    if not rows or len(given) != len(rows) or sum(given) <= 0:
        raise ValueError(f"{name}: {len(rows)} rows and weights {given} make no mean")
    parts = [weight / sum(given) for weight in given]
    score = sum(p * row.score for p, row in zip(parts, rows, strict=True))
    below = math.hypot(*(p * (r.score - r.low) for p, r in zip(parts, rows, strict=True)))
    above = math.hypot(*(p * (r.high - r.score) for p, r in zip(parts, rows, strict=True)))
    return Row(name, score, score - below, score + above, sum(row.count for row in rows))
