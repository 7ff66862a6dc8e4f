"""Isolated tools: whatever they do, the call is answered in time and the next one works."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError
from rest_mega.environments import ENVIRONMENTS, ToolEnvironment, ToolRuntime, load_modules, tool
from rest_mega.environments.deadline import together
from rest_mega.records import ToolOutcome
from tests.support.calls import outcomes, reply_of, row, runtime
from tests.support.hostile_tools import Hostile

ENVIRONMENTS.setdefault("test hostile", Hostile)
LIMITS = {"isolated_memory_mb": 256, "call_timeout_s": 20.0}


@pytest.fixture(scope="module")
def shared() -> Iterator[ToolRuntime]:
    """Workers that serve one test after another."""
    made = runtime(isolated_workers=1, **LIMITS)
    yield made
    made.close()


def ask(running: ToolRuntime, name: str, **arguments: Any) -> ToolOutcome:
    (outcome,) = outcomes(row("test hostile"), (name, arguments), running=running)
    return outcome


def process(running: ToolRuntime) -> int:
    """The worker that is at work now; a well-behaved call."""
    assert ask(running, "add", a=2, b=3).content == "5"
    return int(ask(running, "process").content)


def gone(pid: int) -> bool:
    """No such process, or one that waits to be reaped."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_a_worker_serves_one_call_after_another_outside_of_this_process(
    shared: ToolRuntime,
) -> None:
    assert process(shared) == process(shared) != os.getpid()


@pytest.mark.parametrize(
    ("name", "arguments", "status", "content"),
    [
        ("leave", {"code": 0}, "crashed", "error: its process ended with code 0"),
        ("leave", {"code": 3}, "crashed", "error: its process ended with code 3"),
        ("crash", {}, "crashed", "error: its process died of SIGSEGV"),
        ("hog", {}, "crashed", "error: it ran out of memory (256 MB)"),
    ],
)
def test_a_worker_that_dies_fails_its_own_call_alone(
    shared: ToolRuntime, name: str, arguments: dict[str, Any], status: str, content: str
) -> None:
    before = process(shared)
    outcome = ask(shared, name, **arguments)
    assert (outcome.status, outcome.content) == (status, content)
    assert gone(before)
    assert process(shared) != before


def test_an_endless_loop_is_killed_at_its_deadline() -> None:
    mine = runtime(**{**LIMITS, "call_timeout_s": 0.3})
    worker = process(mine)
    outcome = ask(mine, "loop")
    assert (outcome.status, outcome.content) == ("timeout", "error: no result within 0.3 s")
    assert gone(worker)
    assert process(mine) != worker
    mine.close()


def test_the_children_of_a_tool_are_killed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    mine = runtime(**{**LIMITS, "call_timeout_s": 1.0})
    assert ask(mine, "family", path=str(path)).status == "timeout"
    mine.close()
    worker, child = map(int, path.read_text().split())
    until = time.monotonic() + 10
    while not (gone(worker) and gone(child)) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone(worker)
    assert gone(child)


def test_output_of_10_mb_is_cut_and_what_a_tool_prints_is_nobodys_answer(
    shared: ToolRuntime,
) -> None:
    before = process(shared)
    outcome = ask(shared, "flood", size=10_000_000)
    assert outcome.status == "ok"
    assert outcome.content.startswith("xxxx")
    assert outcome.content.endswith(" characters]")
    assert process(shared) == before


def test_endless_recursion_and_a_refusal_are_errors_that_the_worker_survives(
    shared: ToolRuntime,
) -> None:
    before = process(shared)
    assert ask(shared, "recurse").content.startswith("error: RecursionError: maximum recursion")
    assert ask(shared, "refuse", words=1).content == "error: not today "
    assert ask(shared, "refuse", words=10**6).content.startswith("error: not today not today")
    assert process(shared) == before


def test_a_worker_that_was_left_with_a_thread_is_not_used_again(shared: ToolRuntime) -> None:
    before = process(shared)
    assert ask(shared, "linger").content == str(before)
    assert gone(before)


def test_waiting_for_a_free_worker_does_not_count_against_the_deadline() -> None:
    mine = runtime(isolated_workers=1, parallel_calls=3, **{**LIMITS, "call_timeout_s": 0.3})
    episodes = [mine.open(row("test hostile")) for _ in range(3)]

    replies = [reply_of(("loop", {})), reply_of(("loop", {})), reply_of(("add", {"a": 1, "b": 1}))]
    jobs = [lambda e=e, r=r: e.answer(r)[0] for e, r in zip(episodes, replies, strict=True)]
    assert [o.status for o in together(jobs, 3)] == ["timeout", "timeout", "ok"]
    mine.close()


def test_a_tool_of_a_file_that_the_config_names_runs_in_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "of_a_file.py"
    path.write_text(
        "import os\n"
        "from rest_mega.environments import ToolEnvironment, environment, tool\n"
        "@environment('test isolated file')\n"
        "class Own(ToolEnvironment):\n"
        "    @tool(isolated=True)\n"
        "    @staticmethod\n"
        "    def where() -> list[object]:\n"
        "        'Tell.'\n"
        "        return [os.getpid(), __name__]\n"
    )
    (module,) = load_modules([str(path)])
    mine = runtime(**LIMITS)
    (outcome,) = outcomes(row("test isolated file"), ("where", {}), running=mine)
    pid, name = json.loads(outcome.content)
    assert pid != os.getpid()
    assert name == module.__name__
    mine.close()
    assert gone(pid)
    del ENVIRONMENTS["test isolated file"]


def test_an_isolated_tool_with_a_self_or_inside_a_function_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a @staticmethod of a class at the top"):

        class Bound(ToolEnvironment):
            @tool(isolated=True)
            def run(self) -> int:
                """Needs an object."""
                return 1

    with pytest.raises(ConfigError, match=r"must be a @staticmethod of a class at the top"):

        class Local(ToolEnvironment):
            @tool(isolated=True)
            @staticmethod
            def run() -> int:
                """Cannot be imported."""
                return 1
