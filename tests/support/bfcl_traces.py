"""Episodes of BFCL's entries of several turns: raw replies, and how our environment is led by
them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from rest_mega.config import EnvironmentConfig
from rest_mega.environments import ToolRuntime
from rest_mega.environments.bfcl import gold_call
from rest_mega.evaluation.suite import Suite, Task, open_suite
from tests.support.rollouts import TOKENIZER


@lru_cache
def suite(name: str = "bfcl") -> Suite:
    """BFCL's, opened once."""
    return open_suite(name)


@lru_cache
def tasks(category: str, name: str = "bfcl") -> tuple[Task, ...]:
    """Of one category."""
    return tuple(suite(name).tasks([category]))


def gold_turns(task: Task) -> list[list[Any]]:
    """The gold calls of each turn."""
    world = task.prompt.task
    turns = ([gold_call(text, world["classes"]) for text in t["calls"]] for t in world["turns"])
    return [[dict(call) for call in calls] for calls in turns]


def block(call: Any) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def together(turns: Sequence[Sequence[Any]]) -> list[list[str]]:
    """All calls of a turn in one reply, then talk."""
    return [["\n".join(map(block, calls))] * bool(calls) + ["Done."] for calls in turns]


def one_by_one(turns: Sequence[Sequence[Any]]) -> list[list[str]]:
    """A call in each reply, but in the first of more than the runner allows in a turn."""
    return [
        [*together([calls[:-18]])[0][:-1], *map(block, calls[-18:]), "Done."] for calls in turns
    ]


ODD = {
    "prose around": "I will do that.\n@\nNow I wait.",
    "thought before": "<think>\n@\n</think>\n\n@",
    "two on one line": '@<tool_call>{"name": "ls", "arguments": {}}</tool_call>',
    "a broken block beside": '<tool_call>\n{"name": \n</tool_call>\n@',
    "not closed beside": "@\n<tool_call>\n{",
    "a list beside": "@\n<tool_call>\n[]\n</tool_call>",
    "no arguments beside": '@\n<tool_call>\n{"name": "ls"}\n</tool_call>',
    "a number for a name": '@\n<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
    "arguments in a text": '@\n<tool_call>\n{"name": "ls", "arguments": "{}"}\n</tool_call>',
    "arguments are a list": '@\n<tool_call>\n{"name": "ls", "arguments": []}\n</tool_call>',
    "a key that is no name": (
        '@\n<tool_call>\n{"name": "ls", "arguments": {"a b": 1}}\n</tool_call>'
    ),
    "a tag twice": "<tool_call>\n@",
}
"""Replies that a call is put into, at @."""


def traces(task: Task, chance: Random) -> Iterator[tuple[str, list[list[str]]]]:
    """(what it is, the replies to each message of the user)."""
    turns = gold_turns(task)
    yield "gold", together(turns)
    yield "gold, one by one", one_by_one(turns)
    yield "nothing called", [["I cannot do that."] for _ in turns]
    at = chance.choice([n for n, calls in enumerate(turns) if calls])
    for how, spoilt in _spoilt(turns, at, chance):
        yield how, one_by_one(spoilt)
    broken = one_by_one(turns)
    broken[at].insert(0, '<tool_call>\n{"name": ')
    yield "broken reply first", [*broken[:at], broken[at][:1], *broken[at + 1 :]]
    looking = block({"name": "no_such_function", "arguments": {"x": [1, None, True]}})
    for how, odd in ODD.items():
        strange = one_by_one(turns)
        strange[at] = [odd.replace("@", one) for one in strange[at][:-1]] + ["Done."]
        yield how, strange
    yield "unknown function", [[looking, *replies] for replies in one_by_one(turns)]
    endless = one_by_one(turns)
    endless[at] = [looking] * 21
    yield "does not end", endless[: at + 1]
    last = one_by_one(turns)
    last[-1] = [*last[-1][:-1], *[looking] * (22 - len(last[-1]))]
    yield "does not end in the last turn", last


def _spoilt(turns: Any, at: int, chance: Random) -> Iterator[tuple[str, list[list[Any]]]]:
    def fresh() -> list[list[Any]]:
        return json.loads(json.dumps(turns))

    number = chance.randrange(len(turns[at]))
    one = fresh()
    one[at].pop(number)
    yield "one less", one
    one = fresh()
    one[at].insert(number, one[at][number])
    yield "one twice", one
    one = fresh()
    one[at].reverse()
    yield "order", one
    one = fresh()
    one[at - 1].insert(0, one[at].pop(number))
    yield "in another turn", one
    one = fresh()
    one[0] = [call for calls in one for call in calls]
    yield "all at once", [one[0], *[[] for _ in turns[1:]]]
    for how, value in (("another value", "xyz"), ("another type", 3), ("null", None)):
        one = fresh()
        arguments = one[at][number]["arguments"]
        if arguments:
            arguments[chance.choice(list(arguments))] = value
            yield how, one
    one = fresh()
    one[at][number]["arguments"]["not_there"] = 1
    yield "an argument too many", one


RUNTIME = ToolRuntime(EnvironmentConfig(result_tokens=1_000_000), TOKENIZER)


def played(task: Task, replies: Sequence[Sequence[str]], dialect: str = "hermes") -> dict[str, Any]:
    """The environment's verdict on these replies, led as the collector leads an episode."""
    tools = RUNTIME.open(task.prompt)
    for text in (text for turn in replies for text in turn):
        read = tools.read(text.encode(), dialect)
        if tools.takes(read):
            tools.answer(read)
            if tools.over:
                break
        elif tools.next_user(read.answer) is None:
            break
    return dict(tools.finish(""))
