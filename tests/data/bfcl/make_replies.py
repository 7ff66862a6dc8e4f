"""Writes replies.jsonl: raw outputs to BFCL's entries, right and wrong ones of every category, with
the verdict of BFCL's official pipeline on each.

    python -m tests.data.bfcl.make_replies

One object a line: category, id, dialect, text (of several turns `turns`, the replies to each
message of the user), and the official `valid` and `kind`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from rest_mega.evaluation.bfcl_scores import MULTI_TURN
from tests.support import bfcl_official as official
from tests.support.bfcl_replies import CATEGORIES, DIALECTS, around, gold, mutants, written
from tests.support.bfcl_traces import tasks, traces

FILE = Path(__file__).with_name("replies.jsonl")
RIGHT, WRONG = 3, 7
"""Replies of each category, where there are so many kinds."""


def single(category: str) -> Iterator[dict[str, Any]]:
    """Gold answers, spoilt ones and ways of writing, a kind of fault once."""
    chance = Random(category)
    entries = list(official.entries(category).items())
    for entry_id, (entry, truth) in chance.sample(entries, min(12, len(entries))):
        calls = gold(category, entry, truth)
        dialect = chance.choice(DIALECTS)
        texts = [written(calls, dialect, category), "Which city do you mean?"]
        texts += [written(spoilt, dialect, category) for _, spoilt in mutants(calls, chance)]
        texts += [text for _, text in around(texts[0])]
        for text in chance.sample(texts, len(texts)):
            verdict = official.judge(category, entry_id, text, official.handler(dialect))
            yield row(category, entry_id, dialect, {"text": text}, verdict)


def several(category: str) -> Iterator[dict[str, Any]]:
    chance = Random(category)
    for task in chance.sample(tasks(category), 8):
        for _, turns in traces(task, chance):
            found = official.judge(category, task.prompt.id, turns, official.handler("hermes"))
            yield row(category, task.prompt.id, "hermes", {"turns": turns}, found)


def row(
    category: str, entry_id: str, dialect: str, reply: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    verdict = {"valid": found["valid"], "kind": official.kind(found)}
    return {"category": category, "id": entry_id, "dialect": dialect, **reply, **verdict}


def chosen(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A few right ones, and of the wrong ones two of each kind."""
    seen: Counter[Any] = Counter()
    entries: set[tuple[str, str]] = set()
    for one in rows:
        key = one["kind"] or one["valid"]
        size = len(json.dumps(one))
        if (one["id"], one["kind"]) in entries or size > 4000:
            continue
        if seen[key] < (RIGHT if one["valid"] else 2) and seen["wrong"] < WRONG + one["valid"] * 99:
            entries.add((one["id"], one["kind"]))
            seen[key] += 1
            seen["wrong"] += not one["valid"]
            yield one


if __name__ == "__main__":
    with FILE.open("w", encoding="utf-8") as file:
        for category in (*CATEGORIES, *MULTI_TURN):
            make = several if category in MULTI_TURN else single
            for one in chosen(make(category)):
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
