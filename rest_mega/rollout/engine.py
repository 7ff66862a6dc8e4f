"""Engine protocol: token ids in, sampled token ids with log-probs out; parameters in, a version
out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rest_mega.environments.deadline import together
from rest_mega.records import Floats, Ints


@dataclass(frozen=True)
class Request:
    """Continue `ids_T` by at most `max_new_tokens`; `seed` alone decides what is drawn."""

    ids_T: Ints
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """The sampled tokens, the end-of-turn token included when one was drawn."""

    ids_T: Ints
    logprobs_T: Floats
    """Log-prob of each sampled token at the sampling temperature, before any nucleus cut."""
    finished: bool
    """True when the last token ends the turn; False when `max_new_tokens` cut it off."""
    version_T: Ints
    """Policy version that sampled each token; more than one where parameters changed meanwhile."""
    aborted: bool = False
    """True for the beginning of a turn whose rest was not sampled, because enough had been
    played."""

    def then(self, rest: Completion) -> Completion:
        """A turn from its beginning and its rest."""
        return Completion(
            ids_T=np.concatenate([self.ids_T, rest.ids_T]),
            logprobs_T=np.concatenate([self.logprobs_T, rest.logprobs_T]),
            finished=rest.finished,
            version_T=np.concatenate([self.version_T, rest.version_T]),
            aborted=rest.aborted,
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False


Follow = Callable[[int, Completion], Request | None]
"""(index of an episode, its completion) -> its next request, or None when it is over.

Called once per completion, for different episodes from several threads at a time where the engine
decodes each on its own."""


Enough = Callable[[], bool]
"""True once no further turn needs to be sampled."""


def never() -> bool:
    """An Enough for plays in which every episode is played to its end."""
    return False


class Engine(Protocol):
    """What the collector and the weight sync ask of a rollout engine."""

    @property
    def repeatable(self) -> bool:
        """True where the same requests, asked together, give the same bits again."""

    @property
    def version(self) -> int:
        """Version of the parameters being served; -1 before the first load."""

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace all parameters by (Hugging Face name, whole tensor); ValueError for wrong names
        or shapes."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        """Sample episode i from `requests[i]`, `follow(i, completion)`, and so on until every
        episode is over; what `follow` raises ends the play and is raised here.

        Once `enough()`, asked after every `follow`, nothing more is begun. An engine that decodes
        each episode on its own stops what it is sampling and follows what that has reached as
        `aborted`; others end after the turns that they sample together."""

    def rest(self) -> None:
        """Nothing will be asked before parameters are loaded: give back memory that the trainer
        can use meanwhile."""

    def close(self) -> None:
        """Free what the engine holds."""


SIDE_BY_SIDE = 256
"""Threads that follow the episodes of a round; the collector bounds what their tools may do."""


def play_in_rounds(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    follow: Follow,
    enough: Enough = never,
) -> None:
    """`play` for engines that decode whole batches: one turn of all open episodes, then the next.
    A slow tool of one episode holds up no other episode's tools."""
    waiting = dict(enumerate(requests))
    while waiting and not enough():
        done = engine.generate(list(waiting.values()), sampling)
        jobs = [functools.partial(follow, *turn) for turn in zip(waiting, done, strict=True)]
        after = zip(waiting, together(jobs, SIDE_BY_SIDE), strict=True)
        waiting = {index: request for index, request in after if request is not None}


def one_version(version: int, length: int) -> Ints:
    """`version` for each of `length` tokens."""
    return np.full(length, version, dtype=np.int32)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on nothing but `parts`: the same draw whatever the layout or the
    batch."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
