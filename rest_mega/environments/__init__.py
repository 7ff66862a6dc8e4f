"""What answers a tool call: registered environments, their tools, and the limits on every call."""

from rest_mega.environments.calls import answer_calls
from rest_mega.environments.registry import (
    ENVIRONMENTS,
    Environment,
    environment,
    load_modules,
    make_environment,
)
from rest_mega.environments.tools import ToolEnvironment, ToolError, tool

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "ToolEnvironment",
    "ToolError",
    "answer_calls",
    "environment",
    "load_modules",
    "make_environment",
    "tool",
]
