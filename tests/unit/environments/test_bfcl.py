"""BFCL's backends as an environment: the package's own gold calls succeed, anything less does not,
and every replay is the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError
from rest_mega.environments import ToolError, make_environment
from rest_mega.environments.bfcl import BACKENDS, function_specs
from rest_mega.environments.schema import check_parameters, mismatch
from rest_mega.records import ToolCall
from tests.support.calls import outcomes, row

pytest.importorskip(
    "bfcl_eval",
    reason="bfcl-eval is not installed: pip install --no-deps 'bfcl-eval>=2026.3' mpmath",
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
        assert first[1] == {"success": True, "state": True, "outputs": True}, one["id"]


def test_gold_calls_less_the_last_one_never_succeed() -> None:
    with_calls = [one for one in ROWS if one["task"]["calls"]]
    for one in with_calls:
        assert not play(one["task"], one["task"]["calls"][:-1])[1]["success"], one["id"]


def test_where_nothing_is_to_be_called_any_call_fails_the_episode() -> None:
    idle = next(one["task"] for one in ROWS if not one["task"]["calls"])
    assert play(idle, [])[1]["success"]
    name = function_specs(idle["classes"][0])[0]["function"]["name"]
    assert not play(idle, [{"name": name, "arguments": {}}])[1]["success"]


def test_the_state_decides_and_not_the_way_that_led_to_it() -> None:
    detour = [("touch", "b"), ("rm", "b"), ("touch", "a")]
    calls = [{"name": name, "arguments": {"file_name": file}} for name, file in detour]
    assert play(TASK, calls)[1] == {"success": True, "state": True, "outputs": True}
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
