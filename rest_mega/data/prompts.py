"""Files of prompts and dialogues -> records, and the endless, seeded, resumable stream of prompts.

Two forms of rows, told apart by their columns, in .jsonl, .json (one list) or .parquet files:

    ours     {"id", "messages", "tools"?, "environment"?, "task"?}; tools are whole specs,
             or names of tools that the environment or the config has
    ToolRL   {"prompt", "reward_model": {"ground_truth"}, ...}; environment "none", the gold reply
    parsed into `task`

The first bad row ends the reading with ConfigError "path:line: value, rule, remedy" (in .json and
.parquet files "path: row N", counted from 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega import dialects
from rest_mega.config import require
from rest_mega.data.messages import plain_message
from rest_mega.data.rows import RowError, expect, known_keys, read_rows
from rest_mega.records import Message, Prompt

ROLES = ("system", "user", "assistant", "tool")
PROMPT_KEYS = ("id", "messages", "tools", "environment", "task")
DIALOGUE_KEYS = ("id", "messages", "tools", "parallel_tool_calls")
TOOLRL_KEYS = frozenset(("prompt", "reward_model"))

Dialogue = tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]
"""(messages, tools)"""


class PromptStream:
    """Prompts without end: every epoch a fresh permutation drawn from (seed, epoch) alone.

    The order depends on neither the number of replicas nor the size of the draws, and a stream
    loaded from `state()` goes on with the very next prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises ConfigError where there is no prompt."""
        require(
            len(prompts) > 0,
            "there are no prompts to draw from; set data.train to a file that has some",
        )
        self._prompts = prompts
        self._seed = seed
        self._seek(0, 0)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def state(self) -> dict[str, int]:
        """Where the stream stands, as JSON can hold it."""
        return {
            "seed": self._seed,
            "prompts": len(self._prompts),
            "epoch": self._epoch,
            "index": self._index,
        }

    def load(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken; ConfigError where seed or number of prompts differ from
        it."""
        for name, now in (("seed", self._seed), ("prompts", len(self._prompts))):
            require(
                state[name] == now,
                f"the checkpoint's prompt stream has {name}={state[name]}, this run has "
                f"{name}={now}; "
                "give the same data.train and run.seed, or set run.fresh=true",
            )
        self._seek(state["epoch"], state["index"])

    def _seek(self, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))

    def _draw(self) -> Prompt:
        if self._index == len(self._prompts):
            self._seek(self._epoch + 1, 0)
        self._index += 1
        return self._prompts[int(self._order[self._index - 1])]


def load_prompts(path: str | Path, system: str = "") -> list[Prompt]:
    """Every prompt of a file; `system` is put before prompts that carry no system message.

    Raises ConfigError for a file that is missing, empty or of an unknown kind, and for the first
    bad row.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(_objects(Path(path)), start=1):
        prompt = with_system(prompt_of(place, row, str(number)), system)
        require(
            prompt.id not in places,
            f"{place}: id={prompt.id!r} was used at {places.get(prompt.id)}; give every prompt "
            "an id of its own",
        )
        places[prompt.id] = place
        prompts.append(prompt)
    return prompts


def load_dialogues(path: str | Path) -> list[Dialogue]:
    """Every dialogue {"messages", "tools"?} of a file of OpenAI's chat rows, in its order and in
    plain form (`plain_message`); errors as in `load_prompts`."""
    return [_dialogue(place, row) for place, row in _objects(Path(path))]


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, fields) of every row; an empty file is an error."""
    found = False
    for row in read_rows(path):
        yield row.place, row.fields()
        found = True
    require(found, f"{path} holds no row; give a file with at least one")


def prompt_of(place: str, row: Mapping[str, Any], name: str) -> Prompt:
    """A row of either form as a Prompt; `name` is the end of its id where a ToolRL row has no
    index of its own. RowError for a bad row."""
    return _toolrl_prompt(place, row, name) if row.keys() >= TOOLRL_KEYS else _prompt(place, row)


def _prompt(place: str, row: Mapping[str, Any]) -> Prompt:
    both = " (a ToolRL row has both `prompt` and `reward_model`)" if TOOLRL_KEYS & {*row} else ""
    known_keys(place, row, PROMPT_KEYS, both)
    name, environment, task = row.get("id"), row.get("environment", "none"), row.get("task", {})
    expect(
        isinstance(name, str) and bool(name),
        place,
        "id",
        name,
        'a string that is not empty, such as "train-17"',
    )
    expect(
        isinstance(environment, str),
        place,
        "environment",
        environment,
        "the name of a registered environment",
    )
    expect(
        isinstance(task, dict), place, "task", task, "an object for the environment and the rewards"
    )
    return Prompt(
        id=str(name),
        messages=messages_of(place, "messages", row.get("messages"), last=("user", "tool")),
        tools=_tools(place, row.get("tools", []), names=True),
        environment=environment,
        task=task,
    )


