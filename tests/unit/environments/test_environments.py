"""Environments: specs from signatures, arguments against schemas, and an outcome for every call."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.config import ConfigError, EnvironmentConfig
from rest_mega.dialects import parse
from rest_mega.environments import (
    ENVIRONMENTS,
    ToolEnvironment,
    ToolError,
    answer_calls,
    environment,
    load_modules,
    make_environment,
    tool,
)
from rest_mega.environments.deadline import DeadlineError, within
from rest_mega.environments.schema import function_spec, mismatch, type_schema
from rest_mega.records import ToolOutcome


class Shelf(ToolEnvironment):
    """A small stateful environment with one tool of each behaviour."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self.stock = dict(task.get("stock", {}))

    @tool
    def take(self, item: str, count: int = 1) -> int:
        """Take items
        off the shelf.

        More text that the model need not see.

        Args:
            item: what to take,
                by its name
            count: how many
        """
        if self.stock.get(item, 0) < count:
            raise ToolError(f"only {self.stock.get(item, 0)} {item}")
        self.stock[item] -= count
        return int(self.stock[item])

    @tool
    def ship(
        self,
        to: Literal["home", "shop"],
        items: list[str],
        weight: float,
        fast: bool,
        note: str | None = None,
    ) -> dict[str, Any]:
        """Ship items."""
        return {"to": to, "items": items, "weight": weight, "fast": fast, "note": note}

    @tool
    def hang(self, how: str) -> str:
        """Never come back."""
        while how == "loop":
            pass
        threading.Event().wait(None if how == "wait" else 0)
        return ""

    @tool
    def fail(self) -> str:
        """Raise."""
        raise KeyError("gone")

    @tool
    def leave(self) -> str:
        """Try to end the program."""
        raise SystemExit(3)

    @tool
    def flood(self, size: int) -> str:
        """Return much."""
        return "x" * size

    def finish(self, answer: str) -> dict[str, Any]:
        """Success when the answer names the apples left."""
        return {"success": answer == str(self.stock["apple"])}


def reply_of(*calls: tuple[str, Mapping[str, Any]]) -> bytes:
    blocks = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks).encode()


def answer(
    shelf: ToolEnvironment, *calls: tuple[str, Mapping[str, Any]], **limits: Any
) -> tuple[ToolOutcome, ...]:
    return answer_calls(shelf, parse(reply_of(*calls), "hermes"), EnvironmentConfig(**limits))


def test_spec_is_the_signature_and_the_docstring() -> None:
    assert Shelf.specs[0] == {
        "type": "function",
        "function": {
            "name": "take",
            "description": "Take items off the shelf.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": "what to take, by its name"},
                    "count": {"type": "integer", "description": "how many", "default": 1},
                },
                "required": ["item"],
            },
        },
    }
    assert Shelf.specs[1]["function"]["parameters"]["properties"] == {
        "to": {"type": "string", "enum": ["home", "shop"]},
        "items": {"type": "array", "items": {"type": "string"}},
        "weight": {"type": "number"},
        "fast": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    }


def test_tools_are_inherited_in_order_and_may_be_overridden() -> None:
    class Bigger(Shelf):
        def take(self, item: str) -> str:  # type: ignore[override]
            """Take all."""
            return item

        @tool
        def extra(self) -> str:
            """One more."""
            return "!"

    names = [spec["function"]["name"] for spec in Bigger.specs]
    assert names == ["take", "ship", "hang", "fail", "leave", "flood", "extra"]
    assert Bigger.specs[0]["function"]["description"] == "Take all."


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(self, x): ...", "'x' has no type"),
        ("def f(self, x: complex): ...", "'x' has type <class 'complex'>"),
        ("def f(self, *x: int): ...", "ordinary named parameter"),
    ],
)
def test_a_signature_without_a_schema_is_refused(source: str, said: str) -> None:
    names: dict[str, Any] = {}
    exec(source, names)
    with pytest.raises(ConfigError, match=said):
        function_spec(names["f"])


