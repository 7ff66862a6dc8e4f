"""No test prompt is trained on: what is trained against what is evaluated, checked at start.

Two rows are the same where their ids are, or what the user and the tools say in them is (system
messages apart, white space and letter case too), in the same state of the same environment.
Benchmarks' entries are also the same where they were made from one source (BFCL's multi-turn
categories tell one story four times).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rest_mega.config import ConfigError
from rest_mega.data.bfcl_rows import scenario, split
from rest_mega.data.rows import digest
from rest_mega.evaluation.play import Benchmark
from rest_mega.evaluation.suite import Task
from rest_mega.records import Message, Prompt

GOLD = ("calls", "benchmark", "kind", "ground_truth", "response")
"""Of a prompt's task: what judges a reply and is no part of what the policy meets."""
BFCL_REMEDY = (
    'train on entries of the training side (`split` in rest_mega/data/bfcl_rows.py says "train") '
    "and evaluate the others: evaluation.side=test"
)


def check_split(
    train: Sequence[Prompt], held_out: Sequence[Prompt], benchmarks: Sequence[Benchmark]
) -> None:
    """ConfigError that names the first training prompt which is evaluated too, or which is of
    BFCL's test side whether that is evaluated or not."""
    tested = {_met(p): f"held-out prompt {p.id!r}" for p in held_out}
    sources: dict[str, str] = {}
    for suite, task in _tasks(benchmarks):
        name = f"{suite}'s {task.prompt.id!r}"
        tested[_met(task.prompt)] = name
        sources[task.prompt.id] = sources[task.source or task.prompt.id] = name
    for prompt in train:
        found = tested.get(_met(prompt)) or sources.get(prompt.id)
        bfcl = prompt.environment == "bfcl" and scenario(prompt.id) != prompt.id
        if bfcl:
            found = found or sources.get(scenario(prompt.id))
            found = found or ("on BFCL's test side" if split(prompt.id) == "test" else None)
        if found:
            remedy = BFCL_REMEDY if bfcl else "take the row out of data.train"
            raise ConfigError(f"data.train: prompt {prompt.id!r} is {found}: {remedy}")


def check_dialogues(
    dialogues: Iterable[tuple[str, Sequence[Message]]],
    held_out: Sequence[Prompt],
    benchmarks: Sequence[Benchmark],
) -> None:
    """ConfigError that names the first (place, messages) in which the model is shown what it is
    tested on, up to any of its turns. Dialogues have no state: held-out prompts of environments
    that have one are not compared."""
    tested = {_said(p.messages): f"held-out prompt {p.id!r}" for p in held_out if not _world(p)}
    for suite, task in _tasks(benchmarks):
        tested[_said(task.prompt.messages)] = f"{suite}'s {task.prompt.id!r}"
    for place, messages in dialogues if tested else ():
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in turns:
            if found := tested.get(_said(messages[:turn])):
                raise ConfigError(f"{place} holds {found}: take it out of sft.data")


def _tasks(benchmarks: Sequence[Benchmark]) -> Iterable[tuple[str, Task]]:
    return ((b.suite.name, task) for b in benchmarks for task in b.tasks)


def _met(prompt: Prompt) -> str:
    """What the policy meets."""
    return digest(_said(prompt.messages), prompt.environment, _world(prompt))


def _world(prompt: Prompt) -> Mapping[str, Any]:
    if prompt.environment == "none":
        return {}
    return {key: value for key, value in prompt.task.items() if key not in GOLD}


def _said(messages: Sequence[Message]) -> str:
    """Of all but system messages: who says what, without regard to white space and case."""
    said = [(m["role"], _text(m)) for m in messages if m["role"] != "system"]
    return digest(said)


def _text(message: Message) -> str:
    content, calls = message.get("content"), message.get("tool_calls")
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    return " ".join(text.lower().split()) + (json.dumps(calls, default=str) if calls else "")
