"""Two evaluations of the same tasks: is the difference more than luck?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_mega.config import require
from rest_mega.evaluation.results import key_of
from rest_mega.evaluation.suite import Z


@dataclass(frozen=True)
class Comparison:
    """B against A on the tasks that both have."""

    tasks: int
    samples: int
    """Of each task."""
    score_a: float
    score_b: float
    better: int
    """Tasks on which B scores higher."""
    worse: int
    p: float
    """Two-sided, that B is as good as A."""
    low: float
    """95 % interval of score_b - score_a."""
    high: float
    left_out: int
    """Tasks or samples that only one of the two has."""


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of McNemar's test: `better` and `worse` of the pairs that differ, as
    tosses of a fair coin (McNemar, Psychometrika 12, 1947; the exact form is the sign test)."""
    count = better + worse
    tail = sum(math.comb(count, n) for n in range(min(better, worse) + 1))
    return float(min(1.0, 2 * tail / 2**count))


def difference(better: int, worse: int, count: int) -> tuple[float, float]:
    """95 % interval of (better - worse) / count, of `count` pairs of right or wrong: Wald's with
    half a pair added to each of the four cells (Agresti and Min, Statistics in Medicine 24,
    2005)."""
    total, b, w = count + 2, better + 0.5, worse + 0.5
    centre = (b - w) / total
    error = Z * math.sqrt(max(b + w - (b - w) ** 2 / total, 0.0)) / total
    return max(-1.0, centre - error), min(1.0, centre + error)


def compare(rows_a: Sequence[Mapping[str, Any]], rows_b: Sequence[Mapping[str, Any]]) -> Comparison:
    """Compare the samples that both have. With one per task: McNemar's exact test and Agresti and
    Min's interval. With several: the exact sign test over tasks whose shares differ, and the
    normal interval of the mean difference over tasks.

    Raises ConfigError where they share no sample.
    """
    a, b = _valid(rows_a), _valid(rows_b)
    shared = sorted(a.keys() & b.keys())
    require(bool(shared), "the two evaluations share no sample: compare results of the same tasks")
    means_a, means_b = _means(a, shared), _means(b, shared)
    gaps = [means_b[task] - means_a[task] for task in means_a]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    low, high = difference(better, worse, len(gaps)) if len(gaps) == len(shared) else _normal(gaps)
    return Comparison(
        tasks=len(gaps),
        samples=max(n for _, n in shared) + 1,
        score_a=statistics.fmean(means_a.values()),
        score_b=statistics.fmean(means_b.values()),
        better=better,
        worse=worse,
        p=mcnemar(better, worse),
        low=low,
        high=high,
        left_out=len(a.keys() ^ b.keys()),
    )


def _valid(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], bool]:
    return {key_of(row): bool(row["valid"]) for row in reversed(rows)}


def _means(
    valid: Mapping[tuple[str, int], bool], keys: Sequence[tuple[str, int]]
) -> dict[str, float]:
    by_task: dict[str, list[bool]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(valid[key])
    return {task: sum(found) / len(found) for task, found in by_task.items()}


def _normal(gaps: Sequence[float]) -> tuple[float, float]:
    centre = statistics.fmean(gaps)
    if len(gaps) < 2:
        return -1.0, 1.0
    error = Z * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return max(-1.0, centre - error), min(1.0, centre + error)
