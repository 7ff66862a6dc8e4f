"""The tools that the config declares: HTTP endpoints, and all that MCP servers offer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

from rest_mega.config import EnvironmentConfig, require
from rest_mega.environments.http_tools import HttpTool
from rest_mega.environments.tools import Traits


class DeclaredTool(Protocol):
    """A tool without a state of its own, shared by all episodes."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """OpenAI function spec."""

    @property
    def traits(self) -> Traits:
        """How it may be run."""

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Its output, by this thread's deadline; raises as tools do."""


class DeclaredTools:
    """Finds declared tools by their names."""

    def __init__(self, config: EnvironmentConfig) -> None:
        """Raises ConfigError for a declaration that cannot be used."""
        self._lock = threading.Lock()
        self._found: dict[str, DeclaredTool] = {}
        self._http = {name: HttpTool(name, tool) for name, tool in config.http.items()}
        self._servers = _servers(config)

    @property
    def tools(self) -> Mapping[str, DeclaredTool]:
        """All of them, by name; MCP servers are asked for theirs at the first use.

        Raises ConfigError where a server cannot be asked, or two tools have one name.
        """
        with self._lock:
            if not self._found:
                self._found.update(self._http)
                for name, server in self._servers.items():
                    self._add(name, server.list_tools())
            return self._found

    def _add(self, server: str, tools: Mapping[str, DeclaredTool]) -> None:
        for name in tools:
            require(
                name not in self._found,
                f"tool {name!r} of MCP server {server!r} has the name of another declared tool; "
                "rename one, or leave the server out",
            )
        self._found.update(tools)

    def close(self) -> None:
        """End the MCP servers; a later call starts what it needs again."""
        for server in self._servers.values():
            server.close()


def _servers(config: EnvironmentConfig) -> dict[str, Any]:
    if not config.mcp:
        return {}
    from rest_mega.environments.mcp_tools import McpServer

    return {name: McpServer(name, server) for name, server in config.mcp.items()}
