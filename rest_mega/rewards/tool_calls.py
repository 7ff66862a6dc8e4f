"""How well a list of tool calls matches the gold one: names, argument names, argument values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rest_mega.records import ToolCall


def jaccard(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Multiset Jaccard index: shared over total, counted with multiplicity; 1 where both are
    empty."""
    shared = (Counter(gold) & Counter(predicted)).total()
    total = len(gold) + len(predicted) - shared
    return shared / total if total else 1.0


def accuracy(gold: Sequence[ToolCall], predicted: Sequence[ToolCall]) -> float:
    """S_acc in [0, 1], ToolRL's correctness (arXiv 2504.13958, section 3.3):

        [J(names) + sum over gold calls of (J(argument names) + number of equal values)]
        / [1 + sum over gold calls of (1 + number of arguments)]

    Gold calls are taken in order, each matched to the best unused predicted call of its name. Lists
    that are equal up to order score exactly 1. Values are compared as parsed JSON, without
    conversion: 3 equals 3.0, "3" does not, and `true` equals 1.
    """
    score = jaccard([c.name for c in gold], [c.name for c in predicted])
    free = list(predicted)
    for call in gold:
        matches = [
            (_similarity(call, other), -n)
            for n, other in enumerate(free)
            if other.name == call.name
        ]
        best, place = max(matches, default=(0.0, 0))  # the first of equally good ones
        if best > 0:
            score += best
            del free[-place]
    return score / (1 + sum(1 + len(call.arguments) for call in gold))


def _similarity(gold: ToolCall, predicted: ToolCall) -> float:
    """J(argument names) + number of equal values."""
    equal = sum(
        bool(k in predicted.arguments and predicted.arguments[k] == v)
        for k, v in gold.arguments.items()
    )
    return jaccard(list(gold.arguments), list(predicted.arguments)) + equal
