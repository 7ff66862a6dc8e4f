"""Shares of right answers per category -> the scores of BFCL's leaderboard.

Source: generate_leaderboard_csv of bfcl-eval 2026.3.23, eval_checker/eval_runner_helper.py. There a
category that was not measured counts as 0; here a score is missing unless all that it is made of
was measured. The one exception is the overall score: its agentic categories (web search, memory; 40
of 100 points) need the internet and other judges, and count as 0 as they do there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Share = tuple[int, int]
"""(right, of how many); of at least one."""

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
MULTI_TURN = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
)
IRRELEVANCE = ("irrelevance", "live_irrelevance")
CATEGORIES = (*NON_LIVE, "irrelevance", *LIVE, "live_irrelevance", "live_relevance", *MULTI_TURN)
"""All that are judged here: the leaderboard's but for the agentic ones."""
POINTS = {"Non-Live": 10, "Live": 10, "Irrelevance": 10, "Multi-Turn": 30, "agentic": 40}
"""What the parts of the overall score weigh."""


def leaderboard(shares: Mapping[str, Share]) -> dict[str, float]:
    """Score in 0..1 by its name on the leaderboard, of those whose categories are all in `shares`;
    `Overall without agentic` is what is measured here, of its 60 points."""
    rate = {category: right / count for category, (right, count) in shares.items()}
    found = {
        name: score(shares, rate)
        for name, (categories, score) in _SCORES.items()
        if rate.keys() >= {*categories}
    }
    parts = [name for name in POINTS if name in found]
    if len(parts) + 1 == len(POINTS):
        points = sum(POINTS[name] * found[name] for name in parts)
        found["Overall"] = points / sum(POINTS.values())
        found["Overall without agentic"] = points / sum(POINTS[name] for name in parts)
    return found


Rates = Mapping[str, float]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of(categories: Sequence[str]) -> Callable[[Mapping[str, Share], Rates], float]:
    """Every category counts alike (calculate_unweighted_accuracy)."""
    return lambda _, rate: _mean([rate[category] for category in categories])


def _non_live(_: Mapping[str, Share], rate: Rates) -> float:
    """The three simple categories together count as one."""
    return _mean([_mean([rate[c] for c in SIMPLE]), *(rate[c] for c in NON_LIVE[len(SIMPLE) :])])


def _live(shares: Mapping[str, Share], _: Rates) -> float:
    """Every sample counts alike (calculate_weighted_accuracy)."""
    right, count = (sum(numbers) for numbers in zip(*(shares[c] for c in LIVE), strict=True))
    return right / count


_SCORES: Mapping[str, tuple[Sequence[str], Callable[[Mapping[str, Share], Rates], float]]] = {
    "Non-Live Simple": (SIMPLE, _mean_of(SIMPLE)),
    "Non-Live": (NON_LIVE, _non_live),
    "Live": (LIVE, _live),
    "Multi-Turn": (MULTI_TURN, _mean_of(MULTI_TURN)),
    "Irrelevance": (IRRELEVANCE, _mean_of(IRRELEVANCE)),
    "Relevance": (("live_relevance",), _mean_of(("live_relevance",))),
}
"""Name -> its categories, and what is made of them."""
