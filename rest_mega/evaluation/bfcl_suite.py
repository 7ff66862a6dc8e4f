"""BFCL as a suite: its entries as tasks, its checkers as judge, its leaderboard's scores.

Functions are shown as BFCL's runner shows them: to models with tool use (`bfcl`, the leaderboard's
"FC") as specs that the chat template writes, to others (`bfcl-prompt`, its "Prompt") in a system
prompt of its own that asks for Python calls. The language is hinted at, in Java and JavaScript
every argument is a string. Names keep their dots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rest_mega.config import one_of, require
from rest_mega.data.bfcl_rows import bfcl_prompt, bfcl_rows, scenario
from rest_mega.data.prompts import messages_of
from rest_mega.data.rows import RowError, expect
from rest_mega.environments.bfcl_decode import Calls
from rest_mega.environments.bfcl_package import (
    VERSION,
    function_documents,
    package_data,
    prompted,
    tool_specs,
)
from rest_mega.evaluation.bfcl_judge import (
    Judged,
    judge_calls,
    judge_episode,
    judge_reply,
    judge_unread,
)
from rest_mega.evaluation.bfcl_scores import CATEGORIES, scores
from rest_mega.evaluation.suite import Played, Result, Row, Task, Verdict, share
from rest_mega.records import Prompt

MOST_TURNS = 10
"""Messages of the user in the longest entry, and some."""


class Bfcl:
    """The Berkeley Function Calling Leaderboard, single-turn and multi-turn."""

    name = "bfcl"
    version = f"bfcl-eval {VERSION}"
    dialect = ""
    max_turns = 22 * MOST_TURNS
    """21 replies with calls and one without to each message."""

    def __init__(self, data: str = "") -> None:
        """`data`: a folder laid out as the package's own, which is read unless it is given.

        ConfigError where the package or a file is missing.
        """
        self._folder = Path(data) if data else package_data()
        package_data()
        for category in CATEGORIES:
            file = self._file(category)
            require(file.is_file(), f"bfcl: no file {file}; give a folder with BFCL_v4_*.json")

    def _file(self, category: str) -> Path:
        return self._folder / f"BFCL_v4_{category}.json"

    def categories(self) -> tuple[str, ...]:
        """The leaderboard's, but for web search and memory."""
        return CATEGORIES

    def tasks(self, categories: Sequence[str] = ()) -> list[Task]:
        """The entries of these categories (all unless given). ConfigError for an unknown one, and
        with file and line for a bad entry."""
        for name in categories:
            one_of("category of bfcl", name, CATEGORIES)
        return [task for name in categories or CATEGORIES for task in self._tasks(name)]

    def _tasks(self, category: str) -> list[Task]:
        rows = [(row.place, row.fields()) for row in bfcl_rows(self._file(category))]
        make = _multi_turn if category.startswith("multi_turn") else _single_turn
        return [make(category, place, row) for place, row in rows]

    def judge(self, task: Task, played: Played) -> Verdict:
        """The verdict of BFCL's pipeline on the same reply, or on the same episode."""
        judged = _judged(task, played)
        details = {} if judged.calls is None else {"calls": _plain(judged.calls)}
        return Verdict(judged.valid, judged.kind, _text(judged.reason), details)

    def summary(self, results: Sequence[Result]) -> list[Row]:
        """Categories in the leaderboard's order, then its scores."""
        by_category: dict[str, list[Result]] = {name: [] for name in CATEGORIES}
        for result in results:
            by_category[result.task.category].append(result)
        rows = [share(name, found) for name, found in by_category.items() if found]
        return [*rows, *scores(rows)]


class BfclPrompt(Bfcl):
    """The same entries and judge for models without tool use: BFCL's own prompt shows the functions
    and asks for Python calls."""

    name = "bfcl-prompt"
    dialect = "pythonic"

    def _tasks(self, category: str) -> list[Task]:
        return [_prompted(task) for task in super()._tasks(category)]


def _prompted(task: Task) -> Task:
    """With the functions in the messages instead of beside them."""
    prompt = task.prompt
    if task.gold is None:
        later = {name for turn in prompt.task["turns"] for name in turn["offers"]}
        every = (one for kind in prompt.task["classes"] for one in function_documents(kind))
        documents = [one for one in every if one["name"] not in later]
    else:
        documents = task.gold["function"]
    messages = prompted(prompt.messages, documents, task.category)
    world = {**prompt.task, "prompted": True} if task.gold is None else {}
    return replace(task, prompt=replace(prompt, messages=tuple(messages), tools=(), task=world))


def _single_turn(category: str, place: str, row: Mapping[str, Any]) -> Task:
    question, functions, truth = row.get("question"), row.get("function"), row.get("ground_truth")
    good = isinstance(question, list) and len(question) == 1
    expect(good, place, "question", question, "a list of one turn, a list of messages")
    good = isinstance(functions, list) and all(isinstance(one, dict) for one in functions)
    expect(good, place, "function", functions, "a list of function documents")
    needed = "relevance" not in category
    rule = f"the possible answers, in possible_answer/BFCL_v4_{category}.json"
    expect(not needed or isinstance(truth, list), place, "ground_truth", truth, rule)
    prompt = Prompt(
        id=str(row["id"]),
        messages=messages_of(place, "question[0]", row["question"][0], last=("user",)),
        tools=tuple(_specs(place, row["function"], category)),
    )
    return Task(prompt, category, {"function": functions, "ground_truth": truth})


def _specs(place: str, functions: Sequence[Mapping[str, Any]], category: str) -> list[Any]:
    try:
        return tool_specs(functions, category)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"function documents cannot be shown ({type(error).__name__}: {error})"
        raise RowError(place, problem, "function documents as BFCL writes them") from error


def _multi_turn(category: str, place: str, row: Mapping[str, Any]) -> Task:
    (prompt,) = bfcl_prompt(place, row)
    prompt = replace(prompt, task={**prompt.task, "benchmark": True})
    return Task(prompt, category, source=scenario(prompt.id))


def _judged(task: Task, played: Played) -> Judged:
    if not played.turns:
        return Judged(False, played.stop, played.note)
    if task.gold is None:
        return judge_episode(played.result)
    turn = played.turns[0]
    entry, gold = task.gold, task.gold["ground_truth"]
    if played.dialect:
        return judge_reply(turn.text, played.dialect, task.category, entry, gold)
    if not turn.well_formed:
        return judge_unread(task.category, "the reply could not be read")
    calls: Calls = [{call.name: dict(call.arguments)} for call in turn.calls]
    return judge_calls(calls, task.category, entry, gold)


def _text(text: str) -> str:
    """Without halves of surrogate pairs, which a model's escapes may make."""
    return text.encode("utf-8", "replace").decode()


def _plain(calls: Calls) -> Any:
    """As JSON holds it; tuples of Python's form become lists, values that JSON lacks their text."""
    try:
        text = _text(json.dumps(calls, ensure_ascii=False, default=str))
        return json.loads(text, parse_constant=str)
    except (TypeError, ValueError, RecursionError):  # a tuple as a key
        return _text(str(calls))
