"""The rubric: a weighted sum of named functions, every part kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ConfigError, RewardConfig
from rest_mega.records import ToolCall
from rest_mega.rewards import RUBRIC, Rubric, reward

F = ToolCall("f", {"x": 1})
G = ToolCall("g", {})
TASK = {"calls": [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]}


@pytest.fixture
def registered() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(RUBRIC)
    yield
    for name in RUBRIC.keys() - before.keys():
        del RUBRIC[name]


def test_the_reward_is_the_weighted_sum_of_its_parts(trajectory: Any) -> None:
    groups = [
        [
            trajectory("a", "b", task=TASK, calls=[[F], [G]], result={"success": True}),
            trajectory("a", task=TASK, well_formed=[False]),
        ],
        [trajectory("a", task={"calls": []}), trajectory("a", task={"calls": []}, calls=[[F]])],
        [trajectory("a", result={"success": False}), trajectory()],
    ]
    rewards_PG, parts = Rubric(RewardConfig({"format": 1.0, "tool_calls": 3.0, "success": -0.5}))(
        groups
    )
    assert parts["format"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert parts["tool_calls"].tolist() == [[1, 0], [1, 0], [0, 0]]
    assert parts["success"].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert rewards_PG.tolist() == [[3.5, 0], [4, 1], [1, 0]]


def test_calls_of_all_turns_are_judged_together_in_any_cut(trajectory: Any) -> None:
    cuts = [[[F, G]], [[F], [G]], [[], [F, G]], [[F, G], []]]
    values = [RUBRIC["tool_calls"](trajectory("a", "b", task=TASK, calls=calls)) for calls in cuts]
    assert values == [1, 1, 1, 1]


def test_permuted_groups_have_permuted_rewards(trajectory: Any) -> None:
    group = [
        trajectory("a", task=TASK, calls=[calls], sibling=n)
        for n, calls in enumerate(([F], [G], [], [F, G]))
    ]
    rubric = Rubric(RewardConfig())
    order = [2, 0, 3, 1]
    assert np.array_equal(rubric([[group[n] for n in order]])[0], rubric([group])[0][:, order])


def test_no_groups_are_no_rewards() -> None:
    rewards_PG, parts = Rubric(RewardConfig())([])
    assert rewards_PG.size == parts["format"].size == 0


def test_toolrl_parts_of_a_task_without_gold_reply(trajectory: Any) -> None:
    assert RUBRIC["toolrl"](trajectory("a")) == 0
    assert RUBRIC["format"](trajectory("a", "b", well_formed=[True, False])) == 0


def test_a_name_that_nobody_registered_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.parts='tool_cals' .*nearest: tool_calls"):
        Rubric(RewardConfig({"tool_cals": 1.0}))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_function_and_prompt(
    trajectory: Any, value: float
) -> None:
    reward("broken")(lambda _: value)
    with pytest.raises(ValueError, match=r"'broken' of prompt 'p7' \(sibling 3\) is (nan|inf)"):
        Rubric(RewardConfig({"broken": 1.0}))([[trajectory("a", id="p7", sibling=3)]])


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    reward("mine")(lambda trajectory: float(len(trajectory.turns)))
    with pytest.raises(ConfigError, match="'mine' is registered already"):
        reward("mine")(lambda _: 0.0)


def test_groups_of_unequal_size_are_refused(trajectory: Any) -> None:
    with pytest.raises(ValueError, match=r"unequal size \[1, 2\]"):
        Rubric(RewardConfig())([[trajectory("a")], [trajectory("a"), trajectory("b")]])


def test_gold_calls_without_arguments_name_the_prompt(trajectory: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt 'p': task\[\"calls\"\]"):
        RUBRIC["tool_calls"](trajectory("a", task={"calls": [{"name": "f"}]}))
