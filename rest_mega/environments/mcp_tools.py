"""Tools of MCP servers (https://modelcontextprotocol.io), by the package `mcp`: over standard input
and output of a child process, or over streamable HTTP.

One connection per server, shared by all episodes, on an event loop in a thread of its own. A call
waits by its own deadline whatever the server does; a server that died is started or connected to
again by the next call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from rest_mega import launch
from rest_mega.config import ConfigError, McpServerConfig
from rest_mega.environments.deadline import DeadlineError, remaining, uncounted
from rest_mega.environments.results import as_text
from rest_mega.environments.schema import check_parameters
from rest_mega.environments.tools import ToolCrashError, ToolError, Traits

T = TypeVar("T")
START_S = 60.0
"""Deadline of a server's start and of its list of tools."""


class McpServer:
    """One server, connected to when it is first needed."""

    def __init__(self, name: str, config: McpServerConfig) -> None:
        """Raises ConfigError where the package `mcp` is missing."""
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"environment.mcp.{name} needs the package mcp: pip install 'rest-mega[mcp]'"
            ) from error
        self.name, self._config = name, config
        self._connection: _Connection | None = None
        self._lock = threading.Lock()

    def list_tools(self) -> dict[str, McpTool]:
        """The server's tools by name; ConfigError where it cannot be asked."""
        try:
            found = self._connected().run(_all_tools, START_S)
        except Exception as error:
            self.close()
            raise ConfigError(
                f"environment.mcp: {error}; run its command by hand, or look whether "
                "its url answers"
            ) from error
        return {tool.name: McpTool(self, tool, self._config) for tool in found}

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        """The server's result of a call, by this thread's deadline; ToolCrashError where the server
        is gone, ToolError for what it refuses."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        with uncounted():
            connection = self._connected()
        try:
            return connection.run(
                lambda client: client.call_tool(tool, dict(arguments)), remaining()
            )
        except DeadlineError:
            raise
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ToolError(str(error)) from error
            self._lost(connection)
            raise ToolCrashError(f"MCP server {self.name} is gone") from error
        except Exception as error:
            self._lost(connection)
            raise ToolCrashError(f"MCP server {self.name}: {_innermost(error)}") from error

    def close(self) -> None:
        """End the connection, and the server if it is our child."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is None or not self._connection.alive:
                self._connection = _Connection(self.name, lambda: _target(self._config))
            return self._connection

    def _lost(self, connection: _Connection) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None
        connection.stop()


class McpTool:
    """One tool of a server."""

    def __init__(self, server: McpServer, tool: Any, config: McpServerConfig) -> None:
        self._server, self._name = server, str(tool.name)
        where = f"environment.mcp.{server.name}: parameters of {tool.name}"
        parameters = check_parameters(tool.input_schema, where)
        description = tool.description or ""
        function = {"name": tool.name, "description": description, "parameters": parameters}
        self.spec: Mapping[str, Any] = {"type": "function", "function": function}
        hints = tool.annotations
        safe = hints is not None and bool(hints.idempotent_hint or hints.read_only_hint)
        self.traits = Traits(config.concurrent, safe or tool.name in config.idempotent)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The text of the result; without any, its structured content as JSON."""
        result = self._server.call(self._name, arguments)
        texts = [getattr(block, "text", f"[{block.type}]") for block in result.content]
        text = "\n".join(texts)
        if not texts and result.structured_content is not None:
            text = as_text(result.structured_content)
        if result.is_error:
            raise ToolError(text)
        return text


class _Connection:
    """A client of the package `mcp` in a thread of its own."""

    def __init__(self, name: str, target: Callable[[], Any]) -> None:
        """Raises ToolCrashError when there is no connection within START_S."""
        self._target, self._ready = target, concurrent.futures.Future[Any]()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._hold_open())
        self._thread = threading.Thread(target=self._serve, name=f"mcp {name}", daemon=True)
        self._thread.start()
        try:
            self._client = self._ready.result(START_S)
        except Exception as error:
            self.close()
            raise ToolCrashError(
                f"MCP server {name}: no connection: {_innermost(error)}"
            ) from error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Callable[[Any], Coroutine[Any, Any, T]], seconds: float) -> T:
        """The result of `work(client)`; DeadlineError after `seconds`."""
        future = asyncio.run_coroutine_threadsafe(work(self._client), self._loop)
        try:
            return future.result(min(seconds, threading.TIMEOUT_MAX))
        except TimeoutError:
            future.cancel()
            raise DeadlineError(f"no answer within {seconds:.3g} s") from None

    def stop(self) -> None:
        """Tell the client to end, in its own thread, also where it still waits for its server."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)

    def close(self) -> None:
        """End the client; waits a little, since a server may be slow to end."""
        self.stop()
        self._thread.join(5)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except BaseException as error:  # a group of errors that hides the connection's own
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._loop.close()

    async def _hold_open(self) -> None:
        from mcp import Client

        async with Client(self._target(), cache=None) as client:
            self._ready.set_result(client)
            await asyncio.Event().wait()  # until the task is cancelled


def _target(config: McpServerConfig) -> Any:
    """What the package's client connects to."""
    from mcp import StdioServerParameters

    if config.url:
        return config.url
    given = {name: launch.variable(name) for name in config.variables}
    environment = {name: value for name, value in given.items() if value is not None}
    return StdioServerParameters(
        command=config.command[0], args=list(config.command[1:]), env=environment
    )


async def _all_tools(client: Any) -> list[Any]:
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def _innermost(error: BaseException) -> str:
    """The first error of nested groups, in words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
