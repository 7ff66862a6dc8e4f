"""Plays a benchmark's tasks against an OpenAI-compatible endpoint: as the collector plays them, but
in messages; what the model sampled is known as text and calls only."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from rest_mega.config import ConfigError, EvaluationConfig
from rest_mega.dialects import Reply
from rest_mega.environments import EpisodeTools, ToolRuntime
from rest_mega.evaluation.chat_client import ChatClient, ContextExceeded, EndpointLost, served_name
from rest_mega.evaluation.suite import Played, Task
from rest_mega.records import Message, ToolCall, ToolOutcome, Turn
from rest_mega.rollout.engine import seed_of

_ARGUMENTS = '{"name": "function", "arguments": {"argument": "value"}}'
_PARAMETERS = '{"name": "function", "parameters": {"argument": "value"}}'
EXAMPLES: Mapping[str, str] = {
    "hermes": f"<tool_call>\n{_ARGUMENTS}\n</tool_call>",
    "toolrl": f"<tool_call>\n{_PARAMETERS}\n</tool_call>",
    "llama3": _PARAMETERS,
    "mistral": f"[TOOL_CALLS][{_ARGUMENTS}]",
    "pythonic": '[function(argument="value")]',
}
"""A call in each dialect, as models are shown it in text mode."""
NAME = re.compile(r"[^a-zA-Z0-9_-]")
"""What the API does not take in a function's name."""
LOST_IN_A_ROW = 8
"""So many lost requests before the first that is answered end the evaluation."""


