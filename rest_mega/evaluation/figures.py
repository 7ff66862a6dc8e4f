"""Numbers of an evaluation: pass@k, mean@k with its spread, kinds of failure, and the table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rest_mega.evaluation.suite import Result, Row, Z


def pass_at(k: int, samples: int, right: int) -> float:
    """Chance that at least one of k samples, drawn without replacement from `samples` of which
    `right` are right, is right: 1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al.
    (arXiv 2107.03374, equation 1).

    Raises ValueError unless 1 <= k <= samples and 0 <= right <= samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {right} right ones among {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def many_samples(results: Sequence[Result]) -> dict[str, Any]:
    """What several samples per task tell; empty where there is one.

    pass@k for k = 1, 2, 4, ... and all k; mean@k: the mean score with its standard error over
    tasks, and the standard deviation over draws (of the k scores that one sample per task would
    have given). Tasks with fewer samples than most are left out and counted in `unfinished`.
    """
    by_task: dict[str, dict[int, bool]] = {}
    for result in results:
        by_task.setdefault(result.task.prompt.id, {})[result.sample] = result.verdict.valid
    most = max((len(valid) for valid in by_task.values()), default=0)
    whole = [list(valid.values()) for valid in by_task.values() if len(valid) == most]
    if most < 2:
        return {}
    ks = sorted({most, *(2**n for n in range(most.bit_length()))})  # 2^n <= most
    means = [sum(valid) / most for valid in whole]
    draws = [statistics.fmean(one) for one in zip(*whole, strict=True)]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return {
        "samples": most,
        "pass_at": {k: statistics.fmean(pass_at(k, most, sum(v)) for v in whole) for k in ks},
        "mean_at": statistics.fmean(means),
        "standard_error": error,
        "deviation_over_draws": statistics.stdev(draws),
        "unfinished": len(by_task) - len(whole),
    }


def kinds(results: Sequence[Result]) -> dict[str, int]:
    """Kind of failure -> how many, the most frequent first."""
    counted = Counter(r.verdict.kind or "?" for r in results if not r.verdict.valid)
    return dict(counted.most_common())


def table(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The table of an evaluation as text: scores in per cent with their 95 % intervals, what
    several samples tell, and the kinds of failure."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  score   95 % interval   tasks"]
    for row in rows:
        interval = f"{100 * row.low:5.1f} .. {100 * row.high:5.1f}"
        lines.append(f"{row.name:{width}}  {100 * row.score:5.1f}  {interval}  {row.count:6}")
    lines += _sample_lines(many_samples(results))
    if failures := kinds(results):
        lines.append("failures: " + ", ".join(f"{kind} {n}" for kind, n in failures.items()))
    return "\n".join(lines) + "\n"


def _sample_lines(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    passed = ", ".join(f"pass@{k} {100 * v:.1f}" for k, v in found["pass_at"].items())
    mean = (
        f"mean@{found['samples']} {100 * found['mean_at']:.1f} "
        f"+- {100 * Z * found['standard_error']:.1f} (95 %, over tasks), "
        f"standard deviation over draws {100 * found['deviation_over_draws']:.1f}"
    )
    return [passed, mean]
