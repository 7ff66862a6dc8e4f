"""Every call of a reply is answered: checked against its tool's schema, run under a deadline, its
result cut."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rest_mega.config import EnvironmentConfig
from rest_mega.environments.deadline import DeadlineError, within
from rest_mega.environments.registry import Environment
from rest_mega.environments.schema import mismatch
from rest_mega.environments.tools import ToolError
from rest_mega.records import ToolCall, ToolOutcome

if TYPE_CHECKING:
    from rest_mega.dialects import Reply


def answer_calls(
    environment: Environment, reply: Reply, limits: EnvironmentConfig
) -> tuple[ToolOutcome, ...]:
    """One outcome per call of the reply, in order; one `malformed` outcome for a reply that does
    not parse.

    Calls run one after another: later ones see the state that earlier ones left. Nothing that a
    tool does (raise, hang, return 10 MB) raises or blocks here.
    """
    if not reply.well_formed:
        return (_failed("malformed", reply.error, limits),)
    schemas = {
        spec["function"]["name"]: spec["function"]["parameters"] for spec in environment.specs
    }
    return tuple(
        _answer(environment, schemas, call, limits)
        if index < limits.calls_per_turn
        else _failed("refused", f"more than {limits.calls_per_turn} calls in one turn", limits)
        for index, call in enumerate(reply.calls)
    )


def _answer(
    environment: Environment,
    schemas: Mapping[str, Mapping[str, Any]],
    call: ToolCall,
    limits: EnvironmentConfig,
) -> ToolOutcome:
    if call.name not in schemas:
        return _failed(
            "unknown_tool", f"no tool {call.name!r}; known: {', '.join(schemas) or 'none'}", limits
        )
    if complaint := mismatch(call.arguments, schemas[call.name]):
        return _failed("bad_arguments", complaint, limits)
    start = time.perf_counter()
    status, content = _run(environment, call, limits.call_timeout_s)
    return ToolOutcome(status, _cut(content, limits), time.perf_counter() - start)


def _run(environment: Environment, call: ToolCall, seconds: float) -> tuple[str, str]:
    try:
        return "ok", within(seconds, lambda: str(environment.call(call)))
    except DeadlineError as error:
        return "timeout", f"error: {error}"
    except ToolError as error:
        return "error", f"error: {error}"
    except Exception as error:
        return "error", f"error: {type(error).__name__}: {error}"


def _failed(status: str, why: str, limits: EnvironmentConfig) -> ToolOutcome:
    return ToolOutcome(status, _cut(f"error: {why}", limits))


def _cut(content: str, limits: EnvironmentConfig) -> str:
    """At most `result_characters`, its end telling that it was cut; bytes that UTF-8 cannot hold
    replaced."""
    limit = limits.result_characters
    if len(content) > limit:
        note = f"... [{len(content)} characters]"
        content = content[: limit - len(note)] + note if len(note) < limit else content[:limit]
    return content.encode("utf-8", "replace").decode("utf-8")
