"""What a reply is made of: the region of every byte, the parsed calls, and the texts around
them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rest_mega.records import SmallInts, ToolCall


class Region(enum.IntEnum):
    """What a byte or a token of a trajectory is for."""

    REASONING = 0
    """Everything between the tags of a block of thought."""
    FORMAT = 1
    """The tags themselves."""
    TOOL_NAME = 2
    """The name of the called tool, without its quotes."""
    ARG_KEY = 3
    """Keys of the arguments at any depth, without their quotes."""
    ARG_VALUE = 4
    """Scalars in the arguments at any depth; strings without their quotes."""
    ARG_SCAFFOLD = 5
    """The rest of the arguments: braces, brackets, quotes, colons, commas, white space."""
    SCAFFOLD = 6
    """The rest of a call (outer braces, "name", ...), and white space that follows a tag or opens
    the reply."""
    ANSWER = 7
    """Text for the user, with the white space that follows it."""
    END_OF_TURN = 8
    """The token that ends the turn."""
    OBSERVATION = 9
    """What the policy did not write: prompt and tool output; never trained."""
    MALFORMED = 10
    """From the block that does not parse to the end of the reply."""


@dataclass(frozen=True)
class Reply:
    """One parsed assistant reply."""

    calls: tuple[ToolCall, ...]
    """In order of appearance; none when the reply is malformed."""
    answer: str
    """The text outside reasoning and calls, stripped; pieces that blocks part are joined by a
    newline."""
    reasoning: str
    """The text of the reasoning blocks, stripped and joined in the same way."""
    well_formed: bool
    """True exactly when no byte is MALFORMED."""
    error: str
    """What is wrong and at which byte; empty when well formed."""
    regions_B: SmallInts
    """Region of every byte of the reply."""
