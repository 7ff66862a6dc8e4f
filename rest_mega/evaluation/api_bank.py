"""API-Bank, levels 1 to 3 (arXiv 2304.08244), in the form that ToolRL and ResT report on: one reply
to a dialogue, judged by its text.

Two scorers:

- `compat`, the published one number for number (benchmarks/API-Bank/generate.py and evaluate.py of
  qiancheng0/ToolRL, API-Bank/ of ResT's repository; its "soft match"), lenient as it is. What is
  between the last <tool_call> (without one: the start) and the next </tool_call> is read line by
  line; lines that are no JSON are left out. The reply is right once a call equals the gold one,
  whatever other calls there are; an object that lacks "name" or "parameters" counts as the
  parameters of a call of the right name. A value that is no object ends the reading.
- `strict`, what a user would call right: the reply ends, is written in the form that the prompt
  demands, and has exactly the gold calls, in any order.

A task is valid by `compat`; the table has both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega import dialects
from rest_mega.config import one_of, require
from rest_mega.data.formats import FORMATS
from rest_mega.data.rows import expect, read_rows
from rest_mega.evaluation.suite import Played, Result, Row, Task, Verdict, share
from rest_mega.records import ToolCall

FILES = "level-{level}-api_processed.json"
"""Names of the files in a folder of the data; they give the level, and so does a path's."""
LEVELS = ("1", "2", "3")


class ApiBank:
    """The suite; see rest_mega.evaluation.suite.Suite."""

    name = "api-bank"
    dialect = "toolrl"
    max_turns = 1

    def __init__(self, data: str) -> None:
        """`data`: the folder of the three files, or one of them (.json or .jsonl).

        Raises ConfigError "path: row N: value, rule, remedy" for the first bad row.
        """
        files = _files(data)
        self._tasks = {level: list(_tasks(level, path)) for level, path in files.items()}
        content = hashlib.blake2b(b"".join(p.read_bytes() for p in files.values()), digest_size=8)
        counts = "/".join(str(len(tasks)) for tasks in self._tasks.values())
        self.version = f"levels {'/'.join(files)}, {counts} rows, blake2b {content.hexdigest()}"

    def categories(self) -> tuple[str, ...]:
        """level-1, level-2, level-3, as far as there are files."""
        return tuple(f"level-{level}" for level in self._tasks)

    def tasks(self, categories: Sequence[str] = ()) -> list[Task]:
        """The rows in their order, named Level1_0, Level1_1, ... as the published scripts do."""
        for category in categories:
            one_of("category of api-bank", category, self.categories())
        wanted = [c.removeprefix("level-") for c in self.categories() if c in categories]
        return [task for level in wanted or self._tasks for task in self._tasks[level]]

    def judge(self, task: Task, played: Played) -> Verdict:
        """Both scorers' verdicts, `details` {"compat", "strict", "strict_reason", "calls"}."""
        gold: tuple[ToolCall, ...] = task.gold
        text = played.turns[0].text if played.turns else ""
        wrong = _why_not(text, played, gold)
        details = {
            "compat": compat(text, gold[0]),
            "strict": not wrong,
            "strict_reason": wrong,
            "calls": [line for line, _ in emitted(text)],
        }
        if details["compat"]:
            return Verdict(True, details=details)
        return Verdict(False, *_kind(played, text, gold[0]), details)

    def summary(self, results: Sequence[Result]) -> list[Row]:
        """Both scorers' shares of each level and of all rows pooled, as the published table has
        them."""
        strict = [
            dataclasses.replace(r, verdict=Verdict(bool(r.verdict.details["strict"])))
            for r in results
        ]
        return [*_rows(results, ""), *_rows(strict, "strict ")]


def _rows(results: Sequence[Result], prefix: str) -> Iterator[Row]:
    for category in sorted({result.task.category for result in results}):
        yield share(prefix + category, [r for r in results if r.task.category == category])
    yield share(f"{prefix}overall", results)


# ------------------------------------------------------------------ the data


