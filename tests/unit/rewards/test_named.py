"""The built-in reward functions at the edges of a trajectory, and on replies made to be slow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.dialects import parse
from rest_mega.records import ToolCall
from rest_mega.rewards import RUBRIC
from rest_mega.rewards.toolrl import correctness, format_score

CALL = '{"name": "f", "parameters": {"n": 3}}'
GOLD = f"<think> p </think>\n<tool_call>\n{CALL}\n</tool_call>"
ANSWERED = f"{GOLD}\n<response> hi </response>"
SIZE = 200_000


def flood(unit: str) -> str:
    """The unit again and again: a quadratic reader would need minutes."""
    return unit * (SIZE // len(unit))


def test_a_trajectory_without_turns_earns_nothing(trajectory: Any) -> None:
    task = {"ground_truth": GOLD, "calls": [{"name": "f", "arguments": {"n": 3}}]}
    empty = trajectory(task=task)
    assert {name: RUBRIC[name](empty) for name in ("format", "tool_calls", "success")} == {
        "format": 0,
        "tool_calls": 0,
        "success": 0,
    }
    assert RUBRIC["toolrl"](empty) == -3
    assert RUBRIC["format"](trajectory()) == 0


def test_toolrl_judges_the_last_turn_alone(trajectory: Any) -> None:
    task = {"ground_truth": GOLD}
    for before in ("", GOLD, "anything"):
        assert RUBRIC["toolrl"](trajectory(before, GOLD, task=task)) == 4
        assert RUBRIC["format"](trajectory(before, GOLD, task=task)) == 1
        assert RUBRIC["toolrl"](trajectory(before, "no", task=task)) == -3
        assert RUBRIC["format"](trajectory(before, "no", task=task)) == 0


def test_format_follows_the_dialect_where_the_task_has_no_gold_reply(trajectory: Any) -> None:
    for flags in ([True, True], [True, False], [False, True], [False, False]):
        assert RUBRIC["format"](trajectory("a", "b", well_formed=flags)) == all(flags)


@pytest.mark.parametrize(("result", "value"), [({}, 0), ({"success": 1}, 1), ({"success": ""}, 0)])
def test_success_is_what_the_environment_says(
    trajectory: Any, result: dict[str, Any], value: float
) -> None:
    assert RUBRIC["success"](trajectory("a", result=result)) == value


def test_no_wanted_call_is_answered_by_none(trajectory: Any) -> None:
    task: dict[str, Any] = {"calls": []}
    assert RUBRIC["tool_calls"](trajectory("a", task=task)) == 1
    assert RUBRIC["tool_calls"](trajectory("a", task=task, calls=[[ToolCall("f", {})]])) == 0
    assert RUBRIC["tool_calls"](trajectory("a", calls=[[ToolCall("f", {})]])) == 0
    assert RUBRIC["tool_calls"](trajectory("a", task=task, well_formed=[False])) == 0


NAMES = st.lists(st.sampled_from(["f", "g"]), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(gold=NAMES, reply=NAMES, n=st.integers(0, 2))
def test_toolrl_is_six_times_the_accuracy_of_the_parsed_calls_less_three(
    gold: list[str], reply: list[str], n: int
) -> None:
    texts = []
    for number, names in enumerate((gold, reply)):
        rows = [f'{{"name": "{x}", "parameters": {{"n": {number and n}}}}}' for x in names]
        texts.append("<think> p </think>\n<tool_call>\n" + "\n".join(rows) + "\n</tool_call>")
    wanted, found = (parse(text.encode(), "toolrl").calls for text in texts)
    shared = sum(min(gold.count(x), reply.count(x)) for x in "fg")
    # Every call has the one argument n: 0 in the gold reply, n in the other.
    score = shared / (len(gold) + len(reply) - shared) + shared * (2 if n == 0 else 1)
    expected = 6 * score / (1 + 2 * len(gold)) - 3
    assert correctness(texts[1], texts[0]) == pytest.approx(expected, abs=1e-12)
    assert [call.name for call in wanted + found] == gold + reply


@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "</think>\n<tool_call>\n",
        "</think>\n<response>",
        "\n</tool_call>",
        "<tool_call>\n\n</tool_call>",
        "{",
        "[",
        '"',
        "\\",
        f"{CALL}\n",
        " \n",
    ],
)
@pytest.mark.parametrize("gold", [GOLD, ANSWERED, "<think> p </think>"])
def test_floods_are_judged_to_their_end(unit: str, gold: str) -> None:
    assert (format_score(flood(unit), gold), correctness(flood(unit), GOLD)) == (0, -3)
    thought = GOLD.replace(" p ", flood(unit))
    called = GOLD.replace(CALL, CALL + flood(unit))
    for reply in (thought, called):
        # What is inside the tags does not matter, unless it is these tags again.
        once = reply.count("<tool_call>") == reply.count("</tool_call>") == 1
        assert format_score(reply, gold) == (gold == GOLD and once)
    # White space that ends the block is no row; the next tag of either kind ends the block.
    read = unit in (" \n", "\n</tool_call>", "<tool_call>\n\n</tool_call>")
    assert correctness(called, GOLD) == (3 if read else -3)
