"""Rollouts by SGLang servers: episodes one by one, token ids in, token ids and log-probs out.

- An episode's next turn is asked for as soon as its tools have answered; nobody waits for a batch.
- Ids and lengths are checked before they are sent: one id outside the vocabulary ends a server.
- A turn that is aborted, or stopped at a token that ends no turn, is continued by sending what it
  has reached along with its prompt; a turn whose server is lost is asked for again from there.
- SGLang heeds a request's seed only with rollout.sglang.enable_deterministic_inference; otherwise
  two runs draw different tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rest_mega.config import ConfigError, SglangConfig, one_of
from rest_mega.rollout.engine import Completion, Follow, Request, Sampling
from rest_mega.rollout.sglang_client import Piece, ServerLost
from rest_mega.rollout.sglang_fleet import Fleet, Worker
from rest_mega.rollout.sglang_server import Server, default_arguments
from rest_mega.rollout.sglang_update import Broadcast, Disk, Tensors, Transport, Update, restore
from rest_mega.rollout.sglang_weights import (
    DTYPES,
    Checksums,
    Kept,
    buckets,
    checked,
    expected_shapes,
)

T = TypeVar("T")

ATTEMPTS = 8
"""Requests for one turn that may bring nothing (lost, or aborted at once) before the run ends."""


class SglangEngine:
    """The servers of one lead, driven by one event loop in a thread of its own."""

    def __init__(
        self,
        config: SglangConfig,
        *,
        model_path: str,
        dtype: str,
        end_of_turn_ids: Sequence[int],
        device: str,
        folder: Path,
    ) -> None:
        """Start or attach to the servers; ConfigError when they do not become ready.

        `folder` takes their logs and the copy of the weights.
        """
        arguments = default_arguments(model_path, dtype, device) | dict(config.arguments)
        one_of("rollout.sglang.dtype", arguments["dtype"], DTYPES)
        self._config, self._end = config, frozenset(end_of_turn_ids)
        self._shapes = expected_shapes(model_path)
        self._dtype = DTYPES[arguments["dtype"]]
        self._vocab = self._shapes["model.embed_tokens.weight"][0]
        self._kept = Kept(folder / "weights", model_path)
        self._sums, self._version, self._loaded = Checksums(), -1, -1
        self._numbers = itertools.count()
        self._name = f"rest_mega-{os.getpid()}-{id(self):x}"
        servers = [
            Server(config.python, arguments, config.environment, folder / f"server_{n}.log")
            for n in range(0 if config.urls else config.servers)
        ]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True).start()
        self._tools = ThreadPoolExecutor(config.in_flight, thread_name_prefix="episode")
        self._fleet, self._closed = Fleet(config, servers, self._restore), False
        try:
            self._wait(self._fleet.start())
        except BaseException:
            self.close()
            raise
        self._longest = min(worker.info.longest_prompt for worker in self._fleet.workers)
        self._transport = self._make_transport()

    def _make_transport(self) -> Transport:
        if self._config.transport == "disk":
            return Disk(self._kept)
        if self._config.transport == "distributed":
            return Broadcast(self._config.master_host, self._config.update_timeout_s)
        return Tensors()

    @property
    def version(self) -> int:
        """Version of the parameters that all servers hold; -1 before the first load and after a
        failed one."""
        return self._version

    @property
    def losses(self) -> int:
        """How often a server was lost."""
        return self._fleet.losses

    # ------------------------------------------------------------------ episodes

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """All requests at once; ConfigError for one that a server would not survive."""
        done: dict[int, Completion] = {}
        self.play(requests, sampling, done.__setitem__)
        return [done[i] for i in range(len(requests))]

    def play(self, requests: Sequence[Request], sampling: Sampling, follow: Follow) -> None:
        """Every episode at its own pace; `follow` runs in threads."""
        if self._loaded < 0:
            raise RuntimeError("the SGLang servers have no weights of ours: load parameters first")
        for request in requests:
            self._check(request)
        self._wait(self._play(requests, sampling, follow))

    async def _play(self, requests: Sequence[Request], sampling: Sampling, follow: Follow) -> None:
        watch = asyncio.create_task(self._fleet.watch())
        slots = asyncio.Semaphore(self._config.in_flight * len(self._fleet.workers))
        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(self._episode(index, request, sampling, follow, slots))
        except BaseExceptionGroup as several:  # the first is why the others were cancelled
            raise several.exceptions[0] from None
        finally:
            watch.cancel()

    async def _episode(
        self,
        index: int,
        request: Request,
        sampling: Sampling,
        follow: Follow,
        slots: asyncio.Semaphore,
    ) -> None:
        home: Worker | None = None
        async with slots:
            following: Request | None = request
            while following is not None:
                done, home = await self._turn(following, sampling, home)
                following = await self._loop.run_in_executor(self._tools, follow, index, done)
                if following is not None:
                    self._check(following)

    async def _turn(
        self, request: Request, sampling: Sampling, home: Worker | None
    ) -> tuple[Completion, Worker]:
        """The whole turn, from as many pieces as it takes, and the worker that gave the last."""
        prompt = request.ids_T.tolist()
        whole = Piece([], [], [], "")
        barren = 0
        while True:
            home = await self._fleet.pick(home)
            left = request.max_new_tokens - len(whole.ids)
            piece = await self._piece(home, prompt + whole.ids, left, request.seed, sampling)
            if piece is not None:
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
        """What one request brings; None when its server was lost."""
        rid = f"{self._name}-{next(self._numbers)}"
        client = worker.client
        worker.running.add(rid)
        try:
            return await client.generate(rid, ids, self._parameters(length, seed, sampling))
        except ServerLost:
            self._fleet.lose(worker)
            return None
        except asyncio.CancelledError:
            self._fleet.abandon(client, rid)
            raise
        finally:
            worker.running.discard(rid)

    def _parameters(self, length: int, seed: int, sampling: Sampling) -> dict[str, Any]:
        return {
            "max_new_tokens": length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 1 if sampling.greedy else -1,
            "stop_token_ids": sorted(self._end),
            "sampling_seed": seed,
        }

    def _check(self, request: Request) -> None:
        ids = request.ids_T
        wrong = ids[(ids < 0) | (ids >= self._vocab)]
        if len(wrong):
            raise ConfigError(
                f"token id {int(wrong[0])} is not among the model's {self._vocab} and would end "
                "the SGLang server: use the tokenizer that belongs to the model"
            )
        room = self._longest - request.max_new_tokens
        if not 0 < len(ids) <= room or request.max_new_tokens < 1:
            raise ConfigError(
                f"a request of {len(ids)} tokens and up to {request.max_new_tokens} new ones does "
                f"not fit the SGLang server, which takes 1 to {self._longest}: lower "
                "rollout.max_tokens or raise rollout.sglang.context_length or max_total_tokens"
            )

    # ------------------------------------------------------------------ parameters

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Stream the tensors into all servers, bucket by bucket: one is sent while the next is
        gathered. ValueError for wrong names or shapes, RuntimeError when a server does not take
        them even after a restart."""
        if version < 0:
            raise ValueError(f"version={version} must not be negative")
        self._version = self._loaded = -1
        self._wait(self._fleet.shut())
        try:
            failed = self._stream(tensors, version)
        except BaseException as error:
            self._wait(
                self._fleet.fail(f"loading version {version} of the weights failed: {error}")
            )
            raise
        self._wait(self._recover(failed))
        self._version = version

    def _stream(self, tensors: Iterable[tuple[str, Any]], version: int) -> dict[Worker, str]:
        """Workers that did not take the weights, and why."""
        keep = self._config.keep_copy or self._config.transport == "disk"
        self._wait(self._fleet.weights.acquire())
        update = Update([w for w in self._fleet.workers if w.open], self._transport)
        self._sums = Checksums()
        try:
            if keep:
                self._kept.begin(version)
            self._wait(update.begin())
            sent: Future[None] | None = None
            stream = checked(tensors, self._shapes, self._dtype)
            for bucket in buckets(stream, self._config.bucket_mb * 2**20):
                self._sums.add(bucket)
                if keep:
                    self._kept.add(bucket)
                prepared = self._transport.prepare(bucket)
                if sent is not None:
                    sent.result()
                sent = self._submit(update.send(prepared))
            if sent is not None:
                sent.result()
            if keep:
                self._kept.end()
            self._wait(update.end(version, self._sums))
            self._loaded = version
        finally:
            self._wait(update.resume())
            self._loop.call_soon_threadsafe(self._fleet.weights.release)
        return update.failed

    async def _recover(self, failed: dict[Worker, str]) -> None:
        """Start anew what did not take the weights; with no copy of them that is the end."""
        for worker, why in failed.items():
            if self._kept.folder is None:
                raise RuntimeError(
                    f"{why}; with rollout.sglang.keep_copy=true the server would be started again"
                )
            self._fleet.lose(worker, unsound=True)
        await self._fleet.admit()
        await self._fleet.mended()

    async def _restore(self, worker: Worker) -> None:
        """The newest weights into a worker that was started anew; nothing before the first load."""
        if self._loaded < 0:
            return
        if self._kept.folder is None:
            raise RuntimeError(
                "there is no copy of the weights to give it: set rollout.sglang.keep_copy=true"
            )
        await restore(worker, self._kept, self._loaded, self._sums)

    def settle(self) -> None:
        """Wait until every lost server is back; RuntimeError when one does not come back."""
        self._wait(self._fleet.mended())

    def close(self) -> None:
        """End the servers that were started here, and remove the copy of the weights."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._tools.shutdown(wait=False, cancel_futures=True)
        self._kept.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()


def _completion(whole: Piece, ended: bool) -> Completion:
    return Completion(
        ids_T=np.array(whole.ids, dtype=np.int32),
        logprobs_T=np.array(whole.logprobs, dtype=np.float32),
        finished=ended,
        version_T=np.array(whole.versions, dtype=np.int32),
    )
