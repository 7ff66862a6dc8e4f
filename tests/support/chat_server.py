"""An OpenAI-compatible server on loopback whose answers a test writes, and what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = Callable[[dict[str, Any], int], tuple[int, Any]]
"""(body, number of the request) -> (status, JSON of the answer; None: none before the deadline)."""


@dataclass
class ChatServer:
    """Where it is and what it was sent."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def said(content: str | None = None, *calls: tuple[str, Any], reason: str = "stop") -> Any:
    """A whole answer of one choice; a call's arguments may be any text."""
    listed = [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": given if isinstance(given, str) else json.dumps(given),
            },
        }
        for n, (name, given) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content, **({"tool_calls": listed} if calls else {})}
    return {"choices": [{"message": message, "finish_reason": reason}]}


@contextlib.contextmanager
def chat_server(answer: Answer, models: tuple[str, ...] = ("scripted",)) -> Iterator[ChatServer]:
    """The server, in a thread of its own, for as long as the block lasts."""
    seen, loop, ready = ChatServer(), asyncio.new_event_loop(), threading.Event()

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        seen.bodies.append(body)
        seen.headers.append(dict(request.headers))
        status, content = answer(body, len(seen.bodies) - 1)
        if content is None:
            await asyncio.sleep(30)
        text = content if isinstance(content, str) else json.dumps(content)
        return web.Response(status=status, text=text, content_type="application/json")

    async def listed(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in models]})

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/v1/models", listed)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        seen.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    def live() -> None:
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
