"""The worker process of isolated tools: reads jobs from its standard input, runs them under limits,
writes their results.

One JSON object a line. First {"module", "file", "memory"}: where the tool's function is, and how
many bytes it may take beyond what the process has after loading it; answered by {}. Then any number
of {"name", "arguments", "characters", "seconds"}, each answered by {"status", "text", "reusable"}.
JSON, since what a misbehaving tool sends back must not be unpickled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import reduce
from types import ModuleType
from typing import Any, BinaryIO


def main() -> None:
    """Serve until the parent closes the pipe; its end also ends a tool that still runs."""
    jobs, output = _channels()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = next(jobs)
    module = _load(first["module"], first["file"])
    _limit_memory(first["memory"])
    _write(output, {})
    threads = threading.active_count()
    for job in jobs:
        _limit_processor(job["seconds"])
        status, text = _run(module, job)
        reusable = status != "crashed" and threading.active_count() == threads
        _write(output, {"status": status, "text": text, "reusable": reusable})


def _run(module: ModuleType, job: Mapping[str, Any]) -> tuple[str, str]:
    from rest_mega.environments.results import as_text
    from rest_mega.environments.tools import ToolError

    try:
        function: Any = reduce(getattr, job["name"].split("."), module)
        text = as_text(function(**job["arguments"]))[: job["characters"] + 1]
        return "ok", text.encode("utf-8", "replace").decode()
    except ToolError as error:
        return "error", str(error)[: job["characters"] + 1]
    except MemoryError:
        return "crashed", "it ran out of memory"
    except BaseException as error:
        return "error", f"{type(error).__name__}: {error}"[: job["characters"] + 1]


def _channels() -> tuple[Iterator[dict[str, Any]], BinaryIO]:
    """The jobs, and where results go; what the tool itself prints or reads meets nothing."""
    source, output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in source:
            lines.put(line)
        os._exit(0)  # the parent is gone, whatever the tool is doing

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(lines.get()) for _ in iter(int, 1)), output


def _write(output: BinaryIO, message: Mapping[str, Any]) -> None:
    output.write(json.dumps(message).encode() + b"\n")
    output.flush()


def _load(name: str, file: str | None) -> ModuleType:
    """The module by its name, else from its file (environment.modules may be paths)."""
    if importlib.util.find_spec(name.split(".")[0]) is not None or file is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _limit_memory(extra: int) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))


def _limit_processor(seconds: float) -> None:
    """Processor time as the last resort: the parent kills at the deadline, unless it is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
