"""A tool, an environment with state, a reward and a dialect of one's own.

`environment.modules=[examples/extending/mine.py]` registers all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_mega.dialects import Block, Dialect, Region, add_dialect, json_calls
from rest_mega.environments import ToolEnvironment, ToolError, environment, tool
from rest_mega.records import Trajectory
from rest_mega.rewards import reward


@environment("notes")
class Notes(ToolEnvironment):
    """A list of notes. A row's task: {"wanted": ["milk", "bread"]}."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self.notes: list[str] = []

    @tool
    def write(self, text: str) -> dict[str, int]:
        """Write a note.

        Args:
            text: what to note
        """
        self.notes.append(text)
        return {"notes": len(self.notes)}

    @tool(idempotent=True)
    def read(self, number: int) -> str:
        """Read a note.

        Args:
            number: which one, from 1
        """
        if not 1 <= number <= len(self.notes):
            raise ToolError(f"there are {len(self.notes)} notes")  # the model reads it
        return self.notes[number - 1]

    def finish(self, answer: str) -> dict[str, Any]:
        """Judged by the state that the calls left, whatever the reply says."""
        return {"success": self.notes == self.task["wanted"], "notes": len(self.notes)}


@reward("short")
def short(trajectory: Trajectory) -> float:
    """1 for one turn, less for each further one."""
    return 1.0 / max(1, len(trajectory.turns))


add_dialect(
    "brackets",  # [think] ... [/think] and [call] {"name": ..., "arguments": {...}} [/call]
    Dialect(
        (
            Block("[think]", "[/think]", Region.REASONING),
            Block("[call]", "[/call]", json_calls.one),
        )
    ),
)
