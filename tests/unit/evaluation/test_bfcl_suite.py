"""BFCL as a suite: its tasks, its leaderboard's scores, the side of its split, and episodes of
several turns judged as the official pipeline judges the same raw replies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rest_mega.config import ConfigError
from rest_mega.data.bfcl_rows import scenario, split
from rest_mega.dialects import parse
from rest_mega.environments import make_environment
from rest_mega.evaluation.bfcl_scores import CATEGORIES, MULTI_TURN, scores
from rest_mega.evaluation.bfcl_suite import Bfcl
from rest_mega.evaluation.suite import Played, Result, Row
from rest_mega.records import ToolCall, Turn
from tests.support import bfcl_official as official
from tests.support.bfcl_replies import Call, written
from tests.support.bfcl_traces import gold_turns, played, suite, tasks, traces

pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed: make bfcl")
# BFCL's executor evaluates replies as Python, odd ones too.
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")

# ------------------------------------------------------------------ tasks


def test_the_tasks_are_all_entries_of_the_package() -> None:
    counts = {category: len(tasks(category)) for category in CATEGORIES}
    assert counts == {category: len(official.entries(category)) for category in CATEGORIES}
    assert sum(counts.values()) == 4441
    assert suite().version == "bfcl-eval 2026.3.23"
    names = [task.prompt.id for category in CATEGORIES for task in tasks(category)]
    assert len({*names}) == len(names)


def test_functions_are_shown_as_the_official_runner_shows_them() -> None:
    """But for the dots in their names, which it takes out for OpenAI's API."""
    utils, tools = official.module("utils"), official.module("model_handler.utils")
    mapping = official.module("constants.type_mappings").GORILLA_TO_OPENAPI
    style = official.module("constants.enums").ModelStyle.OPENAI_COMPLETIONS
    for category in (c for c in CATEGORIES if c not in MULTI_TURN):
        entries = [official.entries(category)[t.prompt.id][0] for t in tasks(category)[:5]]
        hinted = utils.add_language_specific_hint_to_function_doc(json.loads(json.dumps(entries)))
        for entry, task in zip(hinted, tasks(category), strict=False):
            shown = json.loads(json.dumps(task.prompt.tools))
            for one in shown:
                one["function"]["name"] = one["function"]["name"].replace(".", "_")
            assert shown == tools.convert_to_tool(entry["function"], mapping, style)
    java = tasks("simple_java")[0].prompt.tools[0]["function"]
    assert {p["type"] for p in java["parameters"]["properties"].values()} == {"string"}


@pytest.mark.parametrize("category", ["simple_java", "live_simple", "multi_turn_miss_func"])
def test_bfcl_s_own_prompt_is_the_official_one(category: str, tmp_path: Path) -> None:
    texts = official.module("constants.default_prompts")
    more = texts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
    found = tasks(category, "bfcl-prompt")
    assert suite("bfcl-prompt").dialect == "pythonic"
    for task, entry in zip(found, official.prompts(category, tmp_path), strict=True):
        assert list(task.prompt.messages) == entry["question"][0], task.prompt.id
        assert task.prompt.tools == ()
        for number, documents in entry.get("missed_function", {}).items():
            world = make_environment("bfcl", task.prompt.task)
            assert list(world.specs) == []
            said = [world.next_user("No.") for _ in range(int(number))][-1]
            assert said == more.format(functions=documents)


def _pairs(calls: list[Any]) -> list[Call]:
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize("category", MULTI_TURN)
def test_episodes_without_tool_use_get_the_official_verdict(category: str) -> None:
    for task in tasks(category, "bfcl-prompt")[::50]:
        for less in (0, 1):
            kept = [calls[: len(calls) - less] for calls in gold_turns(task)]
            lists = [written(_pairs(calls), "pythonic", category) for calls in kept]
            replies = [[text] * (text != "[]") + ["Done."] for text in lists]
            reader = official.handler("pythonic")
            theirs = official.judge(category, task.prompt.id, replies, reader)
            ours = played(task, replies, "pythonic")
            assert (ours["success"], ours["kind"]) == (theirs["valid"], official.kind(theirs))
            assert ours["success"] == (not less)


def test_a_bad_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    for category in CATEGORIES:
        (tmp_path / f"BFCL_v4_{category}.json").write_text('{"id": "x", "question": 3}\n')
    with pytest.raises(ConfigError, match=r"BFCL_v4_multiple.json:1: question=3 must be"):
        Bfcl(str(tmp_path)).tasks(["multiple"])
    with pytest.raises(ConfigError, match=r"'mutiple' is not known.*nearest: multiple"):
        suite().tasks(["mutiple"])
    (tmp_path / "BFCL_v4_live_simple.json").unlink()
    with pytest.raises(ConfigError, match=r"no file .*BFCL_v4_live_simple.json"):
        Bfcl(str(tmp_path))


# ------------------------------------------------------------------ verdicts and scores


def reply(text: str) -> tuple[Turn, ...]:
    read = parse(text.encode(), "hermes")
    return (Turn(0, 1, text, read.well_formed, calls=read.calls),)


