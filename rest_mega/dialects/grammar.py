"""The shape that all dialects share: text, and blocks of thought, answer or calls opened and closed
by tags."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from rest_mega.dialects.reply import Region
from rest_mega.dialects.tape import MalformedError, Tape

Reader = Callable[[Tape, int], int]
"""Reads what stands at a position, marks it, and returns where it ends; raises MalformedError."""

NEVER = "(?!)"
"""The regular expression that matches nothing."""


@dataclass(frozen=True)
class Block:
    """What stands between two tags."""

    opening: str
    closing: str
    """Empty: the block lasts to the end of the reply."""
    content: Region | Reader
    """A region: any text up to the first closing tag. A reader: calls."""


@dataclass(frozen=True)
class Bare:
    """A reply that is calls from its first byte on, without a tag."""

    start: str
    """Regular expression that tells such a reply by its beginning (after white space)."""
    prefix: str
    """Regular expression of a whole reply that may have been cut off before it could be told."""
    reader: Reader


@dataclass(frozen=True)
class Dialect:
    """One way of writing replies with tool calls. Text outside blocks is the answer."""

    blocks: tuple[Block, ...]
    """At least one; no tag holds its own first character again."""
    bare: Bare | None = None

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """All tags, opening and closing."""
        return tuple(tag for block in self.blocks for tag in (block.opening, block.closing) if tag)

    @cached_property
    def tag(self) -> re.Pattern[str]:
        """Matches any tag."""
        return re.compile("|".join(map(re.escape, self.tags)))

    @cached_property
    def opened_by(self) -> dict[str, Block]:
        """Opening tag -> block."""
        return {block.opening: block for block in self.blocks}


def read(tape: Tape, dialect: Dialect) -> None:
    """Mark the whole reply; MalformedError at the first block that breaks the grammar."""
    position = tape.mark_space(0)
    tape.commit()
    if dialect.bare is not None and _starts_bare(tape, dialect.bare, position):
        position = _to_the_end(tape, dialect.bare.reader(tape, position))
    while position < len(tape.text):
        tag = dialect.tag.search(tape.text, position)
        if tag is None:
            return _last_text(tape, dialect, position)
        if tag.start() > position:
            tape.mark_text(tag.start(), Region.ANSWER)
            tape.commit()
        position = tape.mark_space(_block(tape, dialect, tag.group(), tag.start()))
        tape.commit()


def _starts_bare(tape: Tape, bare: Bare, position: int) -> bool:
    if re.compile(bare.prefix).fullmatch(tape.text, position):
        raise MalformedError("the reply ends before it is clear whether it is a call", position)
    return re.compile(bare.start).match(tape.text, position) is not None


def _block(tape: Tape, dialect: Dialect, tag: str, start: int) -> int:
    """Read the block that `tag` opens at `start`; returns where it ends."""
    block = dialect.opened_by.get(tag)
    if block is None:
        raise MalformedError(f"{tag} closes nothing", start)
    position = start + len(tag)
    tape.mark(position, Region.FORMAT)
    if not isinstance(block.content, Region):
        position = block.content(tape, position)
        if not block.closing:
            return _to_the_end(tape, position)
    elif (position := tape.text.find(block.closing, position)) >= 0:
        tape.mark_text(position, block.content)
    if position < 0 or not tape.text.startswith(block.closing, position):
        where = f", expected {block.closing}" if position >= 0 else ""
        raise MalformedError(f"{tag} is not closed{where}", max(position, start))
    tape.mark(position + len(block.closing), Region.FORMAT)
    return position + len(block.closing)


def _to_the_end(tape: Tape, position: int) -> int:
    """The calls up to `position` are final, and only white space may follow them."""
    tape.commit()
    position = tape.mark_space(position)
    tape.commit()
    if position < len(tape.text):
        raise MalformedError("text after the last call", position)
    return position


def _last_text(tape: Tape, dialect: Dialect, position: int) -> None:
    """The rest of the reply is answer, except the beginning of a tag at its very end."""
    text = tape.text
    # Only the last occurrence of a tag's first character can begin it, because no tag holds it
    # twice.
    starts = (text.rfind(symbol, position) for symbol in {tag[0] for tag in dialect.tags})
    ends = (i for i in starts if i >= 0 and any(tag.startswith(text[i:]) for tag in dialect.tags))
    cut = min(ends, default=len(text))
    if cut > position:
        tape.mark_text(cut, Region.ANSWER)
        tape.commit()
    if cut < len(text):
        raise MalformedError("the reply ends inside a tag", cut)
