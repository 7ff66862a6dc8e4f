"""A reply while it is read: runs of regions marked from left to right, and undone back to the last
good block."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_mega.dialects.reply import Region, Reply
from rest_mega.records import ToolCall

SPACE = "[ \\t\\r\\n]*"
"""JSON's white space as a regular expression: `\\s` would also match bytes inside UTF-8
characters."""
MAX_DEPTH = 64
"""Arguments nested deeper than this are malformed: a fixed limit, unlike the interpreter's
recursion limit."""
_SPACE = re.compile(SPACE)


class MalformedError(Exception):
    """The reply breaks its dialect's grammar at byte `position`."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} at byte {position}")


class Tape:
    """The reply's bytes as a text of the same length (Latin-1), so that all positions are byte
    positions.

    - Regions are marked from left to right without gaps: `ends[i]` .. `ends[i + 1]` has
      `regions[i]`.
    - What `commit` has seen is never changed by what follows in the reply.
    """

    def __init__(self, reply: bytes) -> None:
        self.text = reply.decode("latin-1")
        self.ascii = reply.isascii()
        self.ends = [0]
        self.regions = bytearray()
        self.calls: list[ToolCall] = []
        self.texts: dict[Region, list[str]] = {Region.ANSWER: [], Region.REASONING: []}
        self._reply = reply
        self._escapes = b"\\" in reply
        self._committed = 0

    def mark(self, end: int, region: Region) -> None:
        """Give `region` to the bytes from the last mark up to `end`."""
        self.ends.append(end)
        self.regions.append(region)

    def mark_space(self, position: int, region: Region = Region.SCAFFOLD) -> int:
        """Mark the white space at `position`, if any; returns where it ends."""
        match = _SPACE.match(self.text, position)
        assert match is not None
        if (end := match.end()) > position:
            self.mark(end, region)
        return end

    def mark_symbol(self, position: int, symbol: str, region: Region = Region.SCAFFOLD) -> int:
        """Mark the one character that must stand at `position`; returns where it ends."""
        if not self.text.startswith(symbol, position):
            raise MalformedError(f"expected {symbol!r}", position)
        self.mark(position + 1, region)
        return position + 1

    def mark_text(self, end: int, region: Region) -> None:
        """Give `region` (ANSWER or REASONING) to the bytes up to `end` and keep their text."""
        if text := self.utf8(self.ends[-1], end).strip():
            self.texts[region].append(text)
        self.mark(end, region)

    def add_call(self, name: str, arguments: Mapping[str, Any], position: int) -> None:
        """Keep a call; MalformedError where an escape made text that UTF-8 cannot hold (a lone
        surrogate)."""
        if self._escapes:
            try:
                json.dumps([name, arguments], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise MalformedError("a lone surrogate in the call", position) from error
        self.calls.append(ToolCall(name, arguments))

    def utf8(self, start: int, end: int) -> str:
        """The bytes from `start` to `end` as text; what is no UTF-8 becomes U+FFFD."""
        return self._reply[start:end].decode("utf-8", "replace")

    def commit(self) -> None:
        """All that is marked so far is final."""
        self._committed = len(self.regions)

    def finish(self, error: str = "") -> Reply:
        """The reply; with an error, everything after the last commit is MALFORMED and no call
        counts."""
        if error:
            del self.regions[self._committed :], self.ends[self._committed + 1 :]
            self.mark(len(self.text), Region.MALFORMED)
        assert self.ends[-1] == len(self.text), (self.ends[-1], len(self.text))
        return Reply(
            calls=() if error else tuple(self.calls),
            answer="\n".join(self.texts[Region.ANSWER]),
            reasoning="\n".join(self.texts[Region.REASONING]),
            well_formed=not error,
            error=error,
            regions_B=np.repeat(np.frombuffer(self.regions, np.int8), np.diff(self.ends)),
        )
