"""Chat dialogues (OpenAI messages with tools) -> one prompt per assistant turn, its calls the gold.

    user | assistant: calls | tool | assistant: text
    `---- prompt ID#1 ----´
    `------------ prompt ID#2 ------------´

The calls of the demonstrated turn become `task["calls"]` (a turn that only talks has none: the
policy should call nothing there) and its text `task["response"]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rest_mega.data.messages import plain_message
from rest_mega.data.prompts import messages_of, prompt_of
from rest_mega.data.rows import digest, expect, known_keys
from rest_mega.dialects import DIALECTS
from rest_mega.records import Prompt

KEYS = ("id", "messages", "tools", "parallel_tool_calls")
CALL_TAGS = tuple(
    block.opening
    for dialect in DIALECTS.values()
    for block in dialect.blocks
    if callable(block.content)
)
"""What opens calls that are written as text."""


def chat_prompts(place: str, row: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a dialogue that ends with the assistant's turn, named by the row's id or else
    its content. RowError for a bad row."""
    known_keys(place, row, KEYS)
    messages = _messages(place, row.get("messages"))
    tools = row.get("tools") or []
    expect(isinstance(tools, list), place, "tools", tools, "a list of function specs")
    stem = row.get("id") or f"chat-{digest(messages, tools)}"
    expect(isinstance(stem, str), place, "id", stem, "a string")
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        prompt_of(
            place,
            {
                "id": f"{stem}#{number}",
                "messages": messages[:turn],
                "tools": tools,
                "task": _task(place, turn, messages[turn], tools),
            },
            "",
        )
        for number, turn in enumerate(turns, start=1)
    ]


def dialogue_id(prompt: Prompt) -> str:
    """The id of the row that a prompt was made of."""
    return prompt.id.rpartition("#")[0]


def _messages(place: str, given: object) -> list[dict[str, Any]]:
    listed = given if isinstance(given, list) else []
    plain = [_message(place, f"messages[{n}]", m) for n, m in enumerate(listed)]
    messages_of(place, "messages", plain, last=("assistant",))
    for number, (before, message) in enumerate(itertools.pairwise([{"role": ""}, *plain])):
        good = message["role"] != "assistant" or before["role"] in ("user", "tool")
        rule = "after a message of the user or a tool"
        expect(good, place, f"messages[{number}].role", message["role"], rule)
    return plain


def _task(place: str, turn: int, reply: Mapping[str, Any], tools: Sequence[Any]) -> dict[str, Any]:
    """The gold calls and the text of an assistant message."""
    calls = [call["function"] for call in reply.get("tool_calls", ())]
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    for call in calls:
        key = f"messages[{turn}].tool_calls"
        expect(call["name"] in names, place, key, call["name"], "calls of the row's tools")
    return {"calls": calls, "response": reply.get("content") or None}


def _message(place: str, key: str, message: object) -> dict[str, Any]:
    """A plain message; the assistant's must not write calls as text, as gold they would be lost."""
    plain = plain_message(place, key, message)
    if plain.get("role") == "assistant":
        _check_text(place, f"{key}.content", plain["content"] or "")
    return plain


def _check_text(place: str, key: str, text: object) -> None:
    found = [tag for tag in CALL_TAGS if isinstance(text, str) and tag in text]
    rule = "without calls written as text; give them as tool_calls"
    expect(not found, place, key, text, rule, ", ".join(found))
