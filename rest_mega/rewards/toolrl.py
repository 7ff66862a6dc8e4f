"""ToolRL's reward of one reply by its own textual rules (arXiv 2504.13958, code at
qiancheng0/ToolRL 8cee13e).

The rules are laxer and stricter than a grammar at once: the format ignores what is inside the tags,
the calls ignore what is outside them. So they read the reply's text, not its parsed calls: one line
of bad JSON anywhere voids every call, and text around the tags voids none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from rest_mega.records import ToolCall
from rest_mega.rewards.tool_calls import accuracy

SHAPES = {
    (False, False): r"<think>.*?</think>",
    (False, True): r"<think>.*?</think>\n<response>.*?</response>",
    (True, False): r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>",
    (True, True): r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>\n<response>.*?</response>",
}
"""(the gold reply has calls, it has a response) -> what a whole reply must match."""


def format_score(reply: str, gold: str) -> float:
    """F in {0, 1}: the reply has exactly the parts of the gold one, in order, each wanted tag pair
    once."""
    wanted = [tag for tag in ("tool_call", "response") if f"<{tag}>" in gold]
    shape = SHAPES["tool_call" in wanted, "response" in wanted]
    once = all(reply.count(f"<{tag}>") == reply.count(f"</{tag}>") == 1 for tag in wanted)
    return float(once and re.fullmatch(shape, reply.strip(), re.DOTALL) is not None)


def correctness(reply: str, gold: str) -> float:
    """C in [-3, 3]: 6 S_acc - 3; -3 where the reply's calls cannot be read, 0 where the gold reply
    has none.

    Raises ValueError where the gold reply's calls cannot be read.
    """
    if "<tool_call>" not in gold:
        return 0.0
    wanted = [_call(row) for row in _rows(gold)]
    names = {call.name for call in wanted}
    try:
        return 6.0 * accuracy(wanted, [_call(row, names) for row in _rows(reply)]) - 3.0
    except (ValueError, KeyError, TypeError, RecursionError):
        return -3.0


def _rows(text: str) -> list[Any]:
    """JSON values of the first <tool_call> block, one a line; ValueError where there is none, or a
    bad line."""
    _, opened, rest = text.partition("<tool_call>")
    if not opened or "</tool_call>" not in text:
        raise ValueError(f"no <tool_call> block in {text[:80]!r}")
    block = rest.partition("<tool_call>")[0].partition("</tool_call>")[0]
    return [json.loads(line) for line in block.strip().split("\n")]


def _call(row: Any, names: Collection[str] | None = None) -> ToolCall:
    """A row {"name", "parameters"} as a call; only a call of one of `names` (None: any) must have
    parameters."""
    arguments = row.get("parameters") if isinstance(row, dict) else None
    if not isinstance(arguments, dict):
        if names is None or row["name"] in names:
            raise ValueError(f"no parameters in {row!r}")
        arguments = {}
    return ToolCall(row["name"], arguments)
