"""How buckets of weights reach the servers: inside requests, by CUDA IPC, by broadcast, or as a
checkpoint folder.

A transport is told to `prepare` a bucket once the one before is sent. What it makes holds no tensor
of the bucket, so at most two buckets' worth of memory is taken: what is sent and what is gathered
meanwhile, or a bucket and its flat copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rest_mega import launch
from rest_mega.rollout.sglang_client import ServerLost, ServerRefused
from rest_mega.rollout.sglang_weights import Bucket, Kept
from rest_mega.rollout.sglang_wire import Entry, entries, flatten, listed, payload
from rest_mega.rollout.sglang_worker import Worker


class Transport(Protocol):
    """How buckets reach the servers."""

    def bucket_bytes(self, budget: int) -> int:
        """The size of buckets of which twice `budget` is all the memory that is taken; after
        `begin`."""

    def prepare(self, bucket: Bucket) -> Any:
        """What `send` takes; called outside the event loop, once the bucket before is sent."""

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


@dataclass(frozen=True)
class _Packed:
    """A bucket as `Tensors` sends it. The GPU memory stays ours until all have answered."""

    table: list[Entry]
    flats: dict[int, torch.Tensor]
    """Per GPU of a server, its copy of the bucket."""
    text: str
    """The payload for servers that are reached by no handle."""


class Tensors:
    """Tensors inside the request. Works everywhere, at the cost of base64; servers that we started
    on GPUs of this host get handles instead, each tensor rank one to a copy on its own GPU."""

    def __init__(self) -> None:
        self._gpus: list[int] = []
        self._in_text, self._copies = True, 1

    def bucket_bytes(self, budget: int) -> int:
        """Text is four thirds of its bytes; beside a bucket and its flat copy there are the pickle
        and the text, or the text and a request with the text for each tensor rank."""
        return max(1, budget // (3 + self._copies)) if self._in_text else budget

    def prepare(self, bucket: Bucket) -> _Packed:
        """Copies on the servers' GPUs, and base64 text where a server needs it."""
        if self._gpus:
            torch.cuda.ipc_collect()  # what servers have let go since
        flats = {gpu: flatten(bucket, f"cuda:{gpu}") for gpu in self._gpus}
        table = entries(bucket)
        text = payload(table, flatten(bucket)) if self._in_text else ""
        return _Packed(table, flats, text)

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Who gets handles."""
        self._gpus = sorted({gpu for worker in workers for gpu in _handle_gpus(worker)})
        texts = [worker.info.tensor_size for worker in workers if not _handle_gpus(worker)]
        self._in_text, self._copies = bool(texts), max(texts, default=1)

    async def send(self, worker: Worker, prepared: _Packed) -> None:
        """One payload for each tensor rank, which takes its own part of the tensors in it."""
        handles = [payload(prepared.table, prepared.flats[gpu]) for gpu in _handle_gpus(worker)]
        await worker.client.load_tensors(handles or [prepared.text] * worker.info.tensor_size)

    async def share(self, prepared: _Packed) -> None:
        """Nothing."""

    async def end(self, worker: Worker) -> None:
        """Nothing."""

    async def close(self, workers: Sequence[Worker]) -> None:
        """Nothing."""


def _handle_gpus(worker: Worker) -> tuple[int, ...]:
    """The GPU of each tensor rank of a server that can open our handles; empty for others. Pipeline
    ranks of a server would open the same handle several times."""
    gpus = worker.server.gpus if worker.server is not None else ()
    fits = worker.info.device == "cuda" and len(gpus) == worker.info.tensor_size
    return gpus if fits else ()


class Disk:
    """A checkpoint folder that every server can read, written by `Kept`."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def bucket_bytes(self, budget: int) -> int:
        """Buckets are written as they come."""
        return budget

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
    """A group of this process (rank 0) and every tensor rank of every worker: NCCL where all are on
    GPUs, else gloo. One broadcast per bucket."""

    def __init__(self, host: str, seconds: float, device: str) -> None:
        """`host`: where workers reach this process; `seconds`: deadline of a broadcast; `device`:
        this process's."""
        self._host, self._wait, self._device = host, datetime.timedelta(seconds=seconds), device
        self._members: list[tuple[str, int]] = []
        self._name = ""
        self._group: Any = None
        self._on_gpus = False

    def bucket_bytes(self, budget: int) -> int:
        """A bucket and its flat copy."""
        return budget

    def prepare(self, bucket: Bucket) -> tuple[list[Entry], torch.Tensor]:
        """What is in the bucket, and its bytes on the device that broadcasts."""
        return entries(bucket), flatten(bucket, self._device if self._on_gpus else "cpu")

    async def begin(self, workers: Sequence[Worker]) -> None:
        """Make the group, unless it is still that of the same workers and starts."""
        members = [(worker.client.url, worker.restarts) for worker in workers]
        if members == self._members:
            return
        await self.close(workers)
        devices = {self._device.partition(":")[0], *(w.info.device for w in workers)}
        self._on_gpus = devices == {"cuda"}
        port, world = launch.free_port(), 1 + sum(w.info.tensor_size for w in workers)
        self._name = f"rest_mega_{os.getpid()}_{port}"
        offset, joins = 1, []
        for worker in workers:
            group = {
                "master_address": self._host, "master_port": port, "rank_offset": offset,
                "world_size": world, "group_name": self._name,
                "backend": "nccl" if self._on_gpus else "gloo",
            }  # fmt: skip
            joins.append(worker.client.join_group(group))
            offset += worker.info.tensor_size
        ours = asyncio.to_thread(self._join, port, world)
        self._group, *_ = await asyncio.gather(ours, *joins)
        self._members = members

    def _join(self, port: int, world: int) -> Any:
        """Rank 0 of the group that SGLang's init_custom_process_group makes: its store's prefixes
        are the group's name, torch's name/ and torch's device/."""
        made: Any = dist  # torch exports these without saying so
        store = made.TCPStore(
            self._host, port, world, is_master=True, timeout=self._wait, wait_for_workers=False
        )
        for prefix in (self._name, f"{self._name}/", "cuda/" if self._on_gpus else "cpu/"):
            store = made.PrefixStore(prefix, store)
        if not self._on_gpus:
            return dist.ProcessGroupGloo(store, 0, world, self._wait)
        options = made.ProcessGroupNCCL.Options()
        options._timeout = self._wait
        # Blocking, a broadcast that a dead server never joins is an error here; otherwise NCCL's
        # watchdog would end this process.
        with launch.variable_set("TORCH_NCCL_BLOCKING_WAIT", "1"):
            return made.ProcessGroupNCCL(store, 0, world, options)

    async def send(self, worker: Worker, prepared: tuple[list[Entry], torch.Tensor]) -> None:
        """What will be broadcast."""
        await worker.client.receive(listed(prepared[0]) | {"group_name": self._name})

    async def share(self, prepared: tuple[list[Entry], torch.Tensor]) -> None:
        """The broadcast itself."""
        await asyncio.to_thread(self._broadcast, prepared[1])

    def _broadcast(self, flat: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self._group.broadcast([flat], options).wait()
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