@given(
    st.sampled_from([(int, "integer"), (float, "number"), (str, "string"), (bool, "boolean")]),
    st.one_of(
        st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())
    ),
)
def test_scalars_fit_as_json_says(kind: tuple[Any, str], value: Any) -> None:
    """Independent reference: the JSON type that the encoder writes, whole numbers being numbers
    too."""
    written = json.dumps(value)
    is_whole = written.lstrip("-").isdigit()
    expected = {
        "integer": is_whole,
        "number": is_whole
        or (isinstance(value, float) and written not in ("NaN", "Infinity", "-Infinity")),
        "string": written[0] == '"',
        "boolean": written in ("true", "false"),
    }[kind[1]]
    assert (mismatch(value, type_schema(kind[0], "x")) == "") is expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"item": "apple"}, ""),
        ({"item": "apple", "count": 2}, ""),
        ({}, "item is missing"),
        ({"item": "apple", "many": 2}, "many is unknown; known: item, count"),
        ({"item": "apple", "count": True}, "count must be integer, not True"),
        ({"item": "apple", "count": 2.0}, "count must be integer, not 2.0"),
        (
            {"item": "a" * 99, "count": "b" * 99},
            f"count must be integer, not {('b' * 99)!r:.37}...",
        ),
    ],
)
def test_arguments_are_checked_against_the_schema(arguments: dict[str, Any], said: str) -> None:
    assert mismatch(arguments, Shelf.specs[0]["function"]["parameters"]) == said


def test_nested_arguments_are_checked_with_their_path() -> None:
    schema = Shelf.specs[1]["function"]["parameters"]
    good: dict[str, Any] = {"to": "home", "items": ["a"], "weight": 1, "fast": False, "note": None}
    assert mismatch(good, schema) == ""
    assert mismatch({**good, "items": ["a", 3]}, schema) == "items[1] must be string, not 3"
    assert mismatch({**good, "to": "sea"}, schema) == "to must be one of home, shop, not 'sea'"
    assert (
        mismatch({**good, "note": 3}, schema)
        == "note must be string, not 3 or note must be null, not 3"
    )


def test_an_enum_does_not_take_true_for_one() -> None:
    schema = type_schema(Literal[1, 2], "x")
    assert mismatch(1, schema) == ""
    assert mismatch(True, schema) != ""


def test_calls_of_one_reply_see_each_others_state_and_the_verdict_is_of_the_final_state() -> None:
    shelf = Shelf({"stock": {"apple": 5}})
    outcomes = answer(shelf, ("take", {"item": "apple", "count": 2}), ("take", {"item": "apple"}))
    assert [(o.status, o.content) for o in outcomes] == [("ok", "3"), ("ok", "2")]
    assert shelf.finish("2") == {"success": True}
    assert shelf.finish("3") == {"success": False}


@pytest.mark.parametrize(
    ("call", "status", "content"),
    [
        (
            ("nosuch", {}),
            "unknown_tool",
            "error: no tool 'nosuch'; known: take, ship, hang, fail, leave, flood",
        ),
        (("take", {"count": 1}), "bad_arguments", "error: item is missing"),
        (("take", {"item": "pear"}), "error", "error: only 0 pear"),
        (("fail", {}), "error", "error: KeyError: 'gone'"),
        (("leave", {}), "error", "error: RuntimeError: SystemExit: 3"),
        (
            ("ship", {"to": "shop", "items": [], "weight": 1, "fast": True}),
            "ok",
            '{"to":"shop","items":[],"weight":1,"fast":true,"note":null}',
        ),
    ],
)
def test_every_call_has_a_typed_outcome(
    call: tuple[str, dict[str, Any]], status: str, content: str
) -> None:
    (outcome,) = answer(Shelf({"stock": {}}), call)
    assert (outcome.status, outcome.content) == (status, content)


def test_private_methods_are_not_tools() -> None:
    (outcome,) = answer(Shelf({}), ("finish", {"answer": "1"}))
    assert outcome.status == "unknown_tool"


