"""S_acc against an independent reference and its invariances."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from rest_mega.records import ToolCall
from rest_mega.rewards.tool_calls import accuracy, jaccard

VALUES = st.one_of(
    st.integers(0, 2), st.sampled_from(["a", "b"]), st.lists(st.integers(0, 1), max_size=2)
)
CALL = st.builds(ToolCall, st.sampled_from("fgh"), st.dictionaries(st.sampled_from("xyz"), VALUES))
CALLS = st.lists(CALL, max_size=4)


def numbered(items: list[str]) -> set[tuple[str, int]]:
    """A multiset as a set: every item with the number of its occurrence."""
    return {(item, items[:n].count(item)) for n, item in enumerate(items)}


def reference_jaccard(gold: list[str], predicted: list[str]) -> Fraction:
    a, b = numbered(gold), numbered(predicted)
    return Fraction(len(a & b), len(a | b)) if a | b else Fraction(1)


def best_matching(gold: list[ToolCall], predicted: list[ToolCall]) -> Fraction:
    """S_acc under the best of all one-to-one matchings, found by trying each."""
    places: list[int | None] = [*range(len(predicted)), *(None for _ in gold)]
    best = Fraction(0)
    for chosen in itertools.permutations(places, len(gold)):
        total = Fraction(0)
        for call, place in zip(gold, chosen, strict=True):
            if place is None or predicted[place].name != call.name:
                continue
            other = predicted[place].arguments
            total += reference_jaccard(list(call.arguments), list(other))
            total += sum(
                key in other and other[key] == value for key, value in call.arguments.items()
            )
        best = max(best, total)
    names = reference_jaccard([c.name for c in gold], [c.name for c in predicted])
    return (names + best) / (1 + sum(1 + len(c.arguments) for c in gold))


@given(
    gold=st.lists(st.sampled_from("abc"), max_size=5),
    predicted=st.lists(st.sampled_from("abc"), max_size=5),
)
def test_jaccard_equals_the_one_of_numbered_occurrences(
    gold: list[str], predicted: list[str]
) -> None:
    assert (
        jaccard(gold, predicted)
        == float(reference_jaccard(gold, predicted))
        == jaccard(predicted, gold)
    )


@given(
    gold=st.lists(CALL, max_size=3, unique_by=lambda c: c.name),
    predicted=st.lists(CALL, max_size=3),
)
def test_accuracy_is_that_of_the_best_matching_where_gold_names_differ(
    gold: list[ToolCall], predicted: list[ToolCall]
) -> None:
    assert abs(accuracy(gold, predicted) - best_matching(gold, predicted)) < 1e-12


@given(gold=CALLS, predicted=CALLS)
def test_greedy_matching_never_exceeds_the_best_one(
    gold: list[ToolCall], predicted: list[ToolCall]
) -> None:
    assert 0 <= accuracy(gold, predicted) <= best_matching(gold, predicted) + 1e-12 <= 1 + 1e-12


@given(calls=CALLS, order=st.randoms(use_true_random=False))
def test_lists_equal_up_to_order_score_exactly_one(
    calls: list[ToolCall], order: random.Random
) -> None:
    shuffled = list(calls)
    order.shuffle(shuffled)
    assert accuracy(calls, shuffled) == 1


def test_values_are_compared_as_json_values() -> None:
    def one(gold: object, predicted: object) -> float:
        return accuracy([ToolCall("f", {"n": gold})], [ToolCall("f", {"n": predicted})])

    assert one(3, 3.0) == one({"a": [1, 2]}, {"a": [1, 2]}) == 1
    assert one(3, "3") == one([1, 2], [2, 1]) == one("a", "A") == 2 / 3