def _dialogue(place: str, row: Mapping[str, Any]) -> Dialogue:
    known_keys(place, row, DIALOGUE_KEYS)
    listed = row.get("messages")
    if isinstance(listed, list):
        listed = [plain_message(place, f"messages[{n}]", m) for n, m in enumerate(listed)]
    messages = messages_of(place, "messages", listed, last=("assistant",))
    for number, message in enumerate(messages):
        _check_weight(place, f"messages[{number}]", message)
    return messages, _tools(place, row.get("tools") or [])


def _check_weight(place: str, key: str, message: Message) -> None:
    """OpenAI's `weight`, which keeps an assistant's message out of the loss, is 0 or 1."""
    weight, role = message.get("weight", 1), message["role"]
    expect(weight in (0, 1), place, f"{key}.weight", weight, "0 (not trained) or 1")
    expect(
        "weight" not in message or role == "assistant",
        place,
        f"{key}.weight",
        weight,
        "absent",
        f"role {role!r} is never trained",
    )


def messages_of(place: str, key: str, messages: object, last: Sequence[str]) -> tuple[Message, ...]:
    """`messages` as checked OpenAI chat messages, the last of which has one of the roles `last`."""
    rule = 'a list of {"role", "content"} that is not empty'
    if not isinstance(messages, list) or not messages:
        raise RowError(place, f"{key}={messages!r} must be {rule}", f"{key} must be {rule}")
    for number, message in enumerate(messages):
        name = f"{key}[{number}]"
        expect(isinstance(message, dict), place, name, message, 'an object {"role", "content"}')
        role, content = message.get("role"), message.get("content")
        expect(role in ROLES, place, f"{name}.role", role, f"one of {', '.join(ROLES)}")
        only_calls = content is None and bool(message.get("tool_calls"))
        expect(
            isinstance(content, str) or only_calls, place, f"{name}.content", content, "a string"
        )
        expect(
            role != "system" or number == 0,
            place,
            f"{name}.role",
            role,
            "the first message, if any",
        )
    role = messages[-1]["role"]
    expect(role in last, place, f"{key}[-1].role", role, f"{' or '.join(last)}, being the last one")
    return tuple(messages)


def _tools(place: str, tools: object, *, names: bool = False) -> tuple[Any, ...]:
    """Function specs, and with `names` also names of tools that the environment or the config
    has."""
    expect(isinstance(tools, list), place, "tools", tools, "a list of function specs")
    assert isinstance(tools, list), tools
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        rule = '{"type": "function", "function": {"name", "description", "parameters"}}'
        allowed = named or (names and isinstance(tool, str) and bool(tool))
        expect(allowed, place, f"tools[{number}]", tool, rule + " or a name" * names)
    return tuple(tools)


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system message before it, unless it carries one or `system` is empty."""
    if not system or prompt.messages[0]["role"] == "system":
        return prompt
    first: Message = {"role": "system", "content": system}
    return Prompt(
        prompt.id, (first, *prompt.messages), prompt.tools, prompt.environment, prompt.task
    )


def _toolrl_prompt(place: str, row: Mapping[str, Any], name: str) -> Prompt:
    """ToolRL's columns: data_source, prompt, ability, reward_model, extra_info (arXiv 2504.13958,
    rlla_4k)."""
    reward, extra = row["reward_model"], row.get("extra_info") or {}
    expect(isinstance(extra, dict), place, "extra_info", extra, "an object or absent")
    gold = reward.get("ground_truth") if isinstance(reward, dict) else None
    expect(
        isinstance(gold, str),
        place,
        "reward_model.ground_truth",
        gold,
        "the gold reply as a string",
    )
    source, split = row.get("data_source", "toolrl"), extra.get("split", "row")
    return Prompt(
        id=f"{source}-{split}-{extra.get('index', name)}",
        messages=messages_of(place, "prompt", row["prompt"], last=("user", "tool")),
        task=toolrl_task(place, str(gold)),
    )


def toolrl_task(place: str, gold: str, key: str = "reward_model.ground_truth") -> dict[str, Any]:
    """What the rewards read of a gold reply in ToolRL's format, which stands in the row's `key`."""
    reply = dialects.parse(gold.encode(), "toolrl")
    expect(
        reply.well_formed,
        place,
        key,
        gold,
        "a reply in ToolRL's format",
        reply.error,
    )
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.calls]
    return {
        "ground_truth": gold,
        "calls": calls,
        "response": reply.answer if "<response>" in gold else None,
    }
