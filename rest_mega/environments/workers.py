"""Isolated tools: a pool of worker processes with limits on time and memory; one that misbehaves is
killed, and only its call fails.

- A worker is a fresh Python (not a fork of this process, which holds torch and its threads) that
  loads the tool's module and nothing more; it serves one call after another.
- A call past its deadline is ended by killing the worker's process group; so is a worker that
  crashed, ran out of memory or left threads behind.
- This keeps the run alive. It is no sandbox: a tool can still read files and use the network.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rest_mega.config import EnvironmentConfig
from rest_mega.environments.deadline import DeadlineError, remaining, uncounted
from rest_mega.environments.tools import ToolCrashError, ToolError

START_S = 60.0
"""Deadline of a worker's start, in which it loads the tool's module."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rest_mega.environments.worker import main; main()"
)


class Workers:
    """At most `isolated_workers` processes, started when needed, reused, killed when in doubt."""

    def __init__(self, limits: EnvironmentConfig) -> None:
        self._limits = limits
        self._slots = threading.BoundedSemaphore(limits.isolated_workers)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        weakref.finalize(self, _end_all, self._idle)  # also at the end of the program

    def close(self) -> None:
        """End the idle workers."""
        _end_all(self._idle)

    def run(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
        """The text of `function(**arguments)`, run in a worker, by this thread's deadline.

        Waiting for a free worker and starting it are not counted. Raises DeadlineError, ToolError
        for what the function raised, ToolCrashError where the worker died.
        """
        with uncounted():
            self._slots.acquire()
        try:
            with uncounted():
                worker = self._worker(function.__module__)
            return self._ask(worker, function.__qualname__, arguments)
        finally:
            self._slots.release()

    def _worker(self, module: str) -> _Process:
        others: list[_Process] = []
        found: _Process | None = None
        with suppress(queue.Empty):
            while found is None:
                worker = self._idle.get_nowait()
                alive = worker.process.poll() is None
                if alive and worker.module == module:
                    found = worker
                else:
                    others.append(worker)
        if found is None and others:
            others.pop(0).end()  # makes room: there are never more processes than slots
        for worker in others:
            self._idle.put(worker)
        return found or _Process(module, self._limits.isolated_memory_mb * 2**20)

    def _ask(self, worker: _Process, name: str, arguments: Mapping[str, Any]) -> str:
        seconds = min(remaining(), self._limits.call_timeout_s)
        size = self._limits.result_characters
        job = {"name": name, "arguments": arguments, "characters": size, "seconds": seconds}
        reusable = False
        try:
            answer = worker.ask(job, seconds, 16 * size + 1024)
            reusable = bool(answer["reusable"])
        finally:
            if reusable:
                self._idle.put(worker)
            else:
                worker.end()
        if answer["status"] == "crashed":
            raise ToolCrashError(f"{answer['text']} ({self._limits.isolated_memory_mb} MB)")
        if answer["status"] != "ok":
            raise ToolError(answer["text"])
        return str(answer["text"])


class _Process:
    """One worker process, with the module of its tool loaded."""

    def __init__(self, module: str, memory: int) -> None:
        self.module = module
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # its children die with it, and Ctrl-C is not its business
        )
        file = getattr(sys.modules[module], "__file__", None)
        try:
            self.ask({"module": module, "file": file, "memory": memory}, START_S, 1024)
        except BaseException:
            self.end()
            raise

    def ask(self, message: Mapping[str, Any], seconds: float, size: int) -> dict[str, Any]:
        """Send a message and read the answer of at most `size` bytes."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            pipe_in.write(json.dumps(message).encode() + b"\n")
            line = _read_line(pipe_out.fileno(), time.monotonic() + seconds, size)
        except TimeoutError:
            raise DeadlineError(f"no result within {seconds:g} s") from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise ToolCrashError(f"its process {self._death()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> str:
        until = time.monotonic() + 1
        while time.monotonic() < until and not _has_ended(self.process.pid):
            time.sleep(0.001)  # its pipe closes a moment before
        self.end()
        code = self.process.returncode
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def end(self) -> None:
        """Kill the process, unless it has ended by itself, and all that it started; reap it."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _has_ended(pid: int) -> bool:
    """Asked without reaping: the id stays this process's until its group is killed."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _read_line(pipe: int, until: float, size: int) -> bytes:
    """Bytes up to a newline, the end of the pipe, or `size`; TimeoutError when none comes."""
    line = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(line) <= size and not line.endswith(b"\n"):
            if not selector.select(max(until - time.monotonic(), 0)):
                raise TimeoutError
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                break
            line += chunk
    return bytes(line)


def _end_all(idle: queue.SimpleQueue[_Process]) -> None:
    while not idle.empty():
        idle.get_nowait().end()
