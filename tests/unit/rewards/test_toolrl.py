"""ToolRL's reward against numbers that its authors' own functions gave, and against its rules one
by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_mega.dialects import parse
from rest_mega.rewards import RUBRIC
from rest_mega.rewards.toolrl import correctness, format_score

VECTORS = json.loads(
    (Path(__file__).parents[2] / "data" / "reward_vectors.json").read_text(encoding="utf-8")
)
CALL = '{"name": "f", "parameters": {"n": 3}}'
GOLD = f"<think> p </think>\n<tool_call>\n{CALL}\n</tool_call>"
ANSWER = "<response> hi </response>"


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_the_authors_numbers(vector: dict[str, Any], trajectory: Any) -> None:
    total, form, correct = vector["total_format_correctness"]
    reply, gold = vector["response"], vector["ground_truth"]
    assert format_score(reply, gold) == form
    assert correctness(reply, gold) == pytest.approx(correct, abs=1e-12)
    if vector["S_acc"] is not None:
        assert (correctness(reply, gold) + 3) / 6 == pytest.approx(vector["S_acc"], abs=1e-6)
    one = trajectory(reply, task={"ground_truth": gold})
    assert RUBRIC["toolrl"](one) == pytest.approx(total, abs=1e-12)
    assert RUBRIC["format"](one) == form


# The dialect reads "arguments" as well as "parameters"; the reward "toolrl" alone insists on the
# latter.
READ_ALIKE = [v for v in VECTORS if v["S_acc"] is not None and not v["id"].startswith("R19")]


@pytest.mark.parametrize("vector", READ_ALIKE, ids=lambda v: v["id"])
def test_the_authors_accuracy_of_calls_that_the_dialect_parsed(
    vector: dict[str, Any], trajectory: Any
) -> None:
    gold, reply = (parse(vector[key].encode(), "toolrl") for key in ("ground_truth", "response"))
    task = {"calls": [{"name": c.name, "arguments": c.arguments} for c in gold.calls]}
    one = trajectory(vector["response"], task=task, calls=[reply.calls])
    assert RUBRIC["tool_calls"](one) == pytest.approx(vector["S_acc"], abs=1e-6)


@pytest.mark.parametrize(
    ("reply", "gold", "score"),
    [
        (GOLD, GOLD, 1),
        (f"\n {GOLD}\n", GOLD, 1),
        (GOLD.replace("p", "two\nlines"), GOLD, 1),
        (GOLD.replace(CALL, "not json"), GOLD, 1),
        (GOLD.replace("</think>\n", "</think>"), GOLD, 0),
        (GOLD.replace("</think>\n", "</think>\n\n"), GOLD, 0),
        (GOLD.replace("<think> p </think>\n", ""), GOLD, 0),
        (GOLD.replace(" p ", " <tool_call> "), GOLD, 0),
        (f"{GOLD}\n{ANSWER}", GOLD, 0),
        (f"{GOLD}\n{ANSWER}", f"{GOLD}\n{ANSWER}", 1),
        (GOLD, f"{GOLD}\n{ANSWER}", 0),
        (f"<think></think>\n{ANSWER}", f"<think> p </think>\n{ANSWER}", 1),
        (f"<think></think>\n{ANSWER}{ANSWER}", f"<think> p </think>\n{ANSWER}", 0),
        ("<think> p </think>", "<think> q </think>", 1),
        ("", GOLD, 0),
    ],
)
def test_format_asks_for_the_parts_of_the_gold_reply_once_and_in_order(
    reply: str, gold: str, score: float
) -> None:
    assert format_score(reply, gold) == score


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (CALL, 3),
        ('{"name": "f", "parameters": {}}', 6 * (1 + 0) / 3 - 3),
        ('{"name": "f", "parameters": [3]}', -3),
        ('{"name": "f"}', -3),
        # A call that is not asked for need not have parameters: it costs half of the names' Jaccard
        # index.
        (CALL + '\n{"name": "g"}', 6 * (0.5 + 2) / 3 - 3),
        (CALL + '\n{"name": "g", "parameters": 1}', 6 * (0.5 + 2) / 3 - 3),
        (CALL + "\n\n" + CALL, -3),
        (CALL + "\nnull", -3),
        (CALL + "\n3", -3),
        ('[{"name": "f", "parameters": {"n": 3}}]', -3),
        ('{"name": ["f"], "parameters": {"n": 3}}', -3),
        ("[" * 100_000, -3),
        ("", -3),
    ],
)
def test_one_bad_line_voids_every_call(block: str, expected: float) -> None:
    assert correctness(GOLD.replace(CALL, block), GOLD) == pytest.approx(expected, abs=1e-12)


def test_calls_count_for_nothing_where_the_gold_reply_has_none() -> None:
    gold = f"<think> p </think>\n{ANSWER}"
    assert correctness(GOLD, gold) == correctness(gold, gold) == 0
    assert correctness(gold, GOLD) == -3


def test_a_gold_reply_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        correctness(GOLD, GOLD.replace(CALL, "oops"))
