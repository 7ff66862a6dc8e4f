"""One load of new weights into all workers: pause, flush, begin, buckets, end, verify, continue.

Requests that run are aborted by the pause; the engine asks for the rest of their turn once the new
weights are in, so every token has a version and no key or value of the old weights is used again
(pausing in place or by retraction would keep some in the cache).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rest_mega.rollout.sglang_checksums import Checksums, Kind
from rest_mega.rollout.sglang_client import Client, ServerLost, ServerRefused
from rest_mega.rollout.sglang_transports import Transport
from rest_mega.rollout.sglang_weights import Kept
from rest_mega.rollout.sglang_wire import entries, flatten, payload
from rest_mega.rollout.sglang_worker import Worker

Sums = Mapping[Kind, Checksums]
"""What servers of each kind must report; empty where nothing is compared."""


class Update:
    """The new weights' way into `workers`; those that fail on it are left out and listed."""

    def __init__(self, workers: Sequence[Worker], transport: Transport) -> None:
        self._workers, self._transport = list(workers), transport
        self._all = list(workers)
        self.failed: dict[Worker, str] = {}
        """Worker -> why it does not have the new weights."""

    async def begin(self) -> None:
        """Stop what runs, forget its cache and the version's name, open the bracket."""
        await self._each(lambda w: wake(w, "weights"))
        await self._each(lambda w: w.client.pause())
        await self._each(lambda w: w.client.flush())
        await self._each(lambda w: w.client.name_version(None))
        try:
            await self._transport.begin(self._workers)
        except (ServerLost, ServerRefused) as error:
            self._fail_all(error)
        await self._each(lambda w: _open_bracket(w.client))

    async def send(self, prepared: Any) -> None:
        """One bucket to all."""
        if not self._workers:
            return
        ours = asyncio.ensure_future(self._transport.share(prepared))
        await self._each(lambda w: self._transport.send(w, prepared))
        try:
            await ours
        except ServerLost as error:
            self._fail_all(error)

    async def end(self, version: int, sums: Sums) -> None:
        """Close the bracket, compare checksums, name the version."""
        await self._each(lambda w: w.client.end_update())
        await self._each(self._transport.end)
        await self._each(lambda w: name(w, version, sums))
        await self._each(lambda w: wake(w, "kv_cache"))

    async def resume(self) -> None:
        """Let all workers decode again, whatever came before, and those that failed too: a paused
        server cannot show that it is sound."""
        self._workers = list(self._all)
        await self._each(lambda w: w.client.resume())

    def _fail_all(self, error: Exception) -> None:
        self.failed |= dict.fromkeys(self._workers, str(error))
        self._workers = []

    async def _each(self, do: Callable[[Worker], Awaitable[None]]) -> None:
        async def one(worker: Worker) -> None:
            try:
                await do(worker)
            except (ServerLost, ServerRefused) as error:
                self.failed.setdefault(worker, str(error))

        await asyncio.gather(*(one(worker) for worker in self._workers))
        self._workers = [worker for worker in self._workers if worker not in self.failed]


async def rest(worker: Worker) -> None:
    """Give the worker's GPU memory back until the next load, which it then needs. One that does not
    answer is killed: its memory must not be missing while the trainer trains."""
    try:
        await worker.client.flush()
        await worker.client.release_memory(["kv_cache", "weights"])
    except (ServerLost, ServerRefused):
        if worker.server is None:
            raise
        worker.server.kill()
    worker.released |= {"kv_cache", "weights"}


async def wake(worker: Worker, tag: str) -> None:
    """Memory for weights or kv_cache again, where it was given back."""
    if tag in worker.released:
        await worker.client.resume_memory([tag])
        worker.released.remove(tag)


async def restore(worker: Worker, kept: Kept, version: int, sums: Sums) -> None:
    """Load the kept weights into one worker that nobody asks anything meanwhile."""
    await worker.client.pause()
    await worker.client.flush()
    await _open_bracket(worker.client)
    for bucket in kept.read():
        text = await asyncio.to_thread(lambda held: payload(entries(held), flatten(held)), bucket)
        await worker.client.load_tensors([text] * worker.info.tensor_size)
    await worker.client.end_update()
    await name(worker, version, sums)
    await worker.client.resume()


async def _open_bracket(client: Client) -> None:
    """A new one; an interrupted load may have left its own open, which the server would insist
    on."""
    with contextlib.suppress(ServerRefused):
        await client.end_update()
    await client.begin_update()


async def name(worker: Worker, version: int, sums: Sums) -> None:
    """Give the loaded weights their version once their checksums are ours on every tensor rank;
    ServerRefused when they are not."""
    if worker.info.kind in sums:
        wrong = sums[worker.info.kind].difference(await worker.client.checksums())
        if wrong:
            raise ServerRefused(
                f"{worker.client.url} holds other values of {wrong[:3]} than were sent; where it "
                "rearranges weights on purpose (quantization, a kernel's own layout) set "
                "rollout.sglang.verify=false"
            )
    await worker.client.name_version(version)
    if (found := await worker.client.version()) != version:
        raise ServerRefused(f"{worker.client.url} serves version {found}, not {version}")
