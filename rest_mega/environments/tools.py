"""Environments whose tools are Python methods: mark them with @tool, the specs follow from their
signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from rest_mega.config import require
from rest_mega.dialects import Reply, parse
from rest_mega.environments.results import as_text
from rest_mega.environments.schema import Spec, function_spec
from rest_mega.records import ToolCall

if TYPE_CHECKING:
    from rest_mega.environments.workers import Workers

F = TypeVar("F", bound=Callable[..., Any])


class ToolError(Exception):
    """A tool's refusal; its message is what the model reads (other exceptions are shown with their
    type)."""


class TransientToolError(ToolError):
    """A refusal that another try may not meet (a server that is busy or away): calls declared
    idempotent are retried."""


class ToolCrashError(Exception):
    """The process that ran the call is gone, or had to be ended."""


@dataclass(frozen=True)
class Traits:
    """How a tool may be run."""

    concurrent: bool = False
    """Calls of one turn may run at the same time as their neighbours that are concurrent too; any
    other call sees what the calls before it left."""
    idempotent: bool = False
    """Running it twice does what running it once does: it is retried where a try failed for reasons
    of its own."""
    isolated: bool = False
    """Runs in a worker process with limits on time and memory."""


@dataclass(frozen=True)
class Conduct:
    """How the episodes of an environment are led."""

    checked: bool = True
    """Calls are checked before they reach the environment (their number, name and arguments), and a
    reply that cannot be read gets an answer. Else calls reach it as they are written, and such a
    reply is one without calls."""
    read: Callable[[bytes, str], Reply] = parse
    """(a reply, its dialect) -> its calls and texts."""
    most_steps: int | None = None
    """Replies with calls to one message of the user; the episode ends with the first one more."""


@overload
def tool(method: F) -> F: ...
@overload
def tool(
    *, concurrent: bool = False, idempotent: bool = False, isolated: bool = False
) -> Callable[[F], F]: ...
def tool(
    method: F | None = None,
    *,
    concurrent: bool = False,
    idempotent: bool = False,
    isolated: bool = False,
) -> F | Callable[[F], F]:
    """Mark a method of a ToolEnvironment as a tool that the model may call: `@tool`, or
    `@tool(concurrent=True)` and so on; see Traits.

    An isolated tool has no `self`: write `@tool(isolated=True)` above `@staticmethod`.
    """

    def mark(method: F) -> F:
        method.__tool_traits__ = Traits(concurrent, idempotent, isolated)  # type: ignore[attr-defined]
        return method

    return mark if method is None else mark(method)


class ToolEnvironment:
    """One episode's state; every method marked with @tool is a tool, and its spec is built with the
    class.

    A tool's arguments fit its annotations when it is called. What it returns is shown to the model:
    a string as it is, anything else as compact JSON.
    """

    specs: ClassVar[tuple[Spec, ...]] = ()
    traits: ClassVar[Mapping[str, Traits]] = {}
    conduct: ClassVar[Conduct] = Conduct()
    workers: Workers | None = None
    """Where isolated tools run; set by the runtime that opens the episode."""

    def __init_subclass__(cls) -> None:
        """Collect the tools, inherited ones first; ConfigError for a signature that has no
        schema."""
        cls.traits = {
            name: traits
            for parent in reversed(cls.__mro__)
            for name, method in vars(parent).items()
            if (traits := getattr(method, "__tool_traits__", None)) is not None
        }
        cls.specs = tuple(function_spec(getattr(cls, name)) for name in cls.traits)
        for name, traits in cls.traits.items():
            require(
                not traits.isolated or _stands_alone(cls, name),
                f"tool {cls.__qualname__}.{name} is isolated: it runs in another process, so it "
                "must be a @staticmethod of a class at the top of its module",
            )

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.task = task

    def call(self, call: ToolCall) -> str:
        """Run the named tool; what it raises is the caller's to report."""
        method = getattr(self, call.name)
        if not self.traits[call.name].isolated:
            return as_text(method(**call.arguments))
        assert self.workers is not None, "isolated tools are called through a ToolRuntime"
        return self.workers.run(method, call.arguments)

    def next_user(self, answer: str) -> str | None:
        """What the user says after a reply without calls; None ends the episode."""
        return None

    def finish(self, answer: str) -> dict[str, Any]:
        """The verdict on the episode; a subclass that judges returns {"success": bool, ...}."""
        return {}


def _stands_alone(cls: type, name: str) -> bool:
    """A worker process can import it, and needs no object to call it on."""
    method = inspect.getattr_static(cls, name)
    return isinstance(method, staticmethod) and "<locals>" not in method.__qualname__
