"""Rows of BFCL's categories -> the scores of its leaderboard.

Source: generate_leaderboard_csv of bfcl-eval 2026.3.23, eval_checker/eval_runner_helper.py. There a
category that was not measured counts as 0; here a score is missing unless all that it is made of
was measured. The one exception is the overall score: its agentic categories (web search, memory; 40
of 100 points) need the internet and other judges, and count as 0 as they do there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rest_mega.evaluation.suite import Row, mean

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
MULTI_TURN = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
)
CATEGORIES = (
    *SIMPLE,
    *("multiple", "parallel", "parallel_multiple", "irrelevance"),
    *(*LIVE, "live_irrelevance", "live_relevance"),
    *MULTI_TURN,
)
"""All that are judged here: the leaderboard's but for the agentic ones."""
ALIKE: Mapping[str, Sequence[str]] = {
    "Non-Live Simple": SIMPLE,
    "Non-Live": ("Non-Live Simple", "multiple", "parallel", "parallel_multiple"),
    "Multi-Turn": MULTI_TURN,
    "Irrelevance": ("irrelevance", "live_irrelevance"),
}
"""Score -> the rows that count alike in it (calculate_unweighted_accuracy)."""
POINTS = {"Non-Live": 10, "Live": 10, "Irrelevance": 10, "Multi-Turn": 30}
"""What the parts of the overall score weigh (calculate_percentage_weighted_accuracy)."""
AGENTIC = Row("agentic", 0.0, 0.0, 0.0, 0)
AGENTIC_POINTS = 40


def scores(categories: Sequence[Row]) -> list[Row]:
    """The leaderboard's scores that can be made of these rows, by its names. `Overall without
    agentic` is what can be measured here, of its 60 points."""
    rows = {row.name: row for row in categories}
    for name, alike in ALIKE.items():
        if rows.keys() >= {*alike}:
            rows[name] = mean(name, [rows[one] for one in alike])
    if rows.keys() >= {*LIVE}:  # every sample counts alike (calculate_weighted_accuracy)
        live = [rows[part] for part in LIVE]
        rows["Live"] = mean("Live", live, [row.count for row in live])
    if rows.keys() >= POINTS.keys():
        parts, points = [rows[part] for part in POINTS], [*POINTS.values()]
        rows["Overall"] = mean("Overall", [*parts, AGENTIC], [*points, AGENTIC_POINTS])
        rows["Overall without agentic"] = mean("Overall without agentic", parts, points)
    return [*rows.values()][len(categories) :]
