"""A process that answers as an SGLang server does, after the time that a GPU would take.

    python benchmarks/simulated_sglang.py --reply REPLY.json [--seconds 4.0]

Every /generate is answered with the token ids in REPLY.json; it takes `--seconds` times a factor
between 0.5 and 1.5 that follows from the request's seed (`seconds_of`). Prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
from aiohttp import web

DONE = (
    "/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor",
    "/pause_generation", "/continue_generation", "/flush_cache", "/abort_request",
)  # fmt: skip
"""Routes that are answered without doing anything."""
LONGEST = 1_000_000


def seconds_of(seed: int, mean: float) -> float:
    """How long the request with this seed takes."""
    return mean * (0.5 + seed % 9973 / 9972)


class Server:
    """Its state: the version that the client gave its weights."""

    def __init__(self, ids: Sequence[int], seconds: float) -> None:
        self._ids, self._seconds = list(ids), seconds
        self._version, self._answer = "default", b""
        self._name("default")

    def _name(self, version: str) -> None:
        spans = [{"version": version, "start": 0, "end": len(self._ids)}]
        meta = {
            "finish_reason": {"type": "stop", "matched": self._ids[-1]},
            "output_token_logprobs": [[-0.125, i, None] for i in self._ids],
            "weight_version": version,
            "weight_versions": spans,
        }
        self._version = version
        self._answer = orjson.dumps({"output_ids": self._ids, "text": "", "meta_info": meta})

    async def generate(self, request: web.Request) -> web.Response:
        """The reply, in its time."""
        asked = orjson.loads(await request.read())
        if self._seconds:
            await asyncio.sleep(
                seconds_of(asked["sampling_params"]["sampling_seed"], self._seconds)
            )
        return web.Response(body=self._answer, content_type="application/json")

    async def name_version(self, request: web.Request) -> web.Response:
        """The version of what is generated from now on."""
        self._name((await request.json())["new_version"])
        return web.json_response({"success": True})

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._version})

    def app(self) -> web.Application:
        """All routes that a client calls in a run."""

        async def well(_: web.Request) -> web.Response:
            return web.json_response({"success": True})

        async def info(_: web.Request) -> web.Response:
            return web.json_response(
                {"tp_size": 1, "max_req_input_len": LONGEST, "device": "cpu", "ep_size": 1}
            )

        app = web.Application(client_max_size=2**28)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/update_weight_version", self.name_version)
        app.router.add_get("/model_info", self.model_info)
        app.router.add_get("/server_info", info)
        for route in ("/ready", "/health_generate"):
            app.router.add_get(route, well)
        for route in DONE:
            app.router.add_post(route, well)
        return app


@contextlib.contextmanager
def running(reply: Sequence[int], seconds: float, folder: Path) -> Iterator[str]:
    """The address of such a process, which ends with the block."""
    file = folder / "reply.json"
    file.write_text(json.dumps(list(reply)))
    words = [sys.executable, __file__, "--reply", str(file), "--seconds", str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if not select.select([process.stdout], [], [], 60.0)[0]:
                raise TimeoutError("the simulated server did not start within 60 s")
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def _serve(server: Server) -> None:
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reply", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    words = parser.parse_args()
    asyncio.run(_serve(Server(json.loads(words.reply.read_text()), words.seconds)))


if __name__ == "__main__":
    main()