class FourBytes:
    """A stand-in for a tokenizer that nobody has: four bytes count as a token."""

    def encode(self, text: str) -> list[int]:
        """A number per four bytes."""
        data = text.encode()
        return [int.from_bytes(data[n : n + 4].ljust(4), "big") for n in range(0, len(data), 4)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, up to what the last four bytes were filled with."""
        data = b"".join(int(one).to_bytes(4, "big") for one in ids)
        return data.decode("utf-8", "replace")


@dataclass(frozen=True)
class Limits:
    """Of an episode."""

    max_turns: int
    max_new_tokens: int


class ChatPlayer:
    """Plays tasks side by side; what becomes of each goes to `judge`."""

    def __init__(
        self,
        config: EvaluationConfig,
        dialect: str,
        limits: Limits,
        runtime: ToolRuntime,
        judge: Callable[[Task, int, Played], None],
    ) -> None:
        """`dialect`: in which replies are read in text mode, and wherever a task has no tools."""
        self._config, self._dialect, self._limits = config, dialect, limits
        self._runtime, self._judge = runtime, judge
        self.lost: list[str] = []
        """Why samples are not done."""
        self._answered = 0

    def play(self, pairs: Sequence[tuple[Task, int]]) -> None:
        """Every pair once. Lost ones are in `lost`; ConfigError where the endpoint refuses all."""
        asyncio.run(self._play(pairs))

    async def _play(self, pairs: Sequence[tuple[Task, int]]) -> None:
        endpoint = self._config.endpoint
        slots = asyncio.Semaphore(endpoint.in_flight)
        connector = aiohttp.TCPConnector(limit=endpoint.in_flight)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = ChatClient(endpoint, session)
            try:
                async with asyncio.TaskGroup() as group:
                    for task, sample in pairs:
                        await slots.acquire()
                        one = group.create_task(self._one(client, task, sample))
                        one.add_done_callback(lambda _: slots.release())
            except BaseExceptionGroup as several:  # the first is why the others were cancelled
                raise several.exceptions[0] from None

    async def _one(self, client: ChatClient, task: Task, sample: int) -> None:
        if not self._answered and len(self.lost) >= LOST_IN_A_ROW:
            self.lost.append("not tried")
            return
        try:
            played = await self._episode(client, task, sample)
        except EndpointLost as error:
            self.lost.append(str(error))
            return
        await asyncio.to_thread(self._judge, task, sample, played)

    async def _episode(self, client: ChatClient, task: Task, sample: int) -> Played:
        tools = self._runtime.open(task.prompt)
        chat = _Chat(self._mode(tools), self._dialect, task.prompt.messages)
        turns: list[Turn] = []
        stop, note = "", ""
        while not stop:
            body = self._body(chat, tools, task, sample, len(turns))
            try:
                message, reason = await client.chat(body)
                self._answered += 1
            except ContextExceeded as error:
                stop, note = "length" if turns else "prompt_length", str(error)
                break
            turn, stop = await asyncio.to_thread(self._advance, chat, tools, message, reason)
            turns.append(turn)
            if not stop and (len(turns) == self._limits.max_turns or tools.over):
                stop = "turn_limit"
        answer = turns[-1].answer if stop == "answered" else ""
        result = await asyncio.to_thread(tools.finish, answer)
        dialect = "" if chat.mode == "tools" else self._dialect
        return Played(tuple(turns), stop, result, note=note, dialect=dialect)

    def _mode(self, tools: EpisodeTools) -> str:
        """Prompts without tools demand a form of text themselves."""
        return self._config.endpoint.mode if tools.specs else "plain"

    def _body(
        self, chat: _Chat, tools: EpisodeTools, task: Task, sample: int, turn: int
    ) -> dict[str, Any]:
        config = self._config
        seed = seed_of(f"benchmark/{config.seed}", task.prompt.id, sample, turn) >> 32
        body: dict[str, Any] = {
            "model": config.endpoint.model,
            "messages": chat.shown(tools.specs),
            "max_tokens": self._limits.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed,
        }
        if chat.mode == "tools" and tools.specs:
            body["tools"] = chat.renamed(tools.specs)
        return body

    def _advance(
        self, chat: _Chat, tools: EpisodeTools, message: Mapping[str, Any], reason: str
    ) -> tuple[Turn, str]:
        """The turn that a message is, and why the episode ends with it, if it does."""
        reply, text = chat.read(message, tools)
        ended = reason != "length"
        takes = ended and tools.takes(reply)
        outcomes = tools.answer(reply) if takes else ()
        turn = Turn(
            0, 0, text, reply.well_formed and ended, ended, reply.answer, reply.calls, outcomes
        )
        said = tools.next_user(reply.answer) if ended and not takes else None
        if not takes and said is None:
            return turn, "answered" if ended else "token_limit"
        chat.extend(message, text, reply, outcomes, said)
        return turn, ""


class _Chat:
    """The messages of one episode."""

    def __init__(self, mode: str, dialect: str, messages: Sequence[Message]) -> None:
        self.mode, self._dialect = mode, dialect
        self._messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._names: dict[str, str] = {}
        """Name at the endpoint -> the tool's own."""

    def shown(self, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is sent; in text mode the tools stand in the system message."""
        if self.mode != "text" or not specs:
            return self._messages
        text = tools_as_text(specs, self._dialect)
        first, rest = self._messages[0], self._messages[1:]
        if first["role"] != "system":
            return [{"role": "system", "content": text}, *self._messages]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]

    def renamed(self, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The specs by names that the API takes."""
        sent = []
        for spec in specs:
            function = spec["function"]
            name = NAME.sub("_", function["name"])[:64]
            self._names[name] = function["name"]
            sent.append({"type": "function", "function": {**function, "name": name}})
        return sent

    def read(self, message: Mapping[str, Any], tools: EpisodeTools) -> tuple[Reply, str]:
        """(reply, its text); calls that are none make it malformed."""
        content = message.get("content")
        text = content if isinstance(content, str) else ""
        if self.mode != "tools":
            return tools.read(text.encode("utf-8", "replace"), self._dialect), text
        listed = message.get("tool_calls") or []
        calls, problem = _calls(listed, self._names)
        empty = np.zeros(0, dtype=np.int8)
        reply = Reply(tuple(calls), text.strip(), "", not problem, problem, empty)
        return reply, text or (json.dumps(listed) if listed else "")

    def extend(
        self,
        message: Mapping[str, Any],
        text: str,
        reply: Reply,
        outcomes: Sequence[ToolOutcome],
        said: str | None,
    ) -> None:
        """Append a turn and what answers it."""
        kept = {"role": "assistant", "content": text}
        if self.mode == "tools":
            names = ("content", "tool_calls")
            kept = {"role": "assistant", **{n: message[n] for n in names if message.get(n)}}
        self._messages.append(kept)
        if said is not None:
            self._messages.append({"role": "user", "content": said})
        elif self.mode == "tools":
            self._messages += _tool_messages(message, outcomes)
        else:
            results = (f"<tool_response>\n{o.content}\n</tool_response>" for o in outcomes)
            self._messages.append({"role": "user", "content": "\n".join(results)})


def _calls(listed: Any, names: Mapping[str, str]) -> tuple[list[ToolCall], str]:
    """(calls, why they cannot be read)."""
    calls = []
    try:
        for one in listed:
            function = one["function"]
            given = function.get("arguments") or "{}"
            arguments = json.loads(given) if isinstance(given, str) else given
            if not isinstance(arguments, dict):
                return [], f"the arguments of {function['name']} are no object"
            name = str(function["name"])
            calls.append(ToolCall(names.get(name, name), arguments))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return [], f"a call that cannot be read ({type(error).__name__}: {error})"
    return calls, ""


def _tool_messages(
    message: Mapping[str, Any], outcomes: Sequence[ToolOutcome]
) -> list[dict[str, Any]]:
    """A message for each call: the API wants every one answered, a malformed reply's too."""
    listed = [one for one in message.get("tool_calls") or [] if isinstance(one, dict)]
    found = list(outcomes) if len(outcomes) == len(listed) else [outcomes[0]] * len(listed)
    return [
        {"role": "tool", "tool_call_id": str(one.get("id", "")), "content": outcome.content}
        for one, outcome in zip(listed, found, strict=True)
    ]


def tools_as_text(specs: Sequence[Mapping[str, Any]], dialect: str) -> str:
    """What a system message says of the tools, and of the form of a call in the dialect."""
    documents = "\n".join(json.dumps(spec["function"], ensure_ascii=False) for spec in specs)
    return (
        f"You may call these functions, each given by its JSON schema:\n{documents}\n\n"
        f"To call a function, reply in exactly this form, with nothing else:\n{EXAMPLES[dialect]}\n"
        "You may make several calls. Where no function helps, reply in plain text."
    )


def resolve(config: EvaluationConfig) -> EvaluationConfig:
    """The config with the name of the model that the endpoint serves; ConfigError where there are
    several, or it does not answer."""

    async def served() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return await ChatClient(config.endpoint, session).models()

    if config.endpoint.model:
        return config
    try:
        name = served_name(config.endpoint, asyncio.run(served()))
    except EndpointLost as error:
        raise ConfigError(f"{error}: start the server, or name the model, --model NAME") from error
    return dataclasses.replace(config, endpoint=dataclasses.replace(config.endpoint, model=name))
