"""sglang-router before the servers of one player: one door for requests, with routing by prefix.

It passes on /generate alone. Whatever controls a server goes to the server itself, and the router
is told which servers may be asked: one that is lost is taken out before it is started anew, and put
in again once it holds our weights. Its own retries, health checks and circuit breaker are off where
we start it: each would hide a lost server from us. Written for sglang-router 0.3.2.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from pathlib import Path

import aiohttp

from rest_mega import launch
from rest_mega.config import ConfigError, SglangConfig
from rest_mega.rollout.sglang_client import Client, ServerLost, ServerRefused
from rest_mega.rollout.sglang_server import Server

START = "start"
"""Value of rollout.sglang.router for a router of our own."""


class RouterClient(Client):
    """The router's own routes, and /generate, whose errors of the server kind are the loss of
    whichever server it had chosen."""

    def _failure(self, status: int, text: str) -> Exception:
        return ServerLost(text) if status >= 500 else ServerRefused(text)

    async def up(self) -> bool:
        """It answers, with or without servers behind it."""
        try:
            status, _ = await self._call("GET", "/liveness", None, 5.0)
        except ServerLost:
            return False
        return status == 200

    async def workers(self) -> dict[str, str]:
        """URL of each server behind it -> its id there; only those it takes for healthy."""
        found = await self._json("GET", "/workers")
        return {w["url"].rstrip("/"): w["id"] for w in found["workers"] if w["is_healthy"]}

    async def add(self, url: str) -> None:
        """Have it ask a server; that it does so takes a moment."""
        await self._json("POST", "/workers", {"url": url})

    async def remove(self, worker_id: str) -> None:
        """Have it ask a server no more."""
        await self._json("DELETE", f"/workers/{worker_id}")


class Router:
    """A router that we have started or found."""

    def __init__(self, config: SglangConfig, folder: Path) -> None:
        """`folder` takes the log of one that is started."""
        self._config = config
        self._child: Server | None = None
        if config.router == START:
            timeout = math.ceil(config.request_timeout_s) + 60  # ours comes first
            self._child = Server(
                config.python,
                {
                    "host": "127.0.0.1", "policy": "cache_aware", "log_level": "warn",
                    "prometheus_host": "127.0.0.1", "prometheus_port": launch.free_port(),
                    "request_timeout_secs": timeout, "worker_startup_check_interval": 1,
                    "disable_retries": True, "disable_circuit_breaker": True,
                    "disable_health_check": True,
                },
                config.environment,
                folder / "router.log",
                module="sglang_router.launch_router",
            )  # fmt: skip
        self.client: RouterClient

    async def start(self, session: aiohttp.ClientSession, urls: Collection[str]) -> None:
        """Wait until it answers and has exactly the servers at `urls` behind it; ConfigError when
        it does not come to that."""
        config = self._config
        if self._child is not None:
            self._child.start()
        url = self._child.url if self._child is not None else config.router
        self.client = RouterClient(url, session, config.request_timeout_s, config.update_timeout_s)
        try:
            async with asyncio.timeout(config.start_timeout_s):
                while not await self.client.up():
                    if self._child is not None:
                        self._child.check()
                    await asyncio.sleep(0.1)
                await self._agree(urls)
        except (TimeoutError, ServerLost, ServerRefused) as error:
            raise ConfigError(
                f"no sglang-router was ready at {url} within {config.start_timeout_s:g} s "
                f"({str(error) or 'no answer'}); start it, mend rollout.sglang.router or raise "
                "rollout.sglang.start_timeout_s"
            ) from error

    async def _agree(self, urls: Collection[str]) -> None:
        strangers = sorted(set(await self.client.workers()) - {url.rstrip("/") for url in urls})
        if strangers:
            raise ConfigError(
                f"the router {self.client.url} also asks {strangers[:3]}, which would answer with "
                "weights that we never load: name them in rollout.sglang.urls or take them out"
            )
        for url in urls:
            await self.put_in(url)

    async def put_in(self, url: str) -> None:
        """Have it ask the server at `url`; returns once it does."""
        if url in await self.client.workers():
            return
        await self.client.add(url)
        async with asyncio.timeout(self._config.start_timeout_s):
            while url not in await self.client.workers():
                await asyncio.sleep(0.1)

    async def take_out(self, url: str) -> None:
        """Have it ask the server at `url` no more; returns once it does not."""
        async with asyncio.timeout(self._config.start_timeout_s):
            while worker_id := (await self.client.workers()).get(url):
                await self.client.remove(worker_id)
                await asyncio.sleep(0.1)

    async def revive(self, session: aiohttp.ClientSession, urls: Collection[str]) -> None:
        """Where it is gone: start it again, or wait for it."""
        if not await self.client.up():
            if self._child is not None:
                self._child.kill()
            await self.start(session, urls)

    @property
    def pid(self) -> int:
        """Process id of one that was started here."""
        assert self._child is not None
        return self._child.pid

    async def close(self) -> None:
        """End it if it is ours."""
        if self._child is not None:
            await self._child.stop()
