"""One load of new weights into all workers: pause, flush, begin, buckets, end, verify, continue.

Requests that run are aborted by the pause; the engine asks for the rest of their turn once the new
weights are in, so every token has a version and no key or value of the old weights is used again
(pausing in place or by retraction would keep some in the cache).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rest_mega import launch
from rest_mega.rollout.sglang_client import Client, ServerLost, ServerRefused
from rest_mega.rollout.sglang_fleet import Worker
from rest_mega.rollout.sglang_weights import Bucket, Checksums, Kept, payload


class Transport(Protocol):
    """How buckets reach the servers."""

    def prepare(self, bucket: Bucket) -> Any:
        """What `send` takes; called outside the event loop, while the bucket before is sent."""

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Before the first bucket."""

    async def send(self, worker: Worker, prepared: Any) -> None:
        """One bucket to one worker."""

    async def share(self, prepared: Any) -> None:
        """Our own part in sending a bucket to all; runs while `send` does."""

    async def end(self, worker: Worker) -> None:
        """After the last bucket."""

    async def close(self, workers: Sequence[Worker]) -> None:
        """Undo what `begin` set up."""


class Tensors:
    """Tensors inside the request: works everywhere, at the cost of base64."""

    def prepare(self, bucket: Bucket) -> str:
        """base64 text."""
        return payload(bucket)

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Nothing to set up."""

    async def send(self, worker: Worker, prepared: str) -> None:
        """The same text for each tensor rank, which takes its own part."""
        await worker.client.load_tensors([prepared] * worker.info.tensor_size)

    async def share(self, prepared: str) -> None:
        """Nothing."""

    async def end(self, worker: Worker) -> None:
        """Nothing."""

    async def close(self, workers: Sequence[Worker]) -> None:
        """Nothing."""


class Disk:
    """A checkpoint folder that every server can read, written by `Kept`."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def prepare(self, bucket: Bucket) -> None:
        """The folder has it already."""

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Nothing to set up."""

    async def send(self, worker: Worker, prepared: None) -> None:
        """Nothing."""

    async def share(self, prepared: None) -> None:
        """Nothing."""

    async def end(self, worker: Worker) -> None:
        """Load the folder."""
        assert self._kept.folder is not None
        await worker.client.load_folder(str(self._kept.folder.resolve()))

    async def close(self, workers: Sequence[Worker]) -> None:
        """Nothing."""


class Broadcast:
    """A gloo group of this process (rank 0) and every tensor rank of every worker."""

    def __init__(self, host: str, seconds: float) -> None:
        """`host`: where workers reach this process; `seconds`: deadline of a broadcast."""
        self._host, self._seconds = host, seconds
        self._members: list[tuple[str, int]] = []
        self._name = ""
        self._group: Any = None

    def prepare(self, bucket: Bucket) -> Bucket:
        """As it is."""
        return bucket

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Make the group, unless it is still that of the same workers and starts."""
        members = [(worker.client.url, worker.restarts) for worker in workers]
        if members == self._members:
            return
        await self.close(workers)
        port, world = launch.free_port(), 1 + sum(w.info.tensor_size for w in workers)
        self._name = f"rest_mega_{os.getpid()}_{port}"
        offset, joins = 1, []
        for worker in workers:
            group = {
                "master_address": self._host, "master_port": port, "rank_offset": offset,
                "world_size": world, "group_name": self._name, "backend": "gloo",
            }  # fmt: skip
            joins.append(worker.client.join_group(group))
            offset += worker.info.tensor_size
        ours = asyncio.to_thread(self._join, port, world)
        self._group, *_ = await asyncio.gather(ours, *joins)
        self._members = members

    def _join(self, port: int, world: int) -> Any:
        """Rank 0 of the group that SGLang's init_custom_process_group makes: its store's prefixes
        are the group's name, torch's name/ and torch's device/."""
        wait = datetime.timedelta(seconds=self._seconds)
        made: Any = dist  # torch exports these without saying so
        store = made.TCPStore(
            self._host, port, world, is_master=True, timeout=wait, wait_for_workers=False
        )
        for prefix in (self._name, f"{self._name}/", "cpu/"):
            store = made.PrefixStore(prefix, store)
        return dist.ProcessGroupGloo(store, 0, world, wait)

    async def send(self, worker: Worker, prepared: Bucket) -> None:
        """What will be broadcast."""
        await worker.client.receive(
            {
                "names": [name for name, _ in prepared],
                "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in prepared],
                "shapes": [list(t.shape) for _, t in prepared],
                "group_name": self._name,
            }
        )

    async def share(self, prepared: Bucket) -> None:
        """The broadcasts themselves."""
        await asyncio.to_thread(self._broadcast, [tensor for _, tensor in prepared])

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            self._members = []
            raise ServerLost(f"a broadcast of weights failed: {error}") from error

    async def end(self, worker: Worker) -> None:
        """Nothing."""

    async def close(self, workers: Sequence[Worker]) -> None:
        """Whoever is in the group leaves it, if it can still be reached."""
        for worker in workers:
            if (worker.client.url, worker.restarts) in self._members:
                with contextlib.suppress(ServerLost, ServerRefused):
                    await worker.client.leave_group(self._name)
        self._members, self._group = [], None


class Update:
    """The new weights' way into `workers`; those that fail on it are left out and listed."""

    def __init__(self, workers: Sequence[Worker], transport: Transport) -> None:
        self._workers, self._transport = list(workers), transport
        self._all = list(workers)
        self.failed: dict[Worker, str] = {}
        """Worker -> why it does not have the new weights."""

    async def begin(self) -> None:
        """Stop what runs, forget its cache and the version's name, open the bracket."""
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

    async def end(self, version: int, sums: Checksums) -> None:
        """Close the bracket, compare checksums, name the version."""
        await self._each(lambda w: w.client.end_update())
        await self._each(self._transport.end)
        await self._each(lambda w: name(w, version, sums))

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


async def restore(worker: Worker, kept: Kept, version: int, sums: Checksums) -> None:
    """Load the kept weights into one worker that nobody asks anything meanwhile."""
    await worker.client.pause()
    await worker.client.flush()
    await _open_bracket(worker.client)
    for bucket in kept.read():
        text = await asyncio.to_thread(payload, bucket)
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


async def name(worker: Worker, version: int, sums: Checksums) -> None:
    """Give the loaded weights their version once their checksums are ours; ServerRefused when they
    are not.

    The server's checksums can be computed here for one tensor rank on a CPU; for other servers the
    version alone is checked.
    """
    ranks = await worker.client.checksums()
    if worker.info.device == "cpu" and len(ranks) == 1:
        wrong = sums.difference(ranks[0])
        if wrong:
            raise ServerRefused(f"{worker.client.url} holds other values of {wrong[:3]}")
    await worker.client.name_version(version)
    if (found := await worker.client.version()) != version:
        raise ServerRefused(f"{worker.client.url} serves version {found}, not {version}")
