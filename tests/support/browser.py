"""Headless Chromium by its DevTools protocol: open a file, evaluate, press keys, take pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0", "--disable-dev-shm-usage",
]  # fmt: skip
DEADLINE_S = 60.0


def chromium() -> str | None:
    """Where the browser is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a browser of its own; `errors` are what its console and its scripts reported."""

    def __init__(self, profile: Path, width: int = 1400, height: int = 1000) -> None:
        """`profile`: an empty folder for what the browser writes."""
        self.errors: list[str] = []
        self._profile, self._size, self._number = profile, (width, height), 0
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Browser:
        words = [str(chromium()), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._loop.run_until_complete(self._connect())
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._close())
        self._process.terminate()
        self._process.wait(20)
        self._loop.close()

    async def _connect(self) -> None:
        file, end = self._profile / "DevToolsActivePort", time.monotonic() + DEADLINE_S
        while not file.is_file() or len(file.read_text().splitlines()) < 2:
            assert self._process.poll() is None, "the browser ended before it listened"
            assert time.monotonic() < end, "the browser does not listen"
            await asyncio.sleep(0.05)
        port = file.read_text().splitlines()[0]
        self._http = aiohttp.ClientSession()
        async with self._http.get(f"http://127.0.0.1:{port}/json") as answer:
            target = next(t for t in await answer.json() if t["type"] == "page")
        self._socket = await self._http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self._ask(f"{domain}.enable")
        width, height = self._size
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self._ask("Emulation.setDeviceMetricsOverride", **size)

    async def _close(self) -> None:
        await self._socket.close()
        await self._http.close()

    async def _ask(self, method: str, **values: Any) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": values})
        end = time.monotonic() + DEADLINE_S
        while True:
            message = json.loads((await self._socket.receive(end - time.monotonic())).data)
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: Any) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            about = values["exceptionDetails"]
            text = about.get("exception", {}).get("description")
            self.errors.append(str(text or about["text"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
            self.errors.append(json.dumps(values["args"]))

    def ask(self, method: str, **values: Any) -> Any:
        """One command of the protocol."""
        return self._loop.run_until_complete(self._ask(method, **values))

    def open(self, path: Path, fragment: str = "") -> float:
        """Open a report and wait until it is ready; returns the page's own seconds to there."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=path.resolve().as_uri() + fragment)
        return float(self.wait("Number(document.documentElement?.dataset.ready ?? 0)")) / 1000

    def wait(self, expression: str) -> Any:
        """The value of a JavaScript expression once it is true."""
        end = time.monotonic() + DEADLINE_S
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression} stays {value!r}; {self.errors}"
            time.sleep(0.02)
        return value

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        result = self.ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let go."""
        text = {"text": key} if len(key) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path) -> None:
        """What is in sight, as PNG."""
        data = self.ask("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