def _files(data: str) -> dict[str, Path]:
    """Level -> its file."""
    require(
        bool(data),
        "api-bank needs its data: name the folder of level-1-api_processed.json and its siblings "
        "(ToolRL's repository has it in benchmarks/API-Bank), or one of these files, as --data or "
        "in evaluation.data.api-bank",
    )
    path = Path(data)
    if path.is_dir():
        found = {n: path / FILES.format(level=n) for n in LEVELS}
        files = {level: file for level, file in found.items() if file.is_file()}
        require(bool(files), f"{data!r} holds none of {', '.join(p.name for p in found.values())}")
        return files
    level = re.match(r"level-([123])\b", path.name)
    require(
        level is not None,
        f"{data!r} must be a folder, or a file whose name begins with level-1, level-2 or level-3",
    )
    return {level[1] if level else "": path}


def _tasks(level: str, path: Path) -> Iterator[Task]:
    for number, row in enumerate(read_rows(path)):
        (prompt,) = FORMATS["api-bank"].convert(row.place, row.fields())
        gold = tuple(ToolCall(c["name"], c["arguments"]) for c in prompt.task["calls"])
        rule = "one call, or a list with just one: the published scorer compares the first alone"
        expect(len(gold) == 1, row.place, "answer", row.fields()["answer"], rule)
        named = dataclasses.replace(prompt, id=f"Level{level}_{number}")
        yield Task(named, f"level-{level}", gold)


# ------------------------------------------------------------------ the published scorer


def emitted(text: str) -> list[tuple[str, Any]]:
    """The lines that the published reader takes for a reply's calls, each with its JSON value."""
    block = text.strip().rpartition("<tool_call>")[2].partition("</tool_call>")[0]
    found = []
    for line in block.strip().split("\n"):
        try:
            found.append((line, json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return found


def compat(text: str, gold: ToolCall) -> bool:
    """The published verdict on a reply."""
    for _, value in emitted(text):
        try:
            call = json.loads(value) if isinstance(value, str) else value
            whole = "name" in call and "parameters" in call
            name, arguments = (call["name"], call["parameters"]) if whole else (gold.name, call)
        except (TypeError, ValueError, RecursionError):
            return False  # the published loop ends here, whatever follows
        if name == gold.name and arguments == gold.arguments:
            return True
    return False


def _kind(played: Played, text: str, gold: ToolCall) -> tuple[str, str]:
    """(kind, reason) of a reply that is not right by `compat`: how near its nearest call is."""
    if not played.turns:
        return played.stop, played.note or "nothing was sampled"
    objects = [call for _, call in emitted(text) if isinstance(call, dict)]
    if not objects and not played.turns[0].ended:
        return "cut off", f"ended by a limit without a call; wanted {gold.name}"
    if not objects:
        return "no call", f"no line holds a call; wanted {gold.name}"
    named = [c.get("parameters") for c in objects if c.get("name") == gold.name]
    if not named:
        names = [str(c.get("name")) for c in objects]
        return "wrong tool", f"called {', '.join(names)[:200]}; wanted {gold.name}"
    return _difference(named[0], gold.arguments)


def _difference(got: Any, gold: Mapping[str, Any]) -> tuple[str, str]:
    """What the arguments of the first call of the right tool lack."""
    if not isinstance(got, dict) or got.keys() != gold.keys():
        names = sorted(got) if isinstance(got, dict) else got
        return "wrong arguments", f"has {names!r:.200}; wanted {sorted(gold)}"
    wrong = [name for name in gold if got[name] != gold[name]]
    shown = "; ".join(f"{n}={got[n]!r:.80}, wanted {gold[n]!r:.80}" for n in wrong)
    return "wrong value", shown or "a value before this call is no object"


# ------------------------------------------------------------------ the strict scorer


def _why_not(text: str, played: Played, gold: Sequence[ToolCall]) -> str:
    """Why a user would not call the reply right; empty where one would."""
    if not played.turns or not played.turns[0].ended:
        return "the reply does not end"
    reply = dialects.parse(text.encode("utf-8", "replace"), "toolrl")
    if not reply.well_formed:
        return reply.error
    missing = list(gold)
    for call in reply.calls:
        if call not in missing:
            return f"{call.name} with these arguments is not wanted, or not again"
        missing.remove(call)
    return f"{missing[0].name} is missing" if missing else ""
