"""The quick-start's environment "desk": a calculator, unit conversion, a stock of items, and a
calendar.

The tools compute and keep state. An episode succeeds when its stock and calendar end as the task's
own calls would leave them, the answer names the right number, and no tool failed. How the model got
there, and in which words it answers, does not matter.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rest_mega.environments import ToolEnvironment, ToolError, environment, tool
from rest_mega.records import ToolCall

Unit = Literal["km", "m", "cm", "kg", "g", "h", "min", "s"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

UNITS: Mapping[str, tuple[str, int]] = {
    "km": ("length", 100_000),
    "m": ("length", 100),
    "cm": ("length", 1),
    "kg": ("mass", 1000),
    "g": ("mass", 1),
    "h": ("time", 3600),
    "min": ("time", 60),
    "s": ("time", 1),
}
"""Unit -> what it measures, and its size in the smallest unit of that kind."""

OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@environment("desk")
class Desk(ToolEnvironment):
    """The state of one episode: counts of items, and who is booked when."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        """`task` holds "stock" {item: count}, "free" {"person day": first free hour}, "calls" and
        "answer"."""
        super().__init__(task)
        self.stock: dict[str, int] = dict(task["stock"])
        self.booked: dict[str, int] = {}
        self.failed = False

    def call(self, call: ToolCall) -> str:
        """Run a tool and remember whether one has failed."""
        try:
            return super().call(call)
        except Exception:
            self.failed = True
            raise

    @tool
    def calculator(self, expression: str) -> int | float:
        """Compute a sum, difference, product or quotient.

        Args:
            expression: numbers joined by + - * / and brackets
        """
        if len(expression) > 100:
            raise ToolError("too long")
        try:
            return _whole(_value(ast.parse(expression, mode="eval").body))
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            raise ToolError(f"cannot compute {expression}") from None

    @tool
    def convert(self, value: float, unit: Unit, to: Unit) -> int | float:
        """Convert a value from one unit to another.

        Args:
            value: how many
            unit: of this unit
            to: the wanted unit
        """
        (kind, size), (wanted, target) = UNITS[unit], UNITS[to]
        if kind != wanted:
            raise ToolError(f"{unit} is no {wanted}")
        return _whole(value * size / target)

    @tool
    def get(self, item: str) -> int:
        """How many of an item are in stock.

        Args:
            item: its name
        """
        if item not in self.stock:
            raise ToolError(f"no {item}")
        return self.stock[item]

    @tool
    def set(self, item: str, count: int) -> str:
        """Write the count of an item into the stock.

        Args:
            item: its name
            count: the new count
        """
        self.stock[item] = count
        return "ok"

    @tool
    def find_slot(self, person: str, day: Day) -> int:
        """The first free hour of a person on a day.

        Args:
            person: who
            day: when
        """
        if f"{person} {day}" not in self.task["free"]:
            raise ToolError(f"no {person}")
        return int(self.task["free"][f"{person} {day}"])

    @tool
    def book(self, person: str, day: Day, hour: int) -> str:
        """Book a person at a free hour.

        Args:
            person: who
            day: when
            hour: the free hour
        """
        if self.task["free"].get(f"{person} {day}") != hour:
            raise ToolError("not free")
        self.booked[f"{person} {day}"] = hour
        return "ok"

    def finish(self, answer: str) -> dict[str, Any]:
        """Judge state and answer; what the right state is follows from running the task's calls."""
        wanted = Desk(self.task)
        for call in self.task["calls"]:
            wanted.call(ToolCall(call["name"], call["arguments"]))
        state = self.stock == wanted.stock and self.booked == wanted.booked
        right = said(answer) == self.task["answer"]
        return {"success": state and right and not self.failed, "state": state, "answer": right}


def said(answer: str) -> float | None:
    """The one number in an answer; None when it has none or several."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    return float(numbers[0]) if len(numbers) == 1 else None


def _value(node: ast.expr) -> int | float:
    """The value of an arithmetic tree; ValueError for anything that is not arithmetic on plain
    numbers."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def _whole(number: int | float) -> int | float:
    """12.0 as 12: the model reads one way of writing a number."""
    return int(number) if number == int(number) else round(number, 2)
