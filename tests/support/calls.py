"""Replies that call tools, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rest_mega.config import EnvironmentConfig
from rest_mega.dialects import Reply, parse
from rest_mega.environments import ToolRuntime
from rest_mega.records import Prompt, ToolOutcome
from tests.support.rollouts import TOKENIZER

Call = tuple[str, Mapping[str, Any]]


def reply_of(*calls: Call) -> Reply:
    """A reply in Hermes' dialect."""
    blocks = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    text = "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    return parse(text.encode(), "hermes")


def row(environment: str, *tools: Any, **task: Any) -> Prompt:
    """A prompt that selects these tools."""
    return Prompt("p", ({"role": "user", "content": "?"},), tools, environment, task)


def runtime(**limits: Any) -> ToolRuntime:
    """A runtime with the tiny tokenizer."""
    return ToolRuntime(EnvironmentConfig(**limits), TOKENIZER)


def outcomes(
    prompt: Prompt, *calls: Call, running: ToolRuntime | None = None, **limits: Any
) -> tuple[ToolOutcome, ...]:
    """What becomes of the calls of one turn."""
    mine = running or runtime(**limits)
    try:
        return mine.open(prompt).answer(reply_of(*calls))
    finally:
        if running is None:
            mine.close()
