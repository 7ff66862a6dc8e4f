"""The page of an evaluation's failures, grouped by kind: self-contained, everything escaped."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.evaluation.suite import Task

MOST_PER_KIND = 100
"""Failures shown of a kind; samples.jsonl has all."""
MOST_CHARACTERS = 6000
"""Shown of one text."""

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.5rem;margin:.3rem 0}
summary{cursor:pointer}details{margin:.3rem 0;padding-left:.6rem;border-left:3px solid #8885}
table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;text-align:left}
small{opacity:.7}
"""


def write_failures(
    path: Path, title: str, table: str, rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
) -> None:
    """Write the page: the table, then the failures of each kind, the most frequent kind first.

    `rows`: of samples.jsonl; those of other tasks than `tasks` are left out.
    """
    known = {task.prompt.id: task for task in tasks}
    failed: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["valid"] and row["task"] in known:
            failed.setdefault(row["kind"] or "?", []).append(row)
    groups = sorted(failed.items(), key=lambda item: (-len(item[1]), item[0]))
    body = "".join(line for kind, found in groups for line in _group(kind, found, known))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{STYLE}</style><h1>{_safe(title)}</h1><pre>{_safe(table)}</pre>"
        f"{body or '<p>No failures.</p>'}</html>\n"
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _group(
    kind: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Task]
) -> Iterator[str]:
    more = f", {MOST_PER_KIND} shown" if len(rows) > MOST_PER_KIND else ""
    yield f"<details><summary><b>{_safe(kind)}</b> ({len(rows)}{more})</summary>"
    for row in rows[:MOST_PER_KIND]:
        yield from _failure(row, known[row["task"]])
    yield "</details>"


def _failure(row: Mapping[str, Any], task: Task) -> Iterator[str]:
    name = f"{row['task']}" + (f" sample {row['sample']}" if row["sample"] else "")
    yield f"<details><summary>{_safe(name)} <small>{_safe(row['category'])}</small> "
    yield f"{_safe(row['reason'])}</summary>"
    for message in task.prompt.messages:
        yield _text(str(message["role"]), message.get("content") or message)
    for turn in row["turns"]:
        yield _text("reply" if turn["ended"] else "reply, cut off", turn["text"])
        for outcome in turn["outcomes"]:
            yield _text(f"tool: {outcome['status']}", outcome["content"])
    yield _text("judge", {"kind": row["kind"], "reason": row["reason"], **row["details"]})
    yield "</details>"


def _text(label: str, content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, indent=1, default=repr)
    shown = text[:MOST_CHARACTERS] + ("..." if len(text) > MOST_CHARACTERS else "")
    return f"<small>{_safe(label)}</small><pre>{_safe(shown)}</pre>"


def _safe(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
