"""The SGLang engine: starts or attaches to the servers of one player, plays episodes on them and
loads new weights into them, from one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rest_mega.config import SglangConfig, one_of
from rest_mega.rollout.engine import Completion, Enough, Follow, Request, Sampling, never
from rest_mega.rollout.sglang_checksums import Checksums, Kind, read_heads
from rest_mega.rollout.sglang_episodes import Episodes
from rest_mega.rollout.sglang_fleet import Fleet
from rest_mega.rollout.sglang_placement import Gpus
from rest_mega.rollout.sglang_router import Router
from rest_mega.rollout.sglang_server import Server, default_arguments
from rest_mega.rollout.sglang_transports import Broadcast, Disk, Tensors, Transport
from rest_mega.rollout.sglang_update import Update, rest, restore
from rest_mega.rollout.sglang_weights import DTYPES, Kept, buckets, checked, expected_shapes
from rest_mega.rollout.sglang_worker import Worker

T = TypeVar("T")


class SglangEngine:
    """An Engine over one or more servers."""

    repeatable = False  # batches form by chance, and seeds are heeded in deterministic mode alone

    def __init__(
        self,
        config: SglangConfig,
        *,
        model_path: str,
        dtype: str,
        end_of_turn_ids: Sequence[int],
        device: str,
        folder: Path,
        gpus: Sequence[Gpus] = (),
    ) -> None:
        """Start or attach to the servers; ConfigError when they do not become ready.

        `device`: this process's, "cpu" or "cuda:N"; servers run on the same kind. `folder` takes
        their logs and the copy of the weights. `gpus`: of each server that is started.
        """
        kind = device.partition(":")[0]
        arguments = default_arguments(model_path, dtype, kind) | dict(config.arguments)
        if config.colocate and kind == "cuda":
            arguments["enable_memory_saver"] = True
        one_of("rollout.sglang.dtype", arguments["dtype"], DTYPES)
        self._config, self._device = config, device
        self._shapes = expected_shapes(model_path)
        self._dtype = DTYPES[arguments["dtype"]]
        vocab_size = self._shapes["model.embed_tokens.weight"][0]
        self._kept = Kept(folder / "weights", model_path)
        self._heads = read_heads(model_path)
        self._sums: dict[Kind, Checksums] = {}
        self._version, self._loaded = -1, -1
        servers = [
            Server(config.python, arguments, config.environment, folder / f"server_{n}.log", own)
            for n, own in enumerate(gpus or [()] * config.servers)
            if not config.urls
        ]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True).start()
        self.router = Router(config, folder) if config.router else None
        self._fleet, self._closed = Fleet(config, servers, self._restore, self.router), False
        self._episodes = Episodes(self._fleet, end_of_turn_ids, vocab_size, config.in_flight)
        self._transport = self._make_transport()
        try:
            self._wait(self._fleet.start())
        except BaseException:
            self.close()
            raise

    def _make_transport(self) -> Transport:
        if self._config.transport == "disk":
            return Disk(self._kept)
        if self._config.transport == "distributed":
            seconds = self._config.update_timeout_s
            return Broadcast(self._config.master_host, seconds, self._device)
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

    @property
    def answered(self) -> list[int]:
        """Requests that each server has answered."""
        return [worker.answered for worker in self._fleet.workers]

    @property
    def urls(self) -> list[str]:
        """Where the servers are."""
        return [worker.client.url for worker in self._fleet.workers]

    @property
    def pids(self) -> list[int]:
        """Process ids of the servers that were started here."""
        return [worker.server.pid for worker in self._fleet.workers if worker.server]

    # ------------------------------------------------------------------ episodes

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """All requests at once; ConfigError for one that a server would not survive."""
        done: dict[int, Completion] = {}
        self.play(requests, sampling, done.__setitem__)
        return [done[i] for i in range(len(requests))]

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        """Every episode at its own pace; `follow` runs in threads."""
        if self._loaded < 0:
            raise RuntimeError("the SGLang servers have no weights of ours: load parameters first")
        for request in requests:
            self._episodes.check(request)
        self._wait(self._episodes.play(requests, sampling, follow, enough))

    # ------------------------------------------------------------------ parameters

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Stream the tensors into all servers, bucket by bucket: one is sent while the next is
        gathered. ValueError for wrong names or shapes, RuntimeError when a server does not take
        them even after a restart."""
        if version < 0:
            raise ValueError(f"version={version} must not be negative")
        self._version = -1
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

    def rest(self) -> None:
        """Servers that share the trainer's GPUs give their memory back; nothing can be played until
        parameters are loaded."""
        if not self._config.colocate:
            return
        self._wait(self._fleet.shut())
        self._wait(self._fleet.mended())  # a server that comes up meanwhile would take memory
        self._version = self._loaded = -1
        for asleep in [self._submit(rest(worker)) for worker in self._fleet.workers]:
            asleep.result()

    def _stream(self, tensors: Iterable[tuple[str, Any]], version: int) -> dict[Worker, str]:
        """Workers that did not take the weights, and why."""
        keep = self._config.keep_copy or self._config.transport == "disk"
        self._wait(self._fleet.weights.acquire())
        self._loaded = -1
        update = Update([w for w in self._fleet.workers if w.open], self._transport)
        kinds = {w.info.kind for w in self._fleet.workers} if self._config.verify else set()
        self._sums = {kind: Checksums(kind, self._heads, self._device) for kind in kinds}
        try:
            if keep:
                self._kept.begin(version)
            self._wait(update.begin())
            self._send(update, tensors, keep)
            if keep:
                self._kept.end()
            self._wait(update.end(version, self._sums))
            self._loaded = version
        finally:
            self._wait(update.resume())
            self._loop.call_soon_threadsafe(self._fleet.weights.release)
        return update.failed

    def _send(self, update: Update, tensors: Iterable[tuple[str, Any]], keep: bool) -> None:
        """One bucket is gathered, summed and kept while the one before is sent; twice
        rollout.sglang.bucket_mb is held at most."""
        sent: Future[None] | None = None
        stream = checked(tensors, self._shapes, self._dtype)
        size = self._transport.bucket_bytes(self._config.bucket_mb * 2**20)
        try:
            for bucket in buckets(stream, size):
                for sums in self._sums.values():
                    sums.add(bucket)
                if keep:
                    self._kept.add(bucket)
                if sent is not None:
                    sent.result()
                sent = self._submit(update.send(self._transport.prepare(bucket)))
                bucket.clear()  # not held while the next is gathered
        finally:
            if sent is not None:
                sent.result()

    async def _recover(self, failed: dict[Worker, str]) -> None:
        """Start anew what did not take the weights; with no copy of them that is the end."""
        for worker, why in failed.items():
            if self._kept.folder is None:
                raise RuntimeError(
                    f"{why}; with rollout.sglang.keep_copy=true the server would be started again"
                )
            self._fleet.lose(worker, why)
        await self._fleet.admit()
        await self._fleet.mended()

    async def _restore(self, worker: Worker) -> None:
        """The newest weights into a worker, unless it has them by name or there are none yet."""
        if self._loaded < 0 or await worker.client.version() == self._loaded:
            return
        if self._kept.folder is None:
            raise RuntimeError(
                "there is no copy of the weights to give it: set rollout.sglang.keep_copy=true"
            )
        await restore(worker, self._kept, self._loaded, self._sums)

    def checksums(self) -> list[list[dict[str, str]]]:
        """What each server reports per tensor rank: its name of a parameter -> checksum."""
        asked = [self._submit(worker.client.checksums()) for worker in self._fleet.workers]
        return [answer.result() for answer in asked]

    def settle(self) -> None:
        """Wait until every lost server is back; RuntimeError when one does not come back."""
        self._wait(self._fleet.mended())

    def close(self) -> None:
        """End the servers that were started here, and remove the copy of the weights."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._transport.close(self._fleet.workers))
        self._wait(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._episodes.close()
        self._kept.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()
