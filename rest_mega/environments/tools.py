"""Environments whose tools are Python methods: mark them with @tool, the specs follow from their
signatures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from rest_mega.environments.schema import Spec, function_spec
from rest_mega.records import ToolCall

F = TypeVar("F", bound=Callable[..., Any])


class ToolError(Exception):
    """A tool's refusal; its message is what the model reads (other exceptions are shown with their
    type)."""


def tool(method: F) -> F:
    """Mark a method of a ToolEnvironment as a tool that the model may call."""
    method.__is_tool__ = True  # type: ignore[attr-defined]
    return method


class ToolEnvironment:
    """One episode's state; every method marked with @tool is a tool, and its spec is built with the
    class.

    A tool's arguments fit its annotations when it is called. What it returns is shown to the model:
    a string as it is, anything else as compact JSON.
    """

    specs: ClassVar[tuple[Spec, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Collect the tools, inherited ones first; ConfigError for a signature that has no
        schema."""
        names = {
            name
            for parent in cls.__mro__
            for name, f in vars(parent).items()
            if hasattr(f, "__is_tool__")
        }
        order = [name for parent in reversed(cls.__mro__) for name in vars(parent) if name in names]
        cls.specs = tuple(function_spec(getattr(cls, name)) for name in dict.fromkeys(order))

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.task = task

    def call(self, call: ToolCall) -> str:
        """Run the named tool; what it raises is the caller's to report."""
        result = getattr(self, call.name)(**call.arguments)
        return (
            result
            if isinstance(result, str)
            else json.dumps(result, ensure_ascii=False, separators=(",", ":"))
        )

    def finish(self, answer: str) -> dict[str, Any]:
        """The verdict on the episode; a subclass that judges returns {"success": bool, ...}."""
        return {}
