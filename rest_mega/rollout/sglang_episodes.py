"""Episodes on a fleet of SGLang servers: each at its own pace, a turn from as many pieces as it
takes.

- An episode's next turn is asked for as soon as its tools have answered; nobody waits for a batch.
- Ids and lengths are checked before they are sent: one id outside the vocabulary ends a server.
- Once there is enough, running turns are aborted and followed as far as they have come.
- A turn that is aborted by others, or stopped at a token that ends no turn, is continued by sending
  what it has reached along with its prompt; a turn whose server is lost is asked for again from
  there.
- SGLang heeds a request's seed only with rollout.sglang.enable_deterministic_inference; otherwise
  two runs draw different tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rest_mega.config import ConfigError
from rest_mega.rollout.engine import Completion, Enough, Follow, Request, Sampling
from rest_mega.rollout.sglang_client import Piece, ServerLost
from rest_mega.rollout.sglang_fleet import Fleet
from rest_mega.rollout.sglang_worker import Worker

ATTEMPTS = 8
"""Requests for one turn that may bring nothing (lost, or aborted at once) before the run ends."""


@dataclass
class _Play:
    """What the episodes of one play share."""

    sampling: Sampling
    follow: Follow
    enough: Enough
    slots: asyncio.Semaphore
    over: bool
    """Nothing more is begun, and what was running has been aborted."""


class Episodes:
    """Plays requests on the workers of a fleet; all but `check` and `close` on the fleet's loop."""

    def __init__(
        self, fleet: Fleet, end_of_turn_ids: Collection[int], vocab_size: int, in_flight: int
    ) -> None:
        """`in_flight`: episodes per worker that are under way at a time."""
        self._fleet, self._end = fleet, frozenset(end_of_turn_ids)
        self._vocab, self._in_flight = vocab_size, in_flight
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="episode")
        self._numbers, self._name = itertools.count(), f"rest_mega-{os.getpid()}-{id(self):x}"

    def close(self) -> None:
        """Wait for no thread: a tool may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def play(
        self, requests: Sequence[Request], sampling: Sampling, follow: Follow, enough: Enough
    ) -> None:
        """Until every episode is over, or there is enough; what `follow` raises ends the others and
        is raised here."""
        watch = asyncio.create_task(self._fleet.watch())
        slots = asyncio.Semaphore(self._in_flight * len(self._fleet.workers))
        play = _Play(sampling, follow, enough, slots, enough())
        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(self._episode(index, request, play))
        except BaseExceptionGroup as several:  # the first is why the others were cancelled
            raise several.exceptions[0] from None
        finally:
            watch.cancel()

    async def _episode(self, index: int, request: Request, play: _Play) -> None:
        home, loop = None, asyncio.get_running_loop()
        async with play.slots:
            following: Request | None = request
            while following is not None and not play.over:
                done, home = await self._turn(following, play, home)
                following = await loop.run_in_executor(self._threads, play.follow, index, done)
                if following is not None:
                    self.check(following)
                if not play.over and play.enough():
                    play.over = True
                    await self._fleet.abort_running()

    async def _turn(
        self, request: Request, play: _Play, home: Worker | None
    ) -> tuple[Completion, Worker]:
        """The whole turn, from as many pieces as it takes, and the worker that gave the last; its
        beginning once the play is over."""
        prompt = request.ids_T.tolist()
        whole = Piece([], [], [], "")
        barren, failed = 0, set[Worker]()
        while True:
            home = await self._fleet.pick(home, failed)
            if play.over:
                return _completion(whole, ended=False, aborted=True), home
            left = request.max_new_tokens - len(whole.ids)
            piece = await self._piece(home, prompt + whole.ids, left, request.seed, play.sampling)
            if piece is None:
                failed.add(home)
            else:
                whole.ids.extend(piece.ids)
                whole.logprobs.extend(piece.logprobs)
                whole.versions.extend(piece.versions)
            ended = bool(whole.ids) and whole.ids[-1] in self._end
            if ended or len(whole.ids) >= request.max_new_tokens:
                return _completion(whole, ended), home
            barren = 0 if piece is not None and piece.ids else barren + 1
            if barren == ATTEMPTS:
                raise RuntimeError(
                    f"{ATTEMPTS} requests for one turn of {len(prompt)} prompt tokens brought "
                    "nothing; see the servers' logs"
                )
            await asyncio.sleep(0.01 * barren)

    async def _piece(
        self, worker: Worker, ids: list[int], length: int, seed: int, sampling: Sampling
    ) -> Piece | None:
        """What one request brings; None when its server was lost or given up."""
        rid = f"{self._name}-{next(self._numbers)}"
        parameters = self._parameters(length, seed, sampling)
        worker.running[rid] = asyncio.ensure_future(
            self._fleet.door(worker).generate(rid, ids, parameters)
        )
        try:
            piece = await worker.running[rid]
            if -1 in piece.versions:
                raise ServerLost("a server answered with weights that are not ours")
            worker.answered += 1
            return piece
        except ServerLost as error:
            await self._fleet.broke_off(worker, str(error))
            return None
        except asyncio.CancelledError:
            self._fleet.abandon(worker, rid)
            me = asyncio.current_task()
            if me is not None and me.cancelling():
                raise
            return None  # not this episode but its request was cancelled
        finally:
            worker.running.pop(rid)

    def _parameters(self, length: int, seed: int, sampling: Sampling) -> dict[str, Any]:
        return {
            "max_new_tokens": length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 1 if sampling.greedy else -1,
            "stop_token_ids": sorted(self._end),
            "sampling_seed": seed,
        }

    def check(self, request: Request) -> None:
        """ConfigError for a request that a server would refuse or not survive."""
        ids = request.ids_T
        wrong = ids[(ids < 0) | (ids >= self._vocab)]
        if len(wrong):
            raise ConfigError(
                f"token id {int(wrong[0])} is not among the model's {self._vocab} and would end "
                "the SGLang server: use the tokenizer that belongs to the model"
            )
        longest = min(worker.info.longest_prompt for worker in self._fleet.workers)
        room = longest - request.max_new_tokens
        if not 0 < len(ids) <= room or request.max_new_tokens < 1:
            raise ConfigError(
                f"a request of {len(ids)} tokens and up to {request.max_new_tokens} new ones does "
                f"not fit the SGLang server, which takes 1 to {longest}: lower "
                "rollout.max_tokens or raise rollout.sglang.context_length or max_total_tokens"
            )


def _completion(whole: Piece, ended: bool, aborted: bool = False) -> Completion:
    return Completion(
        ids_T=np.array(whole.ids, dtype=np.int32),
        logprobs_T=np.array(whole.logprobs, dtype=np.float32),
        finished=ended,
        version_T=np.array(whole.versions, dtype=np.int32),
        aborted=aborted,
    )
