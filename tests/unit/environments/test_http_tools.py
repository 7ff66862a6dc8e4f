"""HTTP tools against a real server of this process: what is sent, what comes back, and what becomes
of every way to fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from rest_mega import launch
from rest_mega.config import ConfigError, RunConfig
from rest_mega.environments import ToolRuntime
from rest_mega.records import ToolOutcome
from tests.support.calls import outcomes, row, runtime

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


class Handler(BaseHTTPRequestHandler):
    """Tells what it was asked at /echo, and misbehaves elsewhere."""

    seen: dict[str, int] = {}  # noqa: RUF012

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size).decode()
        path = urlsplit(self.path)
        Handler.seen[path.path] = count = Handler.seen.get(path.path, 0) + 1
        if path.path == "/hang":
            time.sleep(1.5)
        elif path.path == "/trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        elif path.path == "/garbage":
            self.wfile.write(b"what is HTTP?\r\n\r\n")
        elif path.path == "/big":
            self.reply(200, "text/plain", "x" * 10_000_000)
        elif path.path == "/busy_once" and count == 1:
            self.reply(503, "text/plain", "later")
        elif path.path.startswith("/status/"):
            self.reply(int(path.path.split("/")[2]), "text/plain", "the reason")
        else:
            asked = {
                "method": self.command,
                "path": path.path,
                "query": dict(parse_qsl(path.query)),
                "body": json.loads(body) if body else None,
                "key": self.headers.get("X-Key"),
            }
            self.reply(200, "application/json", json.dumps(asked, indent=4))

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def reply(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def with_tool(url: str, *, limits: dict[str, Any] | None = None, **tool: Any) -> ToolRuntime:
    tree = {"parameters": CITY, "url": url, **tool}
    config = RunConfig.from_dict({"environment": {"http": {"weather": tree}, **(limits or {})}})
    return runtime(**{"http": config.environment.http, **(limits or {})})


def ask(running: ToolRuntime, **arguments: Any) -> ToolOutcome:
    (outcome,) = outcomes(row("tools"), ("weather", arguments), running=running)
    return outcome


@pytest.mark.parametrize(
    ("method", "path", "query", "body"),
    [
        ("GET", "/at/Z%C3%BCrich%2F..", {"lang": "en", "days": "2"}, None),
        ("DELETE", "/at/Z%C3%BCrich%2F..", {"lang": "en", "days": "2"}, None),
        ("POST", "/at/Z%C3%BCrich%2F..", {"lang": "en"}, {"days": 2}),
        ("PUT", "/at/Z%C3%BCrich%2F..", {"lang": "en"}, {"days": 2}),
    ],
)
def test_arguments_go_into_the_path_and_the_rest_into_query_or_body(
    base: str, method: str, path: str, query: dict[str, str], body: Any
) -> None:
    tool = with_tool(base + "/at/{city}?lang=en", method=method, headers={"X-Key": "k"})
    outcome = ask(tool, city="Zürich/..", days=2)
    expected = {"method": method, "path": path, "query": query, "body": body, "key": "k"}
    assert outcome.status == "ok"
    assert json.loads(outcome.content) == expected
    assert outcome.content == json.dumps(expected, separators=(",", ":"))  # made compact


def test_the_spec_is_the_declaration_and_arguments_are_checked_before_sending(base: str) -> None:
    tool = with_tool(base + "/never", description="The weather.")
    (spec,) = tool.open(row("tools")).specs
    assert spec["function"] == {
        "name": "weather",
        "description": "The weather.",
        "parameters": CITY,
    }
    assert ask(tool, days=2).content == "error: city is missing"
    assert "/never" not in Handler.seen


@pytest.mark.parametrize("part", ["..", ".", ""])
def test_an_argument_cannot_leave_its_part_of_the_path(base: str, part: str) -> None:
    outcome = ask(with_tool(base + "/at/{city}/now"), city=part)
    assert outcome.content == f"error: {part!r} cannot be a part of the address"


@pytest.mark.parametrize("status", [400, 404, 500, 301])
def test_other_statuses_are_errors_that_carry_the_reason(base: str, status: int) -> None:
    outcome = ask(with_tool(f"{base}/status/{status}"), city="x")
    assert (outcome.status, outcome.content) == ("error", f"error: HTTP {status}: the reason")


def test_a_refused_connection_and_a_server_that_speaks_no_http_are_errors(base: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcome = ask(with_tool(f"http://127.0.0.1:{port}/"), city="x")
    assert (outcome.status, outcome.content) == (
        "error",
        "error: cannot reach weather: Connection refused",
    )
    assert ask(with_tool(base + "/garbage"), city="x").content.startswith(
        "error: cannot reach weather: BadStatusLine"
    )


def test_only_a_tool_declared_idempotent_is_asked_again(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rest_mega.environments.calls.FIRST_PAUSE_S", 0.001)
    Handler.seen.clear()
    assert ask(with_tool(base + "/busy_once", idempotent=True), city="x").status == "ok"
    assert Handler.seen.pop("/busy_once") == 2
    assert ask(with_tool(base + "/busy_once"), city="x").content == "error: HTTP 503: later"
    assert Handler.seen["/busy_once"] == 1
    for status, times in ((404, 1), (503, 3)):
        ask(with_tool(f"{base}/status/{status}", idempotent=True), city="x")
        assert Handler.seen[f"/status/{status}"] == times


@pytest.mark.parametrize("path", ["/hang", "/trickle"])
def test_a_server_that_hangs_or_trickles_meets_the_deadline(base: str, path: str) -> None:
    outcome = ask(with_tool(base + path, limits={"call_timeout_s": 0.2}), city="x")
    assert (outcome.status, outcome.content) == ("timeout", "error: no result within 0.2 s")


def test_10_mb_from_a_server_are_cut(base: str) -> None:
    outcome = ask(with_tool(base + "/big", limits={"result_tokens": 40}), city="x")
    assert outcome.status == "ok"
    assert outcome.content.startswith("xxxx")
    assert outcome.content.endswith("... [1048576 characters]")  # what was read of it


def test_a_secret_header_comes_from_its_variable_and_stays_out_of_the_config(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEATHER_KEY", "s3cret")
    tool = with_tool(base + "/echo", secret_headers={"X-Key": "WEATHER_KEY"})
    assert json.loads(ask(tool, city="x").content)["key"] == "s3cret"
    assert "s3cret" not in repr(tool.limits)
    monkeypatch.delenv("WEATHER_KEY")
    assert launch.variable("WEATHER_KEY") is None
    with pytest.raises(ConfigError, match=r"X-Key: the environment variable 'WEATHER_KEY' is not"):
        with_tool(base + "/echo", secret_headers={"X-Key": "WEATHER_KEY"})


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ({"url": "ftp://x/"}, "must begin with http:// or https://"),
        ({"method": "FETCH"}, "'FETCH' is not known; choose one of GET"),
        ({"url": "http://x/{days}"}, r"needs 'days' in parameters\.required"),
        ({"parameters": {"type": "string"}}, "must be a JSON schema of type object"),
        (
            {"parameters": {"type": "object", "properties": {"a": {"type": "str"}}}},
            r"weather\.parameters\.a\.type='str' is not known.*string",
        ),
        ({"uri": "http://x/"}, r"unknown config key 'environment\.http\.weather\.uri'; did you"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_refused(tool: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_tool(**{"url": "http://127.0.0.1:9/", **tool})