def test_a_malformed_reply_has_one_outcome_that_says_why() -> None:
    reply = parse(b'<tool_call>\n{"name": "take", "arguments": {', "hermes")
    (outcome,) = answer_calls(Shelf({}), reply, EnvironmentConfig())
    assert outcome.status == "malformed"
    assert outcome.content == f"error: {reply.error}"


def test_a_reply_without_calls_has_no_outcomes() -> None:
    assert answer_calls(Shelf({}), parse(b"done", "hermes"), EnvironmentConfig()) == ()


def test_calls_past_the_limit_are_refused_and_still_answered() -> None:
    shelf = Shelf({"stock": {"apple": 9}})
    outcomes = answer(shelf, *[("take", {"item": "apple"})] * 5, calls_per_turn=2)
    assert [o.status for o in outcomes] == ["ok", "ok", "refused", "refused", "refused"]
    assert shelf.stock["apple"] == 7


@given(st.integers(0, 200), st.integers(1, 100))
def test_a_long_result_is_cut_to_the_limit(size: int, limit: int) -> None:
    (outcome,) = answer(Shelf({}), ("flood", {"size": size}), result_characters=limit)
    assert len(outcome.content) == min(size, limit)
    assert size > limit or outcome.content == "x" * size
    assert not (size > limit > 25) or outcome.content.endswith(f"... [{size} characters]")


def test_a_lone_surrogate_in_a_result_is_replaced() -> None:
    class Odd(ToolEnvironment):
        @tool
        def odd(self) -> str:
            """A string that UTF-8 cannot hold."""
            return "a\udc80b"

    (outcome,) = answer(Odd({}), ("odd", {}))
    assert outcome.content == "a?b"


@pytest.mark.parametrize("how", ["loop", "wait"])
def test_a_hanging_tool_times_out_and_the_next_call_is_answered(how: str) -> None:
    shelf = Shelf({"stock": {"apple": 1}})
    outcomes = answer(
        shelf, ("hang", {"how": how}), ("take", {"item": "apple"}), call_timeout_s=0.05
    )
    assert [o.status for o in outcomes] == ["timeout", "ok"]
    assert outcomes[0].content == "error: no result within 0.05 s"
    assert outcomes[0].seconds >= 0.05


def test_a_python_loop_past_its_deadline_ends_and_changes_nothing_afterwards() -> None:
    ticks: list[int] = []

    def tick() -> None:
        while True:
            ticks.append(1)

    before = set(threading.enumerate())
    with pytest.raises(DeadlineError):
        within(0.05, tick)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
    count = len(ticks)
    time.sleep(0.01)
    assert len(ticks) == count


def test_threads_are_reused() -> None:
    within(1, lambda: None)
    names = {within(1, threading.get_ident) for _ in range(20)}
    assert len(names) == 1


def test_registry_names_the_known_environments_and_refuses_a_second_claim() -> None:
    assert make_environment("none", {}).finish("anything") == {}
    assert tuple(make_environment("none", {}).specs) == ()
    with pytest.raises(ConfigError, match="'nnoe' is not known; choose one of none"):
        make_environment("nnoe", {})
    with pytest.raises(ConfigError, match="already registered"):
        environment("none")(Shelf)


def test_modules_are_loaded_from_files_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from rest_mega.environments import ToolEnvironment, environment\n"
        "@environment('of_a_file')\n"
        "class Mine(ToolEnvironment):\n    pass\n"
    )
    first, second, standard = load_modules([str(path), str(path), "json"])
    assert first is second
    assert standard is json
    assert type(make_environment("of_a_file", {"a": 1})) is first.Mine
    del ENVIRONMENTS["of_a_file"]


def test_modules_that_cannot_be_loaded_are_errors_that_say_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_modules([str(broken)])
    with pytest.raises(ConfigError, match="no file"):
        load_modules([str(tmp_path / "absent.py")])
    with pytest.raises(ConfigError, match="cannot import 'no_such_module_here'"):
        load_modules(["no_such_module_here"])
