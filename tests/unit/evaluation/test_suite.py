"""Subsets, shares and means of the benchmark table."""

from __future__ import annotations

import pytest

from rest_mega.config import ConfigError
from rest_mega.evaluation.suite import (
    Result,
    Row,
    Task,
    Verdict,
    chosen,
    mean,
    open_suite,
    share,
    wilson,
)
from rest_mega.records import Prompt


def task(name: str, category: str = "one") -> Task:
    return Task(Prompt(name, ({"role": "user", "content": "?"},)), category)


def results(*valid: tuple[str, bool]) -> list[Result]:
    return [Result(task(name), n, Verdict(ok)) for n, (name, ok) in enumerate(valid)]


def test_a_smaller_subset_is_in_the_larger_one_and_ignores_the_rest() -> None:
    tasks = [task(f"{c}-{n}", c) for n in range(40) for c in ("one", "two")]
    small, large = chosen(tasks, 5, 7), chosen(tasks, 9, 7)
    assert {t.prompt.id for t in small} < {t.prompt.id for t in large}
    assert [t.category for t in small].count("two") == 5
    assert chosen([t for t in tasks if t.category == "two"], 5, 7) == [
        t for t in small if t.category == "two"
    ]
    assert chosen(tasks, 5, 8) != small
    assert chosen(tasks, 0, 7) == tasks


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263 and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1.0, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_one_sample_per_task_has_wilsons_interval() -> None:
    row = share("x", results(("a", True), ("b", False), ("c", True), ("d", True)))
    assert (row.score, row.count) == (0.75, 4)
    assert (row.low, row.high) == wilson(0.75, 4)


def test_samples_of_one_task_do_not_narrow_the_interval() -> None:
    once = [("a", True), ("b", False), ("c", True), ("d", True)]
    few, many = share("x", results(*once * 2)), share("x", results(*once * 200))
    assert (many.score, many.count) == (0.75, 4)
    assert (many.low, many.high) == (few.low, few.high)
    assert many.high - many.low > 0.5


def test_no_results_have_no_share() -> None:
    with pytest.raises(ValueError, match="no results"):
        share("x", [])


def test_a_mean_adds_half_widths_in_squares() -> None:
    rows = [Row("a", 0.5, 0.4, 0.6, 10), Row("b", 0.7, 0.5, 0.8, 30)]
    row = mean("x", rows)
    assert (row.score, row.count) == (pytest.approx(0.6), 40)
    assert row.score - row.low == pytest.approx((0.1**2 + 0.2**2) ** 0.5 / 2)
    assert row.high - row.score == pytest.approx((0.1**2 + 0.1**2) ** 0.5 / 2)
    assert mean("x", rows, [1, 3]).score == pytest.approx(0.65)
    with pytest.raises(ValueError, match="no mean"):
        mean("x", rows, [1.0])


def test_an_unknown_suite_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"suite='api_bank'.*choose one of api-bank, bfcl"):
        open_suite("api_bank")
