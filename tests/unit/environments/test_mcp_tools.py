"""MCP tools against real servers, by both transports: results, refusals, deadlines and deaths."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, McpServerConfig
from rest_mega.environments import ToolRuntime
from rest_mega.launch import free_port
from rest_mega.records import ToolOutcome
from tests.support.calls import outcomes, row, runtime

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
SERVER = str(Path(__file__).parents[2] / "support" / "mcp_server.py")
COMMAND = (sys.executable, SERVER, "stdio")


def serving(timeout_s: float = 20.0, **server: Any) -> ToolRuntime:
    return runtime(mcp={"things": McpServerConfig(**server)}, call_timeout_s=timeout_s)


@pytest.fixture(scope="module")
def by_pipe() -> Iterator[ToolRuntime]:
    made = serving(command=COMMAND, variables=("MCP_TEST_GIVEN",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCP_TEST_GIVEN", "given")
        patch.setenv("MCP_TEST_KEPT", "kept")
        made.open(row("tools"))
        yield made
    made.close()


@pytest.fixture(scope="module")
def by_http() -> Iterator[tuple[ToolRuntime, subprocess.Popen[bytes]]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, SERVER, "http", str(port)])
    until = time.monotonic() + 100
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    made = serving(url=f"http://127.0.0.1:{port}/mcp")
    yield made, process
    made.close()
    process.kill()
    process.wait()


@pytest.fixture(params=["pipe", "http"])
def running(request: pytest.FixtureRequest) -> ToolRuntime:
    if request.param == "pipe":
        return request.getfixturevalue("by_pipe")
    return request.getfixturevalue("by_http")[0]


def ask(running: ToolRuntime, name: str, /, **arguments: Any) -> ToolOutcome:
    (outcome,) = outcomes(row("tools"), (name, arguments), running=running)
    return outcome


def test_the_servers_tools_are_known_with_their_schemas_and_hints(running: ToolRuntime) -> None:
    episode = running.open(row("tools", "add", "die_once", "fail"))
    add = episode.specs[0]["function"]
    assert (add["name"], add["description"]) == ("add", "Add two numbers.")
    kinds = {name: one["type"] for name, one in add["parameters"]["properties"].items()}
    assert kinds == {"a": "integer", "b": "integer"}
    safe = {name: traits.idempotent for name, traits in episode.traits.items()}
    assert safe == {"add": True, "die_once": True, "fail": False}


def test_results_are_text_or_json_and_refusals_are_errors(running: ToolRuntime) -> None:
    assert ask(running, "add", a=2, b=40).content == "42"
    described = json.loads(ask(running, "describe", name="x", tags=["a"]).content)
    assert (described["name"], described["tags"]) == ("x", ["a"])
    assert ask(running, "add", a="2").content == "error: b is missing"
    failed = ask(running, "fail", why="no such thing")
    assert failed.status == "error"
    assert "no such thing" in failed.content


def test_a_hanging_call_meets_its_deadline_and_much_output_is_cut(running: ToolRuntime) -> None:
    (slow,) = outcomes(
        row("tools"), ("hang", {"seconds": 1.0}), running=_hurried(running, seconds=0.2)
    )
    assert (slow.status, slow.content) == ("timeout", "error: no result within 0.2 s")
    assert ask(running, "flood", size=100_000).content.endswith("characters]")


def _hurried(running: ToolRuntime, seconds: float) -> ToolRuntime:
    """The same servers with another deadline."""
    hurried = copy.copy(running)
    hurried.limits = dataclasses.replace(running.limits, call_timeout_s=seconds)
    return hurried


def test_a_started_server_is_given_the_variables_that_are_named_and_no_others(
    by_pipe: ToolRuntime,
) -> None:
    assert ask(by_pipe, "variable", name="MCP_TEST_GIVEN").content == "given"
    assert ask(by_pipe, "variable", name="MCP_TEST_KEPT").content == "unset"


def test_a_server_that_dies_fails_the_call_and_is_started_again(
    by_pipe: ToolRuntime, tmp_path: Path
) -> None:
    before = json.loads(ask(by_pipe, "describe", name="x").content)["process"]
    dead = ask(by_pipe, "die")
    assert (dead.status, dead.content) == ("crashed", "error: MCP server things is gone")
    assert ask(by_pipe, "die_once", path=str(tmp_path / "died")).content == "alive"  # a retry
    assert json.loads(ask(by_pipe, "describe", name="x").content)["process"] != before


def test_a_server_that_does_not_answer_is_refused_at_start() -> None:
    port = free_port()
    with pytest.raises(
        ConfigError,
        match=r"mcp: MCP server things: no connection: .*look whether its url",
    ):
        serving(url=f"http://127.0.0.1:{port}/mcp").open(row("tools"))


def test_a_server_behind_a_url_that_dies_in_mid_run_fails_its_calls_alone(
    by_http: tuple[ToolRuntime, subprocess.Popen[bytes]],
) -> None:
    running, process = by_http
    assert ask(running, "describe", name="x").status == "ok"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(2):
        gone = ask(running, "describe", name="x")
        assert gone.status == "crashed"
        assert gone.content.startswith("error: MCP server things")


def test_a_command_that_cannot_be_started_is_refused_at_start() -> None:
    with pytest.raises(
        ConfigError,
        match=r"mcp: MCP server things: no connection: .*run its command by hand",
    ):
        serving(command=("/nonexistent/server",)).open(row("tools"))


def test_a_server_that_never_speaks_is_ended_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rest_mega.environments.mcp_tools.START_S", 0.5)
    path = tmp_path / "pid"
    silent = f"echo $$ > {path}; while read -r line; do :; done"
    with pytest.raises(ConfigError, match="no connection: TimeoutError"):
        serving(command=("/bin/sh", "-c", silent)).open(row("tools"))
    assert not Path(f"/proc/{path.read_text().strip()}").exists()


def test_a_server_has_either_a_command_or_a_url() -> None:
    for both in ({}, {"command": ("x",), "url": "http://x/"}):
        with pytest.raises(ConfigError, match="give one of them"):
            McpServerConfig(**both)
