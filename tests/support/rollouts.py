"""A scripted engine, an environment with a clock, and what every trajectory must be made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.config import EnvironmentConfig, RolloutConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import load_tokenizer
from rest_mega.environments import ENVIRONMENTS, ToolEnvironment, tool
from rest_mega.records import Prompt, Trajectory
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import (
    Completion,
    Engine,
    Enough,
    Follow,
    Request,
    Sampling,
    never,
    one_version,
    play_in_rounds,
    seed_of,
)

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "tiny_bpe", "hermes")
CHAT = ChatFormat(TOKENIZER)
END = TOKENIZER.end_of_turn_ids[0]
SEED = "seed"


class Counter(ToolEnvironment):
    """Counts what it is told to add; the episode succeeds when the answer names the total."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self.total = 0

    @tool
    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: what to add
        """
        self.total += number
        return f"total {self.total}"

    def finish(self, answer: str) -> dict[str, Any]:
        return {"success": answer == str(self.total), "answer": answer}


ENVIRONMENTS.setdefault("test counter", Counter)


def prompt(name: str, environment: str = "test counter", content: str = "Add 2 and 3.") -> Prompt:
    """A task of one user message."""
    return Prompt(name, ({"role": "user", "content": content},), environment=environment)


def call(number: Any) -> str:
    """A reply that adds `number`."""
    return f'<tool_call>\n{{"name": "add", "arguments": {{"number": {number}}}}}\n</tool_call>'


def reply_ids(text: str) -> list[int]:
    """Ids of a reply and its end-of-turn token, as the policy would sample them."""
    return [*TOKENIZER.encode("<|im_end|>" + text)[1:], END]


class ScriptedEngine:
    """Says the n-th line of an episode's script in its n-th turn; its version grows by one a
    call."""

    repeatable = True

    def __init__(self, scripts: Mapping[tuple[str, int], Sequence[str]], version: int = 7) -> None:
        """`scripts`: (prompt id, sibling) -> replies."""
        self._lines = {
            seed_of(SEED, name, sibling, turn): text
            for (name, sibling), lines in scripts.items()
            for turn, text in enumerate(lines)
        }
        self.version, self.requests = version - 1, list[Request]()

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.version += 1
        self.requests += requests
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        ids = reply_ids(self._lines[request.seed])
        kept = np.array(ids[: request.max_new_tokens], dtype=np.int32)
        logprobs = -np.arange(1, len(kept) + 1, dtype=np.float32) / 8
        versions = one_version(self.version, len(kept))
        return Completion(kept, logprobs, len(kept) == len(ids), versions)

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        play_in_rounds(self, requests, sampling, follow, enough)

    def close(self) -> None: ...


class OneByOne(ScriptedEngine):
    """Plays episode after episode; once there is enough, the others are aborted after `reached`
    tokens of their turn."""

    repeatable = False
    reached = 2

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        for index, first in enumerate(requests):
            request: Request | None = first
            while request is not None:
                whole = self.generate([request], sampling)[0]
                request = follow(index, self._begun(whole) if enough() else whole)

    def _begun(self, done: Completion) -> Completion:
        n = self.reached
        return Completion(done.ids_T[:n], done.logprobs_T[:n], False, done.version_T[:n], True)

    def _complete(self, request: Request) -> Completion:
        """The rest of the turn whose beginning the request may hold."""
        whole = super()._complete(replace(request, max_new_tokens=2**30))
        ids = whole.ids_T.tolist()
        held = next(
            n for n in range(len(ids), -1, -1) if request.ids_T.tolist()[-n:] == ids[:n] or n == 0
        )
        kept = slice(held, held + request.max_new_tokens)
        return Completion(whole.ids_T[kept], whole.logprobs_T[kept], True, whole.version_T[kept])


def collector(
    engine: Engine, stop: Callable[[], bool] = lambda: False, **settings: Any
) -> Collector:
    """A collector of the tiny tokenizer's Hermes dialect."""
    config = RolloutConfig(**{"max_tokens": 1024, "max_new_tokens": 256} | settings)
    return Collector(engine, TOKENIZER, CHAT, "hermes", config, EnvironmentConfig(), stop)


def assert_made_of_its_parts(trajectory: Trajectory, chat: ChatFormat = CHAT) -> None:
    """prompt | sampled | delta | sampled ...: nothing is missing, added or tokenised again."""
    t = trajectory
    specs = ENVIRONMENTS[t.prompt.environment](t.prompt.task).specs
    ids = chat.prompt_ids(t.prompt.messages, t.prompt.tools or specs)
    turn_T = [-1] * len(ids)
    for n, turn in enumerate(t.turns):
        if n:
            before = t.turns[n - 1]
            names = [c.name for c in before.calls] or [""]
            answers = [o.content for o in before.outcomes]
            delta = chat.tool_result_ids(list(zip(names, answers, strict=True)))
            ids, turn_T = ids + delta, turn_T + [-1] * len(delta)
        assert turn.start == len(ids)
        sampled = t.ids_T[turn.start : turn.end].tolist()
        ids, turn_T = ids + sampled, turn_T + [n] * len(sampled)
    assert t.ids_T.tolist() == ids
    assert t.turn_T.tolist() == turn_T
    np.testing.assert_array_equal(t.mask_T, t.turn_T >= 0)
    np.testing.assert_array_equal(t.version_T >= 0, t.mask_T)
    assert not t.logprobs_T[~t.mask_T].any()
