"""pass@k, mean@k, and paired comparisons against other ways to the same number."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from rest_mega.config import ConfigError
from rest_mega.evaluation.figures import kinds, many_samples, pass_at, table
from rest_mega.evaluation.paired import compare, difference, mcnemar
from rest_mega.evaluation.suite import Result, Task, Verdict, share
from rest_mega.records import Prompt


def results(valid: list[list[bool]]) -> list[Result]:
    tasks = [Task(Prompt(f"t{n}", ({"role": "user", "content": "?"},)), "c") for n in range(99)]
    return [
        Result(tasks[n], k, Verdict(ok, "" if ok else "bad"))
        for n, row in enumerate(valid)
        for k, ok in enumerate(row)
    ]


def rows(valid: list[list[bool]]) -> list[dict[str, object]]:
    return [
        {"task": f"t{n}", "sample": k, "valid": ok}
        for n, row in enumerate(valid)
        for k, ok in enumerate(row)
    ]


@pytest.mark.parametrize(("samples", "right", "k"), [(6, 2, 1), (6, 2, 3), (5, 0, 5), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(
    samples: int, right: int, k: int
) -> None:
    draws = [n < right for n in range(samples)]
    choices = [any(c) for c in itertools.combinations(draws, k)]
    assert pass_at(k, samples, right) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_wants_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@4"):
        pass_at(4, 3, 1)


def test_mean_at_k_has_its_spread_over_tasks_and_over_draws() -> None:
    valid = [[True, True, False], [False, False, False], [True, False, True], [True, True, True]]
    found = many_samples(results(valid))
    means = [sum(row) / 3 for row in valid]
    assert found["mean_at"] == pytest.approx(statistics.fmean(means))
    assert found["standard_error"] == pytest.approx(statistics.stdev(means) / 2)
    columns = [statistics.fmean(column) for column in zip(*valid, strict=True)]
    assert found["deviation_over_draws"] == pytest.approx(statistics.stdev(columns))
    assert list(found["pass_at"]) == [1, 2, 3]
    assert found["pass_at"][1] == pytest.approx(found["mean_at"])
    assert found["pass_at"][3] == 0.75
    assert found["unfinished"] == 0


def test_a_task_with_fewer_samples_is_counted_apart() -> None:
    assert many_samples(results([[True, False], [True]]))["unfinished"] == 1
    assert many_samples(results([[True], [False]])) == {}


def test_the_table_shows_shares_samples_and_kinds() -> None:
    found = results([[True, False], [False, False]])
    text = table([share("all", found)], found)
    assert "all   25.0" in text
    assert "pass@1 25.0, pass@2 50.0" in text
    assert "mean@2 25.0" in text
    assert "failures: bad 3" in text
    assert kinds(found) == {"bad": 3}


# ------------------------------------------------------------------ two evaluations


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 5), (9, 1), (0, 6), (14, 3)])
def test_mcnemar_is_the_chance_of_tosses_as_uneven(better: int, worse: int) -> None:
    count = better + worse
    gap = abs(better - worse)
    as_uneven = [abs(count - 2 * sum(t)) >= gap for t in itertools.product((0, 1), repeat=count)]
    assert mcnemar(better, worse) == pytest.approx(sum(as_uneven) / len(as_uneven))


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    draws, true, inside = random.Random(5), 0.10, 0
    for _ in range(2000):
        pairs = draws.choices(["better", "worse", "same"], [0.2, 0.1, 0.7], k=120)
        low, high = difference(pairs.count("better"), pairs.count("worse"), 120)
        inside += low <= true <= high
    assert 0.935 < inside / 2000 < 0.968


def test_one_sample_each_is_compared_by_pairs() -> None:
    a, b = [[True], [True], [False], [False], [False]], [[True], [False], [True], [True], [True]]
    found = compare(rows(a), rows(b))
    assert (found.better, found.worse, found.tasks, found.samples) == (3, 1, 5, 1)
    assert (found.score_a, found.score_b) == (0.4, 0.8)
    assert found.p == mcnemar(3, 1)
    assert (found.low, found.high) == difference(3, 1, 5)


def test_several_samples_count_once_per_task() -> None:
    a = [[True, False], [False, False], [True, True]]
    b = [[True, True], [True, False], [True, True]]
    found = compare(rows(a), rows(b))
    assert (found.better, found.worse, found.tasks, found.samples) == (2, 0, 3, 2)
    assert found.score_b - found.score_a == pytest.approx(1 / 3)
    assert found.low < 1 / 3 < found.high
    assert found.p == mcnemar(2, 0)


def test_only_shared_samples_are_compared() -> None:
    found = compare(rows([[True], [False], [True]]), rows([[True], [True]]))
    assert (found.tasks, found.left_out) == (2, 1)
    with pytest.raises(ConfigError, match="share no sample"):
        compare(rows([[True]]), [])
