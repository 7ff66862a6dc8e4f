"""A small MCP server, good and bad by turns: `python mcp_server.py stdio`, or `http PORT`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations

server = MCPServer("test", log_level="ERROR")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def describe(name: str, tags: list[str] | None = None) -> dict[str, Any]:
    """Describe a thing."""
    return {"name": name, "tags": tags or [], "process": os.getpid()}


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)


@server.tool()
def hang(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "woke up"


@server.tool()
def flood(size: int) -> str:
    """Return much."""
    return "x" * size


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(7)


@server.tool(annotations=ToolAnnotations(idempotent_hint=True))
def die_once(path: str) -> str:
    """End the server, unless it has done so before."""
    if Path(path).exists():
        return "alive"
    Path(path).touch()
    os._exit(7)


@server.tool()
def variable(name: str) -> str:
    """An environment variable of the server."""
    return os.environ.get(name, "unset")


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
