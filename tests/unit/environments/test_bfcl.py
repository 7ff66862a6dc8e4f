"""BFCL's backends as an environment: the package's own gold calls succeed, anything less does not,
and every replay is the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rest_mega.config import ConfigError
from rest_mega.data.bfcl_rows import MORE_FUNCTIONS, bfcl_prompt, bfcl_rows
from rest_mega.environments import ToolError, make_environment
from rest_mega.environments.bfcl import gold_call
from rest_mega.environments.bfcl_package import BACKENDS, function_specs, package_data
from rest_mega.environments.schema import check_parameters, mismatch
from rest_mega.records import Prompt, ToolCall, Trajectory
from rest_mega.rollout.engine import Sampling
from tests.support.calls import outcomes, row
from tests.support.rollouts import SEED, TOKENIZER, ScriptedEngine, collector

pytest.importorskip(
    "bfcl_eval",
    reason="bfcl-eval is not installed: make bfcl",
)
EVERY = 8
"""Of the package's entries, one in so many."""


def tool_module() -> Any:
    path = Path(__file__).parents[3] / "tools" / "make_bfcl_rows.py"
    spec = importlib.util.spec_from_file_location("make_bfcl_rows", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = tool_module()


def rows() -> Iterator[dict[str, Any]]:
    for category in ("base", "miss_func", "miss_param"):
        for number, (entry, gold) in enumerate(MAKE.entries(category)):
            if number % EVERY == 0:
                yield from MAKE.rows(entry, gold)


ROWS = list(rows())
FILES = {"root": {"home": {"type": "directory", "contents": {}}}}
TASK: dict[str, Any] = {
    "classes": ["GorillaFileSystem"],
    "config": {"GorillaFileSystem": FILES},
    "calls": [{"name": "touch", "arguments": {"file_name": "a"}}],
}

RIGHT = {"success": True, "state": True, "outputs": True, "kind": "", "reason": ""}


def play(task: dict[str, Any], calls: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    world = make_environment("bfcl", task)
    texts = []
    for call in calls:
        try:
            texts.append(world.call(ToolCall(call["name"], call["arguments"])))
        except ToolError as error:
            texts.append(f"error: {error}")
    return texts, dict(world.finish(""))


def test_the_packages_own_gold_calls_succeed_and_are_the_same_twice() -> None:
    assert len(ROWS) > 250
    for one in ROWS:
        first, second = (play(one["task"], one["task"]["calls"]) for _ in range(2))
        assert first == second
        assert first[1] == RIGHT, one["id"]


def test_gold_calls_less_the_last_one_never_succeed() -> None:
    with_calls = [one for one in ROWS if one["task"]["calls"]]
    for one in with_calls:
        assert not play(one["task"], one["task"]["calls"][:-1])[1]["success"], one["id"]


# ------------------------------------------------------------------ entries of several turns

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")


@lru_cache
def whole_entries(category: str) -> tuple[Prompt, ...]:
    """One of four of the package's 200 entries, as prompts."""
    path = package_data() / f"BFCL_v4_multi_turn_{category}.json"
    found = list(bfcl_rows(path))[::4]
    return tuple(prompt for row in found for prompt in bfcl_prompt(row.place, row.fields()))


def play_turns(prompt: Prompt, turns: list[list[Any]], offered_only: bool = True) -> dict[str, Any]:
    """The verdict where the policy makes these calls turn by turn, and then talks."""
    world = make_environment("bfcl", prompt.task)
    for number, calls in enumerate(turns):
        offered = {spec["function"]["name"] for spec in world.specs}
        for text in calls:
            call = gold_call(text, prompt.task["classes"])
            assert call["name"] in offered or not offered_only, (prompt.id, number)
            with suppress(ToolError):
                world.call(ToolCall(call["name"], call["arguments"]))
        assert (world.next_user("Done.") is None) == (number + 1 == len(prompt.task["turns"]))
    return dict(world.finish("Done."))


def gold(prompt: Prompt) -> list[list[Any]]:
    return [list(turn["calls"]) for turn in prompt.task["turns"]]


@pytest.mark.parametrize("category", CATEGORIES)
def test_gold_calls_of_whole_entries_succeed_and_less_the_last_fail(category: str) -> None:
    prompts = whole_entries(category)
    assert len(prompts) == 50
    for prompt in prompts:
        calls = gold(prompt)
        assert play_turns(prompt, calls)["success"], prompt.id
        last = max(number for number, turn in enumerate(calls) if turn)
        calls[last].pop()
        assert not play_turns(prompt, calls)["success"], prompt.id


def spoilt(calls: list[list[str]], chance: Random) -> list[list[str]]:
    """The turns with one call left out, done twice, moved to another turn or to another place."""
    turns = [list(turn) for turn in calls]
    start = chance.choice([number for number, turn in enumerate(turns) if turn])
    call = turns[start].pop(chance.randrange(len(turns[start])))
    how = chance.randrange(4)
    if how < 3:
        target = turns[start] if how < 2 else chance.choice(turns)
        target.insert(chance.randint(0, len(target)), call)
    if how == 0:
        turns[start].insert(0, call)
    return turns


def test_the_verdict_is_that_of_bfcls_own_checker() -> None:
    checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    chance, seen = Random(0), set()
    for number, prompt in enumerate(p for c in CATEGORIES[:3] for p in whole_entries(c)):
        calls = spoilt(gold(prompt), chance)
        entry = {
            "id": prompt.id,
            "initial_config": prompt.task["config"],
            "involved_classes": prompt.task["classes"],
        }
        replies = [[turn] if turn else [] for turn in calls]
        official = checker.multi_turn_checker(replies, gold(prompt), entry, "", f"spoilt_{number}")[
            "valid"
        ]
        assert play_turns(prompt, calls, offered_only=False)["success"] == official, prompt.id
        seen.add(official)
    assert seen == {True, False}


def test_a_turn_that_is_wrong_or_never_played_fails_the_episode() -> None:
    prompt = next(p for p in whole_entries("base") if len(gold(p)) > 2 and len(gold(p)[0]) > 1)
    first, *rest = gold(prompt)
    late = [first[:-1], [first[-1], *rest[0]], *rest[1:]]  # right at the end, not at every turn
    assert not play_turns(prompt, late)["success"]
    assert play_turns(prompt, [first, *rest])["success"]
    world = make_environment("bfcl", prompt.task)
    for text in first:
        call = gold_call(text, prompt.task["classes"])
        world.call(ToolCall(call["name"], call["arguments"]))
    verdict = dict(world.finish(""))
    assert verdict == {
        **RIGHT,
        "success": False,
        "kind": "multi_turn:force_terminated",
        "reason": f"1 of {len(rest) + 1} turns were played",
    }


def test_functions_that_are_missing_are_offered_at_their_turn_with_their_documents() -> None:
    for prompt in whole_entries("miss_func"):
        (number,) = [n for n, turn in enumerate(prompt.task["turns"]) if turn["offers"]]
        names = set(prompt.task["turns"][number]["offers"])
        world = make_environment("bfcl", prompt.task)
        for _ in range(number):
            assert not names & {spec["function"]["name"] for spec in world.specs}
            said = world.next_user("I cannot.")
        assert said is not None
        *documents, message = said.split("\n")
        offered = [json.loads(text)["function"]["name"] for text in documents]
        assert (set(offered), len(offered)) == (names, len(names))
        assert message == MORE_FUNCTIONS
        assert names <= {spec["function"]["name"] for spec in world.specs}


def test_an_episode_of_several_turns_is_played_by_the_collector() -> None:
    """The gold calls as replies, all of a turn at once, through parser, schemas and deltas."""
    prompts = {c: whole_entries(c)[1] for c in ("base", "miss_func")}
    for prompt in prompts.values():
        script: list[str] = []
        for turn in gold(prompt):
            calls = [gold_call(text, prompt.task["classes"]) for text in turn]
            blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
            script += ["\n".join(blocks)] * bool(turn) + ["Done."]
        engine = ScriptedEngine({(prompt.id, 0): script})
        sized = collector(engine, max_tokens=100_000, max_new_tokens=10_000, max_turns=20)
        groups = sized.collect([prompt], 1, Sampling(), SEED)
        assert groups is not None
        (played,) = groups[0]
        assert (played.stop, len(played.turns)) == ("answered", len(script))
        assert played.result == RIGHT
        text = TOKENIZER.decode(played.ids_T.tolist())
        assert all(turn["user"] in text for turn in prompt.task["turns"])


# ------------------------------------------------------------------ led as BFCL's runner does


def benchmark(*replies: str, turns: int = 1) -> Trajectory:
    """An episode of TASK, said `turns` times, in which the policy writes these replies."""
    world = {key: TASK[key] for key in ("classes", "config")}
    later = [{"user": "again", "calls": []}] * (turns - 1)
    task = {**world, "benchmark": True, "turns": [{"calls": TASK["calls"]}, *later]}
    prompt = Prompt("p", ({"role": "user", "content": "go"},), environment="bfcl", task=task)
    engine = ScriptedEngine({("p", 0): list(replies)})
    sized = collector(engine, max_tokens=100_000, max_new_tokens=10_000, max_turns=99)
    groups = sized.collect([prompt], 1, Sampling(), SEED)
    assert groups is not None
    return groups[0][0]


def called(name: str, **arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def test_in_a_benchmark_calls_are_run_as_they_are_written() -> None:
    played = benchmark(called("tuch"), called("_load_scenario"), called("touch", file=1), "Done.")
    texts = [outcome.content for turn in played.turns for outcome in turn.outcomes]
    assert texts[0] == "Error during execution: name 'tuch' is not defined"
    assert texts[1] == "Error during execution: name '_load_scenario' is not defined"
    assert "unexpected keyword argument 'file'" in texts[2]
    assert played.result["kind"] == "multi_turn:instance_state_mismatch"
    assert benchmark(called("touch", file_name="a"), "Done.").result == RIGHT


def test_in_a_benchmark_a_reply_that_cannot_be_read_ends_the_users_turn() -> None:
    played = benchmark("<tool_call>\n{", called("touch", file_name="a"), "Done.", turns=2)
    assert (played.stop, len(played.turns)) == ("answered", 3)
    assert played.turns[0].outcomes == ()
    assert played.result["kind"] == "multi_turn:empty_turn_model_response"


def test_in_a_benchmark_replies_are_read_as_bfcls_handler_reads_them() -> None:
    """A broken block beside a good one is dropped; a block needs its breaks of lines."""
    good = called("touch", file_name="a")
    broken = f"<tool_call>\n{{\n</tool_call>\n{good}"
    played = benchmark(broken, "Done.")
    assert [call.name for call in played.turns[0].calls] == ["touch"]
    assert played.result == RIGHT
    assert benchmark(good.replace("\n", ""), "Done.").turns[0].outcomes == ()


def test_in_a_benchmark_more_than_twenty_replies_with_calls_to_one_message_end_the_episode() -> (
    None
):
    ask = called("ls")
    right = [called("touch", file_name="a")]
    kept = benchmark(*right, *[ask] * 19, "Done.", *[ask] * 20, "Done.", turns=2)
    assert (kept.stop, kept.result) == ("answered", RIGHT)
    cut = benchmark(*right, *[ask] * 99, turns=2)
    assert (cut.stop, len(cut.turns)) == ("turn_limit", 21)
    assert cut.result["kind"] == "multi_turn:force_terminated"
    assert benchmark(*right, *[ask] * 99).result == RIGHT  # the last turn counts as it stands


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calls": ["touch("]}, "gold call 'touch.' of a bfcl task must be name"),
        ({"calls": ["touch(file_name=open)"]}, "must be name.argument=literal"),
        ({"calls": ["tuch('a')"]}, "gold call .* is of none of the classes GorillaFileSystem"),
        ({"offers": ["tuch"], "calls": []}, "'tuch' is not known.*nearest: touch"),
    ],
)
def test_a_turn_that_cannot_be_played_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_environment("bfcl", {**TASK, "turns": [TASK, changes]})


# ------------------------------------------------------------------ entries of one turn


def test_where_nothing_is_to_be_called_any_call_fails_the_episode() -> None:
    idle = next(one["task"] for one in ROWS if not one["task"]["calls"])
    assert play(idle, [])[1]["success"]
    name = function_specs(idle["classes"][0])[0]["function"]["name"]
    assert not play(idle, [{"name": name, "arguments": {}}])[1]["success"]


def test_the_state_decides_and_not_the_way_that_led_to_it() -> None:
    detour = [("touch", "b"), ("rm", "b"), ("touch", "a")]
    calls = [{"name": name, "arguments": {"file_name": file}} for name, file in detour]
    assert play(TASK, calls)[1] == RIGHT
    assert play(TASK, calls[:1])[1]["state"] is False


def test_siblings_share_no_state_and_the_row_is_left_as_it_was() -> None:
    before = json.dumps(TASK)
    play(TASK, TASK["calls"])
    assert play(TASK, [{"name": "ls", "arguments": {}}])[0] == ['{"current_directory_content": []}']
    assert json.dumps(TASK) == before


def test_calls_go_through_the_runtime_with_checked_arguments_and_selected_tools() -> None:
    done = outcomes(
        row("bfcl", "touch", "ls", **TASK),
        *[("touch", {"file_name": 3}), ("rm", {"file_name": "a"}), ("touch", {"file_name": "a"})],
        ("touch", {"file_name": "a"}),
    )
    assert [o.status for o in done] == ["bad_arguments", "unknown_tool", "ok", "ok"]


def test_every_backend_has_specs_that_can_be_checked_and_fit_the_gold_calls() -> None:
    schemas: dict[str, Any] = {}
    for name in BACKENDS:
        for spec in function_specs(name):
            function = spec["function"]
            schemas[function["name"]] = check_parameters(function["parameters"], name)
    calls = [call for one in ROWS for call in one["task"]["calls"]]
    assert len(calls) > 300
    assert [c for c in calls if mismatch(c["arguments"], schemas[c["name"]])] == []


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'TicketApi' is not known.*nearest: TicketAPI"):
        make_environment("bfcl", {"classes": ["TicketApi"], "config": {}, "calls": []})
