"""ResT's dynamic reward: the authors' rewards at every step, but for an offset of all siblings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, RewardConfig
from rest_mega.records import ToolCall
from rest_mega.rewards import Rubric
from rest_mega.rewards.schedule import SCHEDULES

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "reward_vectors.json").read_text())
WITH_CALLS = [v for v in VECTORS if "<tool_call>" in v["ground_truth"]]
STEPS = ("0", "50", "105", "150")


def mixed(vector: dict[str, Any], step: str) -> float:
    factors = SCHEDULES["rest"](int(step))
    return float(factors["format"] * vector["S_format"] + factors["tool_calls"] * vector["S_acc"])


@pytest.mark.parametrize("step", STEPS)
def test_replies_differ_as_the_authors_code_says(step: str) -> None:
    assert len(WITH_CALLS) > 5
    first = WITH_CALLS[0]
    for vector in WITH_CALLS[1:]:
        theirs = [v["scheduled_total_format_correctness"][step][0] for v in (vector, first)]
        ours = [mixed(v, step) for v in (vector, first)]
        assert ours[0] - ours[1] == pytest.approx(theirs[0] - theirs[1], abs=1e-5), vector["id"]


def test_the_format_gives_way_to_the_calls_until_step_150() -> None:
    pairs = [SCHEDULES["rest"](step) for step in (0, 75, 150, 1000)]
    assert [(p["format"], p["tool_calls"]) for p in pairs] == [(4, 4), (2.5, 5), (2, 6), (2, 6)]


def test_the_rubric_follows_its_schedule_and_an_evaluation_its_end(trajectory: Any) -> None:
    task = {"calls": [{"name": "f", "arguments": {}}]}
    groups = [[trajectory("a", task=task), trajectory("a", task=task, calls=[[ToolCall("f", {})]])]]
    parts = {"format": 1.0, "tool_calls": 0.5}
    rubric = Rubric(RewardConfig(parts, schedule="rest"))
    assert rubric(groups, 75)[0].tolist() == [[2.5, 5.0]]
    assert rubric(groups)[0].tolist() == [[2.0, 5.0]]
    assert Rubric(RewardConfig(parts))(groups, 75)[0].tolist() == [[1.0, 1.5]]


def test_a_schedule_without_its_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"name both in rewards\.parts, or set rewards\.schedule"):
        RewardConfig({"format": 1.0, "success": 1.0}, schedule="rest")