def test_a_reply_is_judged_by_its_text_or_by_calls_that_came_as_such() -> None:
    task = tasks("simple_python")[0]
    right = ToolCall("calculate_triangle_area", {"base": 10, "height": 5})
    text = f"<tool_call>\n{json.dumps({'name': right.name, 'arguments': dict(right.arguments)})}"
    verdict = suite().judge(
        task, Played(reply(f"{text}\n</tool_call>"), "answered", dialect="hermes")
    )
    assert (verdict.valid, verdict.kind) == (True, "")
    assert verdict.details == {"calls": [{right.name: dict(right.arguments)}]}
    spoken = Turn(0, 1, "", True, calls=(right,))
    assert suite().judge(task, Played((spoken,), "answered")).valid
    wrong = Turn(0, 1, "", True, calls=(ToolCall(right.name, {"base": 10}),))
    assert suite().judge(task, Played((wrong,), "answered")).kind.endswith("missing_required")
    assert suite().judge(task, Played((), "prompt_length", note="9 tokens")).kind == "prompt_length"


@pytest.mark.parametrize(
    "text",
    [
        "[f(x={(1, 2): 3})]",
        '[f(x="\\ud800")]',
        "[f(x=1e999)]",
        "[f(x=" + "(" * 150 + "1" + ")" * 150 + ")]",
        "[f(x=" + "[" * 9000 + ")]",
        "[f(x=9**9**9)]",
        "[f(x='a' * 10**10)]",
        "[f(x=__import__('os').getcwd() + 'a')]",
        "[f(x=10**9 * 10**9 * 10**9)]",
        "\0",
    ],
)
@pytest.mark.parametrize("dialect", ["pythonic", "llama3", "hermes", "mistral", "toolrl", ""])
def test_whatever_a_model_writes_is_judged_and_kept(text: str, dialect: str) -> None:
    for category in ("simple_python", "simple_java", "simple_javascript", "irrelevance"):
        task = tasks(category)[0]
        verdict = suite().judge(task, Played(reply(text), "answered", dialect=dialect))
        assert not verdict.valid or category == "irrelevance"
        json.dumps(verdict.details, allow_nan=False, ensure_ascii=False).encode()
        verdict.reason.encode()


def test_scores_are_those_of_the_leaderboard(tmp_path: Path) -> None:
    chance = Random(3)
    rows = [
        Row(name, chance.random(), 0.0, 1.0, len(official.entries(name))) for name in CATEGORIES
    ]
    found = {row.name: f"{100 * row.score:.2f}%" for row in scores(rows)}
    files = official.leaderboard({row.name: (row.score, row.count) for row in rows}, tmp_path)
    overall = files["data_overall"]
    assert found == {
        "Non-Live Simple": overall["Non-Live Simple AST"],
        "Non-Live": overall["Non-Live AST Acc"],
        "Live": overall["Live Acc"],
        "Multi-Turn": overall["Multi Turn Acc"],
        "Irrelevance": overall["Irrelevance Detection"],
        "Overall": overall["Overall Acc"],
        "Overall without agentic": found["Overall without agentic"],
    }
    alone = next(row.score for row in scores(rows) if row.name == "Overall")
    assert scores(rows)[-1].score == pytest.approx(alone / 0.6)


def test_a_score_is_missing_where_a_part_of_it_was_not_measured() -> None:
    rows = [Row(name, 0.5, 0.4, 0.6, 10) for name in (*MULTI_TURN, "multiple", "live_simple")]
    assert [row.name for row in scores(rows)] == ["Multi-Turn"]
    verdict = suite().judge(tasks("multiple")[0], Played((), "failed"))
    table = suite().summary([Result(tasks("multiple")[0], 0, verdict)])
    assert [(row.name, row.score, row.count) for row in table] == [("multiple", 0.0, 1)]


# ------------------------------------------------------------------ the split


def test_a_scenario_is_on_one_side_in_all_its_categories() -> None:
    sides = Counter(split(f"multi_turn_base_{number}") for number in range(200))
    assert sides == {"train": 103, "test": 97}
    for category in MULTI_TURN:
        for task in tasks(category):
            assert task.source == scenario(task.prompt.id)
            number = task.prompt.id.rsplit("_", 1)[1]
            assert split(task.prompt.id) == split(f"multi_turn_base_{number}")
            assert split(f"{task.prompt.id}-3") == split(task.prompt.id)
    assert {split(task.prompt.id) for task in tasks("multiple")} == {"test"}


# ------------------------------------------------------------------ several turns


def check_traces(category: str, every: int, chance: Random) -> Counter[tuple[str, bool]]:
    seen: Counter[tuple[str, bool]] = Counter()
    reader = official.handler("hermes")
    for task in tasks(category)[::every]:
        for how, replies in traces(task, chance):
            theirs = official.judge(category, task.prompt.id, replies, reader)
            ours = played(task, replies)
            expected = (theirs["valid"], official.kind(theirs))
            assert (ours["success"], ours["kind"]) == expected, (task.prompt.id, how)
            seen[how, ours["success"]] += 1
    return seen


@pytest.mark.parametrize("category", MULTI_TURN)
def test_episodes_of_several_turns_get_the_official_verdict(category: str) -> None:
    seen = check_traces(category, 50, Random(category))
    assert (seen["gold", True], seen["gold, one by one", True]) == (4, 4)
    assert seen["nothing called", False] == 4
    assert {valid for _, valid in seen} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("category", MULTI_TURN)
def test_episodes_of_every_entry_get_the_official_verdict(category: str) -> None:
    seen = check_traces(category, 1, Random(category))
    assert seen["gold", True] == seen["gold, one by one", True] == 200
    assert seen["nothing called", False] == 200
