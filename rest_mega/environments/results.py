"""Tool results as the model reads them: text, or JSON, cut to a number of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rest_mega.config import EnvironmentConfig

Cut = Callable[[str], str]


def as_text(result: Any) -> str:
    """A string as it is, anything else as compact JSON."""
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, separators=(",", ":"))


class Vocabulary(Protocol):
    """What of a tokenizer is needed to count tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


def cut_characters(limits: EnvironmentConfig) -> Cut:
    """A function that cuts a text to `result_characters`; what UTF-8 cannot hold is replaced."""

    def cut(text: str) -> str:
        note = f"... [{len(text)} characters]"
        kept = _headed(text, limits.result_characters, note)
        return kept.encode("utf-8", "replace").decode("utf-8")

    return cut


def cut_tokens(limits: EnvironmentConfig, tokenizer: Vocabulary) -> Cut:
    """A function that cuts a text to `result_characters`, then so that it has at most
    `result_tokens` tokens.

    Tokens are counted of the result by itself; the template around it may join its ends with its
    own.
    """
    shorten = cut_characters(limits)

    def cut(text: str) -> str:
        kept, most = shorten(text), limits.result_tokens
        if len(kept.encode()) <= most:  # no token is shorter than a byte
            return kept
        size = len(ids := tokenizer.encode(kept))
        if size <= most:
            return kept
        note = f"... [{len(text)} characters]"
        room = most - len(tokenizer.encode(note))
        note, room = (note, room) if room > 0 else ("", most)
        # A cut text may tokenise otherwise than its whole: give way until it fits.
        while room > 0:
            short = tokenizer.decode(ids[:room]).rstrip("\ufffd") + note
            excess = len(tokenizer.encode(short)) - most
            if excess <= 0:
                return short
            room -= excess
        return ""

    return cut


def _headed(text: str, limit: int, note: str) -> str:
    """The text, or its head and the note, in at most `limit` characters."""
    if len(text) <= limit:
        return text
    return text[: limit - len(note)] + note if len(note) < limit else text[:limit]
