"""The servers of one player, and how a lost one comes back.

Everything here runs on one event loop. A worker is *open* while requests may be sent to it. One
that loses a connection is closed, examined, and either opened again or started anew and given the
current weights; what it was generating is asked of another worker, or of itself once it is back.
Behind a router nobody knows who was asked: a request that breaks off has all workers examined.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

import aiohttp

from rest_mega.config import ConfigError, SglangConfig
from rest_mega.rollout.sglang_client import Client, ServerLost, ServerRefused
from rest_mega.rollout.sglang_router import Router
from rest_mega.rollout.sglang_server import Server
from rest_mega.rollout.sglang_worker import Worker, choose


class Fleet:
    """All workers of one player."""

    def __init__(
        self,
        config: SglangConfig,
        servers: list[Server],
        restore: Callable[[Worker], Awaitable[None]],
        router: Router | None = None,
    ) -> None:
        """`servers`: the ones to start, none when config.urls are attached to. `restore(worker)`
        loads the current weights into a worker unless it has them. `router`: requests go through
        it."""
        self._config, self._servers, self._restore = config, servers, restore
        self._router, self._examination = router, asyncio.Lock()
        self._examined = 0
        self.workers: list[Worker] = []
        self.losses = 0
        """How often a worker was lost."""
        self.weights = asyncio.Lock()
        """Held while weights are loaded: a restored worker never gets the ones before last."""
        self._changed = asyncio.Condition()
        self._gate_open, self._failure, self._loads = False, "", 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start or attach to every server and wait until all are ready; ConfigError when one does
        not become so."""
        # Shorter than a server keeps an idle connection: ours must not break under a request.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._session = aiohttp.ClientSession(connector=connector)
        for server in self._servers:
            server.start()
        places: list[tuple[str, Server | None]] = [(url, None) for url in self._config.urls]
        places += [(server.url, server) for server in self._servers]
        self.workers = list(await asyncio.gather(*(self._reach(*place) for place in places)))
        if self._router is not None:
            await self._router.start(self._session, [w.client.url for w in self.workers])

    async def _reach(self, url: str, server: Server | None) -> Worker:
        client = self._client(url)
        await self._ready(client, server)
        try:
            return Worker(client, server, await client.info())
        except (ServerLost, ServerRefused) as error:
            raise ConfigError(
                f"{url} is ready but does not say what an SGLang server says ({error}); mend "
                "rollout.sglang.urls"
            ) from error

    def _client(self, url: str) -> Client:
        assert self._session is not None
        config = self._config
        return Client(url, self._session, config.request_timeout_s, config.update_timeout_s)

    async def _ready(self, client: Client, server: Server | None) -> None:
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while not await client.ready():
                    if server is not None:
                        server.check()
                    await asyncio.sleep(0.2)
        except TimeoutError as error:
            seconds, tail = self._config.start_timeout_s, server.tail() if server else ""
            raise ConfigError(
                f"no SGLang server was ready at {client.url} within {seconds:g} s; start it, "
                f"mend rollout.sglang.urls or raise rollout.sglang.start_timeout_s. {tail}"
            ) from error

    # ------------------------------------------------------------------ who is asked

    async def shut(self) -> None:
        """No new requests from here on: weights are about to be loaded."""
        self._gate_open = False
        self._loads += 1

    async def admit(self) -> None:
        """Requests may be sent."""
        await self._set(gate=True, failure="")

    async def fail(self, why: str) -> None:
        """Whoever waits for a worker, or asks for one until the next `admit`, is told `why`."""
        await self._set(gate=False, failure=why)

    async def _set(self, gate: bool, failure: str) -> None:
        async with self._changed:
            self._gate_open, self._failure = gate, failure
            self._changed.notify_all()

    async def pick(self, home: Worker | None, failed: Collection[Worker] = ()) -> Worker:
        """`choose`, once requests are admitted and a worker is open; RuntimeError when none comes
        back in time."""
        while True:
            if self._failure:
                raise RuntimeError(self._failure)
            worker = choose(self.workers, home, failed) if self._gate_open else None
            if worker is not None:
                return worker
            try:
                async with asyncio.timeout(self._config.start_timeout_s), self._changed:
                    await self._changed.wait_for(self._pickable)
            except TimeoutError as error:
                raise RuntimeError(
                    f"no SGLang server took requests for {self._config.start_timeout_s:g} s "
                    "(rollout.sglang.start_timeout_s)"
                ) from error

    def _pickable(self) -> bool:
        return bool(self._failure) or (self._gate_open and any(w.open for w in self.workers))

    def door(self, worker: Worker) -> Client:
        """Where a request for `worker` is sent."""
        return worker.client if self._router is None else self._router.client

    # ------------------------------------------------------------------ lost and back

    async def broke_off(self, worker: Worker, why: str) -> None:
        """A request that was sent for `worker` did not come to an end. Returns once it is known
        who is to be left out."""
        if self._router is None:
            self.lose(worker, why)
            return
        seen = self._examined
        async with self._examination:
            if seen == self._examined:  # others that broke off meanwhile have had it done
                await self._examine(self._router, why)
                self._examined += 1

    async def _examine(self, router: Router, why: str) -> None:
        """Lose the workers behind the router that do not generate; see that it is there itself."""
        found = [worker for worker in self.workers if worker.open]
        sound = await asyncio.gather(*(self._sound(worker) for worker in found))
        for worker, is_sound in zip(found, sound, strict=True):
            if not is_sound:
                self.lose(worker, why)
        assert self._session is not None
        try:
            await router.revive(self._session, [w.client.url for w in self.workers if w.open])
        except ConfigError as error:
            await self.fail(str(error))

    def lose(self, worker: Worker, why: str) -> None:
        """Close a worker that broke off, did not answer or did not take weights, and see to it in
        the background."""
        if worker.open:
            worker.open, worker.trouble = False, why
            self.losses += 1
            self._background(self._mend(worker))

    async def abort_running(self) -> None:
        """Ask every worker to answer what it runs as far as it has come, until nothing runs: a
        request may meet its abort on the way to the server."""
        while running := [(w, rid) for w in self.workers for rid in w.running]:
            await asyncio.gather(*(self._abort(*one) for one in running))
            await asyncio.sleep(0.2)

    def abandon(self, worker: Worker, rid: str) -> None:
        """A request whose answer nobody waits for any more."""
        self._background(self._abort(worker, rid))

    async def _abort(self, worker: Worker, rid: str) -> None:
        for one in [worker] if self._router is None else self.workers:
            with contextlib.suppress(ServerLost, ServerRefused):
                await one.client.abort(rid)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def mended(self) -> None:
        """Wait until no worker is being seen to; RuntimeError when one could not be brought
        back."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._failure:
            raise RuntimeError(self._failure)

    async def _mend(self, worker: Worker) -> None:
        """Open it again as it is if it is sound and takes our weights, else started anew."""
        try:
            if self._router is not None:
                await self._router.take_out(worker.client.url)
            if not await self._sound(worker):
                await self._again(worker)
            while not await self._reopened(worker):
                await self._again(worker)
        except (ConfigError, ServerLost, ServerRefused, RuntimeError, TimeoutError) as error:
            await self.fail(f"the SGLang server {worker.client.url} is not coming back: {error}")

    async def _sound(self, worker: Worker) -> bool:
        """It generates; a broken connection was all."""
        if worker.released or (worker.server is not None and not worker.server.alive):
            return False
        return await worker.client.healthy(self._config.health_s)

    async def _reopened(self, worker: Worker) -> bool:
        """Open, with the current weights; False when it did not take them."""
        async with self.weights:  # no load begins or ends meanwhile
            try:
                await self._restore(worker)
            except (ServerLost, ServerRefused) as error:
                worker.trouble = str(error)
                return False
            if self._router is not None:
                await self._router.put_in(worker.client.url)
            async with self._changed:
                worker.open = True
                self._changed.notify_all()
        return True

    async def _again(self, worker: Worker) -> None:
        if worker.restarts == self._config.restarts:
            raise RuntimeError(
                f"{worker.trouble}, and was lost more than {self._config.restarts} times "
                "(rollout.sglang.restarts)"
            )
        worker.restarts += 1
        worker.released.clear()
        if worker.server is not None:
            worker.server.kill()
            worker.server.start()
            worker.client = self._client(worker.server.url)
        await self._ready(worker.client, worker.server)
        async with asyncio.timeout(self._config.start_timeout_s):
            while not await worker.client.healthy(self._config.health_s):
                await asyncio.sleep(0.2)

    async def watch(self) -> None:
        """Lose workers that run requests but no longer generate: a hung server keeps its
        connections."""
        while True:
            await asyncio.sleep(self._config.health_s)
            busy, loads = self._busy(), self._loads
            checks = [w.client.healthy(self._config.health_s) for w in busy]
            for worker, healthy in zip(busy, await asyncio.gather(*checks), strict=True):
                # A pause for new weights meanwhile would have kept the check waiting.
                if not healthy and self._gate_open and self._loads == loads:
                    self._give_up(worker)

    def _busy(self) -> list[Worker]:
        """Open workers that may run requests."""
        if self._router is not None and any(w.running for w in self.workers):
            return [w for w in self.workers if w.open]
        return [w for w in self.workers if w.open and w.running]

    def _give_up(self, worker: Worker) -> None:
        """Nobody waits any longer for what runs on a hung worker."""
        if worker.server is not None:
            worker.server.kill()
        self.lose(worker, f"it generated no token within {self._config.health_s:g} s")
        for one in [worker] if self._router is None else self.workers:
            for request in list(one.running.values()):
                request.cancel()

    async def close(self) -> None:
        """End the servers we started and all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(server.stop() for server in self._servers))
        if self._router is not None:
            await self._router.close()
        if self._session is not None:
            await self._session.close()
