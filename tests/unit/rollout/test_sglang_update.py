"""Servers that share the trainer's GPUs: their memory goes before training and comes back in the
right order around a load."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import torch

from rest_mega.rollout.sglang_client import Client, ServerInfo
from rest_mega.rollout.sglang_server import Server
from rest_mega.rollout.sglang_transports import Tensors
from rest_mega.rollout.sglang_update import Update, rest
from rest_mega.rollout.sglang_worker import Worker
from tests.support.sglang import ReplayServer

ROUTES = {
    "/release_memory_occupation": ["release_memory_occupation"],
    "/resume_memory_occupation": ["resume_memory_occupation"],
    "/update_weights_from_tensor": ["end_weight_update"],
}


def with_worker(
    server: ReplayServer, do: Callable[[Worker], Coroutine[Any, Any, None]], child: Any = None
) -> Worker:
    """`do` with a worker whose client asks `server`."""

    async def run() -> Worker:
        async with aiohttp.ClientSession() as session:
            client = Client(server.url, session, request_s=5, update_s=0.5)
            worker = Worker(client, child, ServerInfo(1, 1024, "cuda"))
            await do(worker)
            return worker

    return asyncio.run(run())


async def load(worker: Worker) -> None:
    update, transport = Update([worker], Tensors()), Tensors()
    await update.begin()
    await transport.begin([worker])
    await update.send(transport.prepare([("a", torch.ones(3))]))
    await update.end(4, {})
    await update.resume()
    assert not update.failed


def test_memory_for_weights_comes_back_before_they_load_and_for_the_cache_afterwards() -> None:
    async def cycle(worker: Worker) -> None:
        await rest(worker)
        await load(worker)
        await load(worker)  # one that was not released is not resumed

    with ReplayServer(ROUTES) as server:
        worker = with_worker(server, cycle)
        asked = [(route, body) for route, body in server.asked if route != "/model_info"]
    assert worker.released == set()
    release, weights, cache = (
        asked.index((f"/{verb}_memory_occupation", {"tags": tags}))
        for verb, tags in (
            ("release", ["kv_cache", "weights"]), ("resume", ["weights"]), ("resume", ["kv_cache"]),
        )
    )  # fmt: skip
    routes = [route for route, _ in asked]
    assert routes.index("/flush_cache") < release < weights  # nothing runs any more: see the client
    assert weights < routes.index("/begin_weight_update")
    assert routes.index("/update_weights_from_tensor") < cache
    assert cache < routes.index("/continue_generation")
    assert routes.count("/resume_memory_occupation") == 2


def test_a_server_that_does_not_give_its_memory_back_is_killed(tmp_path: Path) -> None:
    module = tmp_path / "sglang"
    module.mkdir()
    (module / "__init__.py").touch()
    (module / "launch_server.py").write_text("import time; time.sleep(600)")
    environment = {"PYTHONPATH": str(tmp_path)}
    child = Server(sys.executable, {"host": "h", "device": "cpu"}, environment, tmp_path / "log")
    child.start()
    with ReplayServer(ROUTES | {"/release_memory_occupation": ["silence"]}) as server:
        worker = with_worker(server, rest, child)
    assert not child.alive
    assert worker.released == {"kv_cache", "weights"}  # so it is started anew before it is asked
