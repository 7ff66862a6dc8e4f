"""Tools behind HTTP endpoints, with the standard library's client.

One connection per call: calls come seconds apart, and a connection that the server has closed
meanwhile would look like a failure. Redirects are not followed and no proxy is used: a tool's
address is what the config says.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rest_mega import launch
from rest_mega.config import HttpToolConfig, require
from rest_mega.environments.deadline import DeadlineError, remaining
from rest_mega.environments.results import as_text
from rest_mega.environments.schema import check_parameters
from rest_mega.environments.tools import ToolError, Traits, TransientToolError

MOST_BYTES = 1 << 20
"""Of a response; the rest is not read."""
MOST_SECONDS = 600.0
"""Of a socket operation outside of any deadline."""
_BUSY = (429, 500, 502, 503, 504)
"""Statuses that another try may not meet."""


class HttpTool:
    """One endpoint."""

    def __init__(self, name: str, config: HttpToolConfig) -> None:
        """Raises ConfigError for a schema that cannot be checked, a {argument} of the address that
        is not a required one, and a secret header without its variable."""
        where = f"environment.http.{name}"
        parameters = check_parameters(config.parameters, f"{where}.parameters")
        self._in_path = re.findall(r"\{(\w+)\}", config.url)
        for argument in self._in_path:
            require(
                argument in parameters.get("required", ()),
                f"{where}.url={config.url!r} needs {argument!r} in parameters.required",
            )
        self._name, self._config = name, config
        self._headers = {**config.headers, **_secrets(where, config.secret_headers)}
        function = {"name": name, "description": config.description, "parameters": parameters}
        self.spec: Mapping[str, Any] = {"type": "function", "function": function}
        self.traits = Traits(config.concurrent, config.idempotent)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The body of the answer, JSON made compact; ToolError tells of other statuses than 2xx."""
        request = self._request(arguments)
        try:
            status, kind, body = _send(request)
        except TimeoutError:
            raise DeadlineError(f"no answer from {request.host}") from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientToolError(f"cannot reach {self._name}: {_reason(error)}") from error
        text = body.decode("utf-8", "replace")
        if not 200 <= status < 300:
            refusal = TransientToolError if status in _BUSY else ToolError
            raise refusal(f"HTTP {status}: {text}")
        return _compact(text) if "json" in kind else text

    def _request(self, arguments: Mapping[str, Any]) -> _Request:
        url = urllib.parse.urlsplit(self._config.url)
        rest = {name: value for name, value in arguments.items() if name not in self._in_path}
        filled = {name: _segment(arguments[name]) for name in self._in_path}
        path = re.sub(r"\{(\w+)\}", lambda found: filled[found[1]], url.path) or "/"
        headers, body, query = dict(self._headers), None, url.query
        if self._config.method in ("GET", "DELETE"):
            pairs = [(name, one) for name, value in rest.items() for one in _listed(value)]
            query = "&".join(part for part in (query, urllib.parse.urlencode(pairs)) if part)
        else:
            body = json.dumps(rest, ensure_ascii=False).encode()
            headers = {"Content-Type": "application/json", **headers}
        target = f"{path}?{query}" if query else path
        return _Request(
            url.scheme == "https", url.netloc, self._config.method, target, body, headers
        )


@dataclass(frozen=True)
class _Request:
    secure: bool
    host: str
    """With its port."""
    method: str
    target: str
    body: bytes | None
    headers: Mapping[str, str]


def _send(request: _Request) -> tuple[int, str, bytes]:
    """(status, content type, the first MOST_BYTES of the body)."""
    kind = http.client.HTTPSConnection if request.secure else http.client.HTTPConnection
    connection = kind(request.host, timeout=_time_left())
    try:
        connection.connect()
        socket = connection.sock  # the response takes it away from the connection
        connection.request(request.method, request.target, request.body, dict(request.headers))
        response = connection.getresponse()
        body = bytearray()
        while len(body) < MOST_BYTES and (chunk := response.read1(1 << 16)):
            body += chunk
            socket.settimeout(_time_left())  # a trickle has one deadline, not one per piece
        return response.status, response.headers.get_content_type(), bytes(body[:MOST_BYTES])
    finally:
        connection.close()


def _time_left() -> float:
    """For one socket operation; TimeoutError when none is left."""
    if (left := min(remaining(), MOST_SECONDS)) <= 0:
        raise TimeoutError
    return left


def _segment(value: Any) -> str:
    """An argument as a part of a path, which it cannot leave."""
    text = as_text(value)
    if text in ("", ".", ".."):
        raise ToolError(f"{text!r} cannot be a part of the address")
    return urllib.parse.quote(text, safe="")


def _listed(value: Any) -> Iterable[str]:
    return map(as_text, value if isinstance(value, list | tuple) else [value])


def _compact(text: str) -> str:
    try:
        return as_text(json.loads(text))
    except ValueError:
        return text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _secrets(where: str, variables: Mapping[str, str]) -> dict[str, str]:
    found = {header: launch.variable(name) for header, name in variables.items()}
    for header, value in found.items():
        require(
            value is not None,
            f"{where}.secret_headers.{header}: the environment variable {variables[header]!r} is "
            "not set; export it",
        )
    return {header: str(value) for header, value in found.items()}
