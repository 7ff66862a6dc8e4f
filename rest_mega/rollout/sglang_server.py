"""One SGLang server as a child process: started, waited for, ended, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rest_mega import launch
from rest_mega.config import ConfigError

TAIL = 2000
"""Characters of a server's log that an error shows."""

LEASH = Path(__file__).with_name("sglang_leash.py")


def server_words(arguments: Mapping[str, Any]) -> list[str]:
    """SGLang's arguments as words: true is a flag, false and null are left out, a list is several
    words, a mapping JSON."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def default_arguments(model_path: str, dtype: str, device: str) -> dict[str, Any]:
    """What a server for token ids needs; rollout.sglang.<name> is laid over it."""
    common = {
        "model_path": model_path,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "device": device,
        "host": "127.0.0.1",
        "skip_tokenizer_init": True,  # ids in, ids out
        "skip_server_warmup": True,
    }
    if device != "cpu":
        return common
    # sleep_on_idle: the scheduler would spin on one of few cores.
    return common | {"attention_backend": "torch_native", "sleep_on_idle": True}


class Server:
    """A child process. Started in the thread whose end is to end it."""

    def __init__(
        self,
        python: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        gpus: Sequence[int] = (),
        module: str = "sglang.launch_server",
    ) -> None:
        """`gpus`: those that the server gets, as this process numbers them; empty: what it sees.
        `module`: what Python runs."""
        self.gpus, self._module = tuple(gpus), module
        self._python, self._arguments = python or sys.executable, dict(arguments)
        self._environment, self._log = dict(environment), log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Begin to start; ConfigError when there is no such interpreter."""
        port = self._arguments.get("port") or launch.free_port()
        host = self._arguments["host"]
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        words = ["-m", self._module, *server_words(self._arguments | {"port": port})]
        if self._arguments.get("device") == "cpu":
            self._environment.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        if self.gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = launch.visible_gpus(self.gpus)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self._process = self._open(words, log)

    def _open(self, words: list[str], log: TextIO) -> subprocess.Popen[bytes]:
        python = shutil.which(self._python)
        if python is None:
            raise ConfigError(
                f"rollout.sglang.python={self._python!r} cannot be run; name the Python "
                "interpreter of the environment that sglang is installed in"
            )
        return subprocess.Popen(
            [sys.executable, str(LEASH), str(os.getpid()), python, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=launch.child_environment(self._environment),
            start_new_session=True,  # a Ctrl-C is for the run, which then ends its servers
        )

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the server that was started last."""
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """ConfigError with the end of its log when the process has ended."""
        if not self.alive:
            code = self._process.returncode if self._process else None
            raise ConfigError(
                f"{self._module} ended with code {code} before it was ready; is it installed for "
                f"{self._python} and are rollout.sglang.* its arguments? The end of {self._log}:\n"
                f"{self.tail()}"
            )

    def tail(self) -> str:
        """The end of the log."""
        return self._log.read_text("utf-8", "replace")[-TAIL:] if self._log.exists() else ""

    async def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and SIGKILL for what is left of its process group after `seconds`."""
        if self._process is None:
            return
        process, deadline = self._process, time.monotonic() + seconds
        process.terminate()
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End the whole process group at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
