"""SGLang servers for tests: real ones on this machine's CPU, and one that replays recorded
exchanges."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from rest_mega.config import SglangConfig

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
STANDINS = Path(__file__).parent / "sglang_cpu" / "standins"
EXCHANGES = Path(__file__).parents[1] / "data" / "sglang"

ROUTINE = {
    "/ready": ["ready"],
    "/server_info": ["server_info"],
    "/model_info": ["model_info_after_update"],
    "/pause_generation": ["pause_generation_abort"],
    "/continue_generation": ["continue_generation_abort"],
    "/flush_cache": ["flush_cache"],
    "/begin_weight_update": ["begin_weight_update"],
    "/end_weight_update": ["end_weight_update"],
    "/update_weight_version": ["update_weight_version"],
    "/abort_request": ["abort_request_rid"],
}
"""Answers that a test need not name."""


def server_config(**more: Any) -> SglangConfig:
    """One small server in the environment that `make sglang` installs."""
    settings: dict[str, Any] = {
        "python": str(PYTHON),
        "environment": {"PYTHONPATH": str(STANDINS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "bucket_mb": 1,
        "arguments": {"mem_fraction_static": 0.1, "max_total_tokens": 16384},
    }
    return SglangConfig(**(settings | more))


def recorded(name: str) -> tuple[int | None, Any]:
    """(status, body) of a recorded answer; the status is None where the connection broke."""
    answer = json.loads((EXCHANGES / f"{name}.json").read_text())["response"]
    return answer["status"], answer["json"]


class ReplayServer:
    """A server on loopback that answers each route with recorded answers, in turn, the last one
    again and again; "silence" is never answered. Keeps what it was asked."""

    def __init__(self, answers: Mapping[str, Sequence[str]], device: str = "cpu") -> None:
        """`answers`: route -> names of exchanges, or "silence"; `device`: where
        it says that it runs."""
        self._answers = {route: list(names) for route, names in (ROUTINE | dict(answers)).items()}
        self.asked: list[tuple[str, Any]] = []
        self.url, self._version, self._device = "", "default", device
        self._loop, self._over = asyncio.new_event_loop(), asyncio.Event()

    def bodies(self, route: str) -> list[Any]:
        """What was sent to a route, in order."""
        return [body for asked, body in self.asked if asked == route]

    def next(self, route: str, *names: str) -> None:
        """Answer these once each, before what it answers now."""
        self._answers[route] = [*names, *self._answers[route]]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{route}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.asked.append((request.path, body))
        if request.path == "/update_weight_version":
            self._version = body["new_version"]
        names = self._answers.get(request.path)
        if names is None:
            return web.Response(status=404)
        name = names.pop(0) if len(names) > 1 else names[0]
        if name == "silence":
            await self._over.wait()
            return web.Response()
        status, answer = recorded(name)
        if status is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if request.path == "/model_info":
            answer = answer | {"weight_version": self._version}
        if request.path == "/generate" and status == 200:
            for span in answer["meta_info"].get("weight_versions", []):
                if not span["version"].isdecimal():  # weights that were not named as we do
                    span["version"] = self._version
        if request.path == "/server_info":
            answer = answer | {"device": self._device}
        return web.json_response(answer, status=status)
