"""Calls written as JSON objects: {"name": string, "arguments" or "parameters": object}, keys in any
order.

Values are read by the interpreter's C scanner. It is asked at most once in vain per reply, because
the first error ends the reading: building a JSONDecodeError counts newlines from the start of the
text, so that catching many of them would take quadratic time.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

from rest_mega.dialects.reply import Region
from rest_mega.dialects.tape import MAX_DEPTH, SPACE, MalformedError, Tape

ARGUMENTS = ("arguments", "parameters")
_OPEN = re.compile(r"\{" + SPACE)
_COLON = re.compile(SPACE + ":" + SPACE)
_AFTER_VALUE = re.compile(SPACE + r"(?:," + SPACE + r"|(\}))")
_ITEM = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"(' + SPACE + r':)?|[^\[\]{},:" \t\r\n]+')
"""In valid JSON: a string (a key if group 2 matched), or a number or word."""
_SEPARATORS = re.compile(r"[ \t\r\n;]*")
_SCAFFOLD, _NAME = Region.SCAFFOLD, Region.TOOL_NAME
_KEY = bytes((Region.ARG_SCAFFOLD, Region.ARG_KEY))
_VALUE = bytes((Region.ARG_SCAFFOLD, Region.ARG_VALUE))
"""Two regions each: of what stands before an item of the arguments, and of the item."""


class _Member(NamedTuple):
    value: Any
    start: int
    end: int


def one(tape: Tape, position: int) -> int:
    """Read exactly one call with the white space around it; returns where it ends."""
    return tape.mark_space(_call(tape, tape.mark_space(position)))


def several(tape: Tape, position: int) -> int:
    """Read one or more calls parted by white space (ToolRL: one per line); returns where they
    end."""
    position = one(tape, position)
    while tape.text.startswith("{", position):
        position = one(tape, position)
    return position


def array(tape: Tape, position: int) -> int:
    """Read a JSON array of one or more calls (Mistral); returns where it ends."""
    position = tape.mark_symbol(tape.mark_space(position), "[")
    while True:
        position = one(tape, position)
        if not tape.text.startswith(",", position):
            return tape.mark_symbol(position, "]")
        position = tape.mark_symbol(position, ",")


def until_end(tape: Tape, position: int) -> int:
    """Read calls parted by semicolons or white space to the end of the reply (Llama 3), each one
    final once read."""
    position = tape.mark_space(position)
    while True:
        position = _call(tape, position)
        match = _SEPARATORS.match(tape.text, position)
        assert match is not None
        position = match.end()
        tape.mark(position, Region.SCAFFOLD)
        tape.commit()
        if position == len(tape.text):
            return position


def _call(tape: Tape, start: int) -> int:
    """Read the object at `start`, mark its parts and keep its call."""
    try:
        members, end = _members(tape.text, start)
    except json.JSONDecodeError as error:
        raise MalformedError(f"not JSON: {error.msg}", error.pos) from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {error}", start) from error
    key = _check(members, start)
    if tape.text.count("{", start, end) + tape.text.count("[", start, end) > MAX_DEPTH:
        _check_depth([member.value for member in members.values()], start)
    _mark_members(tape, members, end)
    # The Latin-1 view garbles what is not ASCII: read those objects again from their UTF-8.
    values = (
        {k: m.value for k, m in members.items()}
        if tape.ascii
        else _DECODER.decode(tape.utf8(start, end))
    )
    tape.add_call(values["name"], values[key], start)
    return end


def _members(text: str, start: int) -> tuple[dict[str, _Member], int]:
    """The top-level keys of the object at `start` in their order, and where the object ends."""
    opened = _OPEN.match(text, start)
    if opened is None:
        raise MalformedError("a call must be a JSON object: expected '{'", start)
    members: dict[str, _Member] = {}
    position = opened.end()
    while True:
        key, end = _DECODER.raw_decode(text, position)
        colon = _COLON.match(text, end)
        if not isinstance(key, str) or colon is None:
            raise MalformedError("expected a quoted key and a colon", position)
        if key in members:
            raise MalformedError(f"the key {key[:40]!r} occurs twice", position)
        value, end = _DECODER.raw_decode(text, colon.end())
        members[key] = _Member(value, colon.end(), end)
        after = _AFTER_VALUE.match(text, end)
        if after is None:
            raise MalformedError("expected ',' or '}'", end)
        position = after.end()
        if after.group(1):
            return members, position


def _check(members: dict[str, _Member], start: int) -> str:
    """The key that holds the arguments; MalformedError unless the object is a call."""
    if "name" not in members or not isinstance(members["name"].value, str):
        raise MalformedError('a call needs "name", a string; object', start)
    keys = [key for key in ARGUMENTS if key in members]
    if len(keys) != 1 or not isinstance(members[keys[0]].value, dict):
        raise MalformedError(
            f'a call needs one of "{ARGUMENTS[0]}", "{ARGUMENTS[1]}", an object; object', start
        )
    return keys[0]


def _check_depth(level: list[Any], start: int) -> None:
    for _ in range(MAX_DEPTH):
        parents = [value for value in level if isinstance(value, dict | list)]
        level = [child for p in parents for child in (p.values() if isinstance(p, dict) else p)]
    if level:
        raise MalformedError(f"nested deeper than {MAX_DEPTH} levels; object", start)


def _mark_members(tape: Tape, members: dict[str, _Member], end: int) -> None:
    for key, member in members.items():
        if key == "name":
            tape.mark(member.start + 1, _SCAFFOLD)
            tape.mark(member.end - 1, _NAME)
        elif key in ARGUMENTS:
            tape.mark(member.start, _SCAFFOLD)
            _mark_arguments(tape, member.start, member.end)
    tape.mark(end, _SCAFFOLD)


def _mark_arguments(tape: Tape, start: int, end: int) -> None:
    """Mark keys and scalars of a valid object at any depth: the hot loop, hence no calls of
    `mark`."""
    ends, regions = tape.ends, tape.regions
    for item in _ITEM.finditer(tape.text, start, end):
        group = item.lastindex
        ends += item.span(1) if group else item.span()
        regions += _KEY if group == 2 else _VALUE
    tape.mark(end, Region.ARG_SCAFFOLD)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
