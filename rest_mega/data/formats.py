"""Public forms of tool-use data -> prompts whose `task` holds the gold calls.

- `toolrl`, `api-bank`: the system prompt shows tools and format, so the task has ToolRL's gold
  reply too (`ground_truth`): the rewards `toolrl`, `tool_calls` and `format` judge them.
- `bfcl`, `chat`: the chat template shows the tools, and calls are written in the policy's dialect:
  `tool_calls` judges them, and `format` by that dialect's grammar.
- `prompts`: the trainer's own rows as they are; their environment judges them.

No form guesses a gold reply: a row without one is a RowError that says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rest_mega.data.bfcl_rows import bfcl_prompt, bfcl_rows, training_side
from rest_mega.data.chat_rows import chat_prompts, dialogue_id
from rest_mega.data.prompts import prompt_of, toolrl_task
from rest_mega.data.rows import Row, RowError, digest, expect, read_rows
from rest_mega.records import Message, Prompt

THOUGHT = "I should use the appropriate tool with proper parameters to respond to the user's need."
"""What rlla_4k's gold replies think; no reward compares it."""


@dataclass(frozen=True)
class Format:
    """One form of rows."""

    convert: Callable[[str, Mapping[str, Any]], Sequence[Prompt]]
    """(place, row) -> its prompts; RowError for a bad row."""
    read: Callable[[Path], Iterator[Row]] = read_rows
    row_id: Callable[[Prompt], str] = attrgetter("id")
    """A prompt's row: prompts of one row stay on one side of a split."""
    side: Callable[[str], str] = lambda _: ""
    """Id of a prompt -> "train" or "test" where its data has a split of its own; else empty."""


def _toolrl(place: str, row: Mapping[str, Any]) -> list[Prompt]:
    """rlla_4k's Parquet columns, or its raw rows {"instruction", "input", "output"}."""
    if "instruction" not in row:
        for key in ("prompt", "reward_model"):
            expect(key in row, place, key, row.get(key), "a column of a ToolRL row")
        return [prompt_of(place, row, name=digest(row["prompt"]))]
    question = [
        {"role": role, "content": row.get(key)}
        for role, key in (("system", "instruction"), ("user", "input"))
    ]
    return [_with_gold(place, f"toolrl-{digest(question)}", question, row.get("output"), "output")]


def _api_bank(place: str, row: Mapping[str, Any]) -> list[Prompt]:
    """{"system", "user", "answer", "other"}: the answer is one call or a list of calls."""
    question = [{"role": role, "content": row.get(role)} for role in ("system", "user")]
    answer, origin = row.get("answer"), row.get("other")
    calls = [answer] if isinstance(answer, dict) else answer
    good = isinstance(calls, list) and bool(calls) and all(map(_is_call, calls))
    rule = 'the gold call, or a list of them, each {"name": string, "parameters": object}'
    expect(good, place, "answer", answer, rule)
    lines = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls or ())
    gold = f"<think> {THOUGHT} </think>\n<tool_call>\n{lines}\n</tool_call>"
    parts = list(origin.values()) if isinstance(origin, dict) else [digest(question)]
    name = "-".join(["api-bank", *map(str, parts)])
    return [_with_gold(place, name, question, gold, "answer")]


def _is_call(call: object) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("parameters"), dict)
    )


def _with_gold(place: str, name: str, question: Sequence[Message], gold: Any, key: str) -> Prompt:
    """A prompt with a gold reply in ToolRL's format, which stands in the row's `key`."""
    expect(isinstance(gold, str) and bool(gold), place, key, gold, "the gold reply as a string")
    row = {"id": name, "messages": list(question), "task": toolrl_task(place, str(gold), key)}
    return prompt_of(place, row, name)


def _ours(place: str, row: Mapping[str, Any]) -> list[Prompt]:
    """A row that the trainer reads: it needs what judges it."""
    prompt = prompt_of(place, row, name=digest(row.get("prompt")))
    if prompt.environment == "none" and "calls" not in prompt.task:
        rule = "the environment that judges the prompt, or task must have gold `calls`"
        raise RowError(place, f"environment='none' must be {rule}", f"no gold: {rule}")
    return [prompt]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "toolrl": Format(_toolrl),
        "bfcl": Format(bfcl_prompt, bfcl_rows, side=training_side),
        "api-bank": Format(_api_bank),
        "chat": Format(chat_prompts, row_id=dialogue_id),
        "prompts": Format(_ours),
    }
)
"""Name -> form."""
