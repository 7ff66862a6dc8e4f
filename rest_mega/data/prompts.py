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

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega import dialects
from rest_mega.config import ConfigError, one_of, require
from rest_mega.records import Message, Prompt

ROLES = ("system", "user", "assistant", "tool")
PROMPT_KEYS = ("id", "messages", "tools", "environment", "task")
DIALOGUE_KEYS = ("id", "messages", "tools")
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
    for number, (place, row) in enumerate(_rows(Path(path)), start=1):
        toolrl = row.keys() >= TOOLRL_KEYS
        prompt = _with_system(
            _toolrl_prompt(place, row, number) if toolrl else _prompt(place, row), system
        )
        require(
            prompt.id not in places,
            f"{place}: id={prompt.id!r} was used at {places.get(prompt.id)}; give every prompt "
            "an id of its own",
        )
        places[prompt.id] = place
        prompts.append(prompt)
    return prompts


def load_dialogues(path: str | Path) -> list[Dialogue]:
    """Every dialogue {"messages", "tools"?} of a file, in its order; errors as in
    `load_prompts`."""
    return [_dialogue(place, row) for place, row in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row; an empty file is an error."""
    require(
        path.is_file(),
        f"{str(path)!r} is not a file; give a .jsonl, .json or .parquet file of rows",
    )
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    one_of(f"{path}: suffix", path.suffix, readers)
    found = False
    for place, row in readers[path.suffix](path):
        _expect(isinstance(row, dict), place, "row", row, "an object with named keys")
        found = True
        yield place, row
    require(found, f"{path} holds no row; give a file with at least one")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _json(path.read_text(encoding="utf-8"), str(path))
    _expect(
        isinstance(rows, list),
        str(path),
        "content",
        rows,
        "one list of rows; rename a file of lines to .jsonl",
    )
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
    except ArrowInvalid as error:
        raise ConfigError(f"{path} is not a Parquet file ({error}); write it anew") from error
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = (
            f"column {error.colno}"
            if error.lineno == 1
            else f"line {error.lineno}, column {error.colno}"
        )
        raise ConfigError(
            f"{place}: not valid JSON at {where}: {error.msg}; mend or remove it"
        ) from error


def _expect(condition: bool, place: str, key: str, value: object, rule: str) -> None:
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    require(condition, f"{place}: {key}={shown} must be {rule}")


def _known_keys(place: str, row: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in row:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        toolrl = (
            " (a ToolRL row has both `prompt` and `reward_model`)" if key in TOOLRL_KEYS else ""
        )
        require(key in known, f"{place}: unknown key {key!r}; {hint}{toolrl}")


def _prompt(place: str, row: Mapping[str, Any]) -> Prompt:
    _known_keys(place, row, PROMPT_KEYS)
    name, environment, task = row.get("id"), row.get("environment", "none"), row.get("task", {})
    _expect(
        isinstance(name, str) and bool(name),
        place,
        "id",
        name,
        'a string that is not empty, such as "train-17"',
    )
    _expect(
        isinstance(environment, str),
        place,
        "environment",
        environment,
        "the name of a registered environment",
    )
    _expect(
        isinstance(task, dict), place, "task", task, "an object for the environment and the rewards"
    )
    return Prompt(
        id=str(name),
        messages=_messages(place, "messages", row.get("messages"), last=("user", "tool")),
        tools=_tools(place, row.get("tools", []), names=True),
        environment=environment,
        task=task,
    )


def _dialogue(place: str, row: Mapping[str, Any]) -> Dialogue:
    _known_keys(place, row, DIALOGUE_KEYS)
    messages = _messages(place, "messages", row.get("messages"), last=("assistant",))
    return messages, _tools(place, row.get("tools", []))


def _messages(place: str, key: str, messages: object, last: Sequence[str]) -> tuple[Message, ...]:
    """`messages` as checked OpenAI chat messages, the last of which has one of the roles `last`."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'{place}: {key}={messages!r} must be a list of {{"role", "content"}} that is not empty'
        )
    for number, message in enumerate(messages):
        name = f"{key}[{number}]"
        _expect(isinstance(message, dict), place, name, message, 'an object {"role", "content"}')
        role, content = message.get("role"), message.get("content")
        _expect(role in ROLES, place, f"{name}.role", role, f"one of {', '.join(ROLES)}")
        only_calls = content is None and bool(message.get("tool_calls"))
        _expect(
            isinstance(content, str) or only_calls, place, f"{name}.content", content, "a string"
        )
        _expect(
            role != "system" or number == 0,
            place,
            f"{name}.role",
            role,
            "the first message, if any",
        )
    role = messages[-1]["role"]
    _expect(
        role in last, place, f"{key}[-1].role", role, f"{' or '.join(last)}, being the last one"
    )
    return tuple(messages)


def _tools(place: str, tools: object, *, names: bool = False) -> tuple[Any, ...]:
    """Function specs, and with `names` also names of tools that the environment or the config
    has."""
    if not isinstance(tools, list):
        raise ConfigError(f"{place}: tools={tools!r} must be a list of function specs")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        rule = '{"type": "function", "function": {"name", "description", "parameters"}}'
        allowed = named or (names and isinstance(tool, str) and bool(tool))
        _expect(allowed, place, f"tools[{number}]", tool, rule + " or a name" * names)
    return tuple(tools)


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if not system or prompt.messages[0]["role"] == "system":
        return prompt
    first: Message = {"role": "system", "content": system}
    return Prompt(
        prompt.id, (first, *prompt.messages), prompt.tools, prompt.environment, prompt.task
    )


def _toolrl_prompt(place: str, row: Mapping[str, Any], number: int) -> Prompt:
    """ToolRL's columns: data_source, prompt, ability, reward_model, extra_info (arXiv 2504.13958,
    rlla_4k)."""
    reward, extra = row["reward_model"], row.get("extra_info") or {}
    gold = reward.get("ground_truth") if isinstance(reward, dict) else None
    _expect(
        isinstance(gold, str),
        place,
        "reward_model.ground_truth",
        gold,
        "the gold reply as a string",
    )
    source, split = row.get("data_source", "toolrl"), extra.get("split", "row")
    return Prompt(
        id=f"{source}-{split}-{extra.get('index', number)}",
        messages=_messages(place, "prompt", row["prompt"], last=("user", "tool")),
        task=_toolrl_task(place, str(gold)),
    )


def _toolrl_task(place: str, gold: str) -> dict[str, Any]:
    reply = dialects.parse(gold.encode(), "toolrl")
    _expect(
        reply.well_formed,
        place,
        "reward_model.ground_truth",
        gold,
        f"a reply in ToolRL's format ({reply.error})",
    )
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.calls]
    return {
        "ground_truth": gold,
        "calls": calls,
        "response": reply.answer if "<response>" in gold else None,
    }
