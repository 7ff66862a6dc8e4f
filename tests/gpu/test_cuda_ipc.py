"""On one GPU: weights reach another process as CUDA IPC handles, unchanged, and leave no memory
behind.

    python -m pytest -m gpu tests/gpu/test_cuda_ipc.py
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_mega.rollout.sglang_client import ServerInfo
from rest_mega.rollout.sglang_server import Server
from rest_mega.rollout.sglang_transports import Tensors
from rest_mega.rollout.sglang_weights import Bucket
from rest_mega.rollout.sglang_wire import entries, flatten, payload
from rest_mega.rollout.sglang_worker import Worker
from tests.support.ipc_reader import described, summed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ROOT = Path(__file__).parents[2]
MIB = 2**20


class Child:
    """Another process on the same GPU."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ipc_reader"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def send(self, text: str) -> None:
        """One payload; its answer is read later."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def answer(self) -> list[list[Any]]:
        """What it found in the oldest payload that was not answered yet."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the reader ended with code {self._process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started = [Child(), Child()]
    yield started
    for child in started:
        child.close()


class Ranks:
    """What `Tensors` needs of the client of a server whose tensor ranks are these children."""

    def __init__(self, children: list[Child]) -> None:
        self.children = children
        self.found: list[list[list[list[Any]]]] = []
        """Per bucket and rank: what it has read."""

    async def load_tensors(self, payloads: Sequence[str]) -> None:
        """Answered once every rank has read its own payload and let go of it."""
        for child, text in zip(self.children, payloads, strict=True):
            child.send(text)
        self.found.append([await asyncio.to_thread(child.answer) for child in self.children])


def bucket(seed: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Bucket:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, 256), (7,), (3, 5, 2)]
    return [
        (f"layer.{i}.weight", torch.randn(shape, generator=draw).to(dtype))
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_process_finds_the_same_tensors_on_the_same_gpu(
    children: list[Child], dtype: torch.dtype
) -> None:
    sent = bucket(1, 300, dtype)
    flat = flatten(sent, "cuda:0")
    text = payload(entries(sent), flat)
    assert len(text) < 8192  # handles, no bytes
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    assert uuid.encode() in base64.b64decode(text)
    children[0].send(text)
    assert children[0].answer() == [described(name, tensor.cuda()) for name, tensor in sent]


def test_the_tensor_transport_takes_the_memory_of_two_buckets(
    children: list[Child], tmp_path: Path
) -> None:
    """As the engine sends them to a server with two tensor ranks: a bucket is prepared while the
    one before is read. In the end nothing is left of them."""
    ranks: Any = Ranks(children)
    server = Server("", {}, {}, tmp_path / "log", gpus=(0, 0))
    worker = Worker(ranks, server, ServerInfo(2, 1024, "cuda"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    buckets = [bucket(seed, 64 * MIB // 512) for seed in range(5)]

    async def send_all(transport: Tensors) -> None:
        await transport.begin([worker])
        sending: asyncio.Task[None] | None = None
        for one in buckets:
            prepared = await asyncio.to_thread(transport.prepare, one)
            assert prepared.text == ""
            if sending is not None:
                await sending
            sending = asyncio.create_task(transport.send(worker, prepared))
            del prepared
        assert sending is not None
        await sending

    asyncio.run(send_all(Tensors()))
    for one, found in zip(buckets, ranks.found, strict=True):
        want = [[*described(name, tensor)[:3], "cuda:0", summed(tensor)] for name, tensor in one]
        assert found == [want, want]
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before
    size = sum(tensor.nbytes for _, tensor in buckets[0])
    assert torch.cuda.max_memory_allocated() - before <= 2 * size + 4 * MIB
