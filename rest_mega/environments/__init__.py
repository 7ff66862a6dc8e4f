"""What answers a tool call: registered environments, declared tools, and the limits on every
call."""

from rest_mega.environments.calls import answer_calls
from rest_mega.environments.registry import (
    ENVIRONMENTS,
    Environment,
    environment,
    load_modules,
    make_environment,
)
from rest_mega.environments.runtime import EpisodeTools, ToolRuntime
from rest_mega.environments.tools import (
    ToolCrashError,
    ToolEnvironment,
    ToolError,
    Traits,
    TransientToolError,
    tool,
)

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "EpisodeTools",
    "ToolCrashError",
    "ToolEnvironment",
    "ToolError",
    "ToolRuntime",
    "Traits",
    "TransientToolError",
    "answer_calls",
    "environment",
    "load_modules",
    "make_environment",
    "tool",
]
