"""The quick-start's environment: its tools compute and keep state, and its verdict is of state and
answer."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.environments import ToolError, load_modules, make_environment
from rest_mega.records import ToolCall

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
(desk,) = load_modules([str(QUICKSTART / "desk.py")])

TASK = {
    "stock": {"apple": 37, "pear": 12},
    "free": {"Ann mon": 14},
    "calls": [
        {"name": "get", "arguments": {"item": "apple"}},
        {"name": "calculator", "arguments": {"expression": "37+12"}},
        {"name": "set", "arguments": {"item": "apple", "count": 49}},
    ],
    "answer": 49,
}


def episode(*calls: tuple[str, dict[str, Any]], answer: str, task: dict[str, Any] = TASK) -> bool:
    environment = make_environment("desk", task)
    for name, arguments in calls:
        try:
            environment.call(ToolCall(name, arguments))
        except ToolError:
            continue
    return bool(environment.finish(answer)["success"])


def compute(expression: str) -> str:
    return make_environment("desk", TASK).call(ToolCall("calculator", {"expression": expression}))


def expressions(depth: int = 3) -> st.SearchStrategy[tuple[str, Fraction]]:
    """Written arithmetic with its exact value, without division by zero."""
    number = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))
    if depth == 0:
        return number

    def join(
        left: tuple[str, Fraction], sign: str, right: tuple[str, Fraction]
    ) -> tuple[str, Fraction]:
        text = f"({left[0]}{sign}{right[0]})"
        if sign == "/":
            return (text, left[1] / right[1]) if right[1] else (left[0], left[1])
        return text, {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}[
            sign
        ]

    deeper = expressions(depth - 1)
    return st.one_of(number, st.builds(join, deeper, st.sampled_from("+-*/"), deeper))


@given(expressions())
def test_the_calculator_computes(example: tuple[str, Fraction]) -> None:
    text, value = example
    assert float(compute(text)) == pytest.approx(float(value), abs=0.005001, rel=1e-9)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1+",
        "1/0",
        "__import__('os')",
        "2**9",
        "x",
        "[1]",
        "True+1",
        "'a'*9",
        "1" * 101,
        "(" * 99,
        "1e308*10",
        "1j",
    ],
)
def test_the_calculator_refuses_what_is_not_arithmetic(expression: str) -> None:
    with pytest.raises(ToolError):
        compute(expression)


@given(
    st.integers(0, 10**6), st.sampled_from(sorted(desk.UNITS)), st.sampled_from(sorted(desk.UNITS))
)
def test_a_conversion_and_its_way_back_agree_with_the_definition(
    value: int, unit: str, to: str
) -> None:
    environment = make_environment("desk", TASK)
    call = ToolCall("convert", {"value": value, "unit": unit, "to": to})
    (kind, size), (wanted, target) = desk.UNITS[unit], desk.UNITS[to]
    if kind != wanted:
        with pytest.raises(ToolError):
            environment.call(call)
    else:
        assert float(environment.call(call)) == pytest.approx(
            float(Fraction(value * size, target)), abs=0.005001
        )


def test_success_is_the_right_state_and_the_right_answer_however_they_came_about() -> None:
    write = ("set", {"item": "apple", "count": 49})
    assert episode(("get", {"item": "apple"}), write, answer="Answer: 49")
    assert episode(write, answer="there are now 49 apples")
    assert not episode(write, answer="Answer: 48")
    assert not episode(write, answer="")
    assert not episode(write, answer="48 or 49")
    assert not episode(answer="Answer: 49")
    assert not episode(write, ("set", {"item": "pear", "count": 1}), answer="49")


def test_a_failed_call_forfeits_success() -> None:
    write = ("set", {"item": "apple", "count": 49})
    assert not episode(("get", {"item": "gold"}), write, answer="49")


def test_a_booking_needs_the_free_hour() -> None:
    book = {"person": "Ann", "day": "mon", "hour": 14}
    task = {**TASK, "calls": [{"name": "book", "arguments": book}], "answer": 14}
    assert episode(("book", book), answer="14", task=task)
    assert not episode(("book", {**book, "hour": 12}), answer="14", task=task)
    assert not episode(("find_slot", {"person": "Ann", "day": "mon"}), answer="14", task=task)


def test_one_episode_leaves_the_task_and_the_next_episode_untouched() -> None:
    first = make_environment("desk", TASK)
    first.call(ToolCall("set", {"item": "apple", "count": 1}))
    assert make_environment("desk", TASK).call(ToolCall("get", {"item": "apple"})) == "37"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Answer: 82", 82),
        ("82", 82),
        ("it is -3.5.", -3.5),
        ("1 2", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_one_number_of_an_answer(answer: str, number: float | None) -> None:
    assert desk.said(answer) == number
