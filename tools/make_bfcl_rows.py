"""Writes BFCL's multi-turn entries as rows of the environment "bfcl", one per user turn.

    python tools/make_bfcl_rows.py base > bfcl_base.jsonl

The categories are base, miss_func, miss_param and long_context. They are a benchmark: measure with
them, do not train on them. A row's messages are the user's turns up to its own, with the gold calls
and their outputs between; its environment starts where the gold calls of the turns before end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rest_mega.environments.bfcl import BfclEnvironment, gold_call
from rest_mega.environments.bfcl_package import function_specs, package_data
from rest_mega.environments.tools import ToolError
from rest_mega.records import ToolCall

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")


def entries(category: str) -> Iterator[tuple[dict[str, Any], list[list[str]]]]:
    """(entry, gold calls of every turn as text)."""
    folder, name = package_data(), f"BFCL_v4_multi_turn_{category}.json"
    questions = (folder / name).read_text("utf-8").splitlines()
    answers = (folder / "possible_answer" / name).read_text("utf-8").splitlines()
    for question, answer in zip(questions, answers, strict=True):
        yield json.loads(question), json.loads(answer)["ground_truth"]


def rows(entry: Mapping[str, Any], gold: list[list[str]]) -> Iterator[dict[str, Any]]:
    """One row per user turn that brings a message."""
    classes = entry["involved_classes"]
    long_context = "long_context" in entry["id"]
    withheld = {n: set(names) for n, names in entry.get("missed_function", {}).items()}
    world = {"classes": classes, "config": entry["initial_config"], "long_context": long_context}
    messages: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    replay = BfclEnvironment({**world, "calls": []})
    for number, (turn, texts) in enumerate(zip(entry["question"], gold, strict=True)):
        calls = [dict(gold_call(text, classes)) for text in texts]
        messages += turn
        held = set().union(*(names for n, names in withheld.items() if number < int(n)))
        names = [spec["function"]["name"] for name in classes for spec in function_specs(name)]
        if turn:
            yield {
                "id": f"{entry['id']}-{number}",
                "environment": "bfcl",
                "messages": list(messages),
                "tools": [
                    n for n in names if n not in held | set(entry.get("excluded_function", ()))
                ],
                "task": {**world, "before": list(before), "calls": calls},
            }
        messages += replayed(replay, calls)
        before += calls


def replayed(world: BfclEnvironment, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gold calls of a turn and their outputs, as messages."""
    found: list[dict[str, Any]] = []
    for call in calls:
        found.append({"role": "assistant", "content": "", "tool_calls": [{"function": call}]})
        try:
            content = world.call(ToolCall(call["name"], call["arguments"]))
        except ToolError as error:
            content = f"error: {error}"
        found.append({"role": "tool", "name": call["name"], "content": content})
    return [*found, {"role": "assistant", "content": "Done."}]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CATEGORIES:
        sys.exit(f"usage: python tools/make_bfcl_rows.py {'|'.join(CATEGORIES)}")
    for entry, gold in entries(sys.argv[1]):
        for row in rows(entry, gold):
            print(json.dumps(row, ensure_ascii=False))
