"""Calls written as a Python list: [name(key=value, ...), ...], values being literals (Llama 3.2 and
4, BFCL)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rest_mega.dialects.reply import Region
from rest_mega.dialects.tape import MAX_DEPTH, SPACE, MalformedError, Tape

NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
START = r"\[" + SPACE + NAME + SPACE + r"\("
"""How a list of calls begins; other lists are text."""
PREFIX = r"\[" + SPACE + f"(?:{NAME}{SPACE})?"
"""What may become `START`."""

_NAME = re.compile(NAME)
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)" + SPACE + "=" + SPACE)
_STRING = re.compile(r"""'([^'\\\n]*(?:\\[^\n][^'\\\n]*)*)'|"([^"\\\n]*(?:\\[^\n][^"\\\n]*)*)\"""")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?![A-Za-z0-9_.])")
_WORD = re.compile(r"[A-Za-z]+")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPE = re.compile(
    r"""\\(?:([\\'"abfnrtv])|([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})"""
    r"""|U((?:000[0-9a-fA-F]|0010)[0-9a-fA-F]{4}))"""
)
_LETTERS = dict(zip("\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", strict=True))


def calls(tape: Tape, position: int) -> int:
    """Read a list of one or more calls with the white space around it; returns where it ends."""
    position = tape.mark_symbol(tape.mark_space(position), "[")
    while True:
        position = tape.mark_space(_call(tape, tape.mark_space(position)))
        if not tape.text.startswith(",", position):
            return tape.mark_space(tape.mark_symbol(position, "]"))
        position = tape.mark_symbol(position, ",")


def _call(tape: Tape, start: int) -> int:
    name = _NAME.match(tape.text, start)
    if name is None:
        raise MalformedError("expected the name of a function", start)
    tape.mark(name.end(), Region.TOOL_NAME)
    position = _symbol(tape, tape.mark_space(name.end()), "(")
    arguments: dict[str, Any] = {}
    while not tape.text.startswith(")", position):
        position = _comma(tape, _argument(tape, position, arguments), ")")
    tape.add_call(name.group(), arguments, start)
    return tape.mark_symbol(position, ")", Region.ARG_SCAFFOLD)


def _argument(tape: Tape, position: int, arguments: dict[str, Any]) -> int:
    """Read key=value into `arguments`; returns where it ends."""
    key = _KEY.match(tape.text, position)
    if key is None:
        raise MalformedError("expected key=value", position)
    if key.group(1) in arguments:
        raise MalformedError(f"the argument {key.group(1)[:40]!r} occurs twice", position)
    tape.mark(key.end(1), Region.ARG_KEY)
    tape.mark(key.end(), Region.ARG_SCAFFOLD)
    arguments[key.group(1)], position = _value(tape, key.end(), 1)
    return position


def _value(tape: Tape, position: int, depth: int) -> tuple[Any, int]:
    """Read a literal and mark it; (the value, where it ends)."""
    symbol = tape.text[position : position + 1]
    if symbol in _READERS:
        if depth > MAX_DEPTH:
            raise MalformedError(f"nested deeper than {MAX_DEPTH} levels", position)
        return _READERS[symbol](tape, position, depth + 1)
    if symbol in ("'", '"'):
        return _string(tape, position, Region.ARG_VALUE)
    if word := _WORD.match(tape.text, position):
        if word.group() not in _WORDS:
            raise MalformedError(f"{word.group()[:40]!r} is no literal", position)
        tape.mark(word.end(), Region.ARG_VALUE)
        return _WORDS[word.group()], word.end()
    return _number(tape, position)


def _number(tape: Tape, position: int) -> tuple[int | float, int]:
    number = _NUMBER.match(tape.text, position)
    if number is None:
        raise MalformedError("expected a literal", position)
    tape.mark(number.end(), Region.ARG_VALUE)
    digits = number.group()
    try:
        return (float(digits) if any(c in digits for c in ".eE") else int(digits)), number.end()
    except ValueError as error:  # the interpreter's limit on the digits of an integer
        raise MalformedError(f"not a number: {error}", position) from error


def _string(tape: Tape, position: int, region: Region) -> tuple[str, int]:
    string = _STRING.match(tape.text, position)
    if string is None:
        raise MalformedError("expected a quoted string on one line", position)
    tape.mark(position + 1, Region.ARG_SCAFFOLD)
    tape.mark(string.end() - 1, region)
    tape.mark(string.end(), Region.ARG_SCAFFOLD)
    return _ESCAPE.sub(_unescape, tape.utf8(position + 1, string.end() - 1)), string.end()


def _unescape(match: re.Match[str]) -> str:
    """One escape that Python knows (but no \\N{...}); all others stay as they are, as in Python."""
    letter, octal, *codes = match.groups()
    if letter:
        return _LETTERS[letter]
    return chr(int(octal, 8)) if octal else chr(int(next(code for code in codes if code), 16))


def _list(tape: Tape, position: int, depth: int) -> tuple[Any, int]:
    items, position, _ = _items(tape, _symbol(tape, position, "["), "]", depth)
    return items, tape.mark_symbol(position, "]", Region.ARG_SCAFFOLD)


def _tuple(tape: Tape, position: int, depth: int) -> tuple[Any, int]:
    """A tuple becomes a list, as in JSON; parentheses around one value mean that value."""
    items, position, comma = _items(tape, _symbol(tape, position, "("), ")", depth)
    value = items[0] if len(items) == 1 and not comma else items
    return value, tape.mark_symbol(position, ")", Region.ARG_SCAFFOLD)


def _items(tape: Tape, position: int, closing: str, depth: int) -> tuple[list[Any], int, bool]:
    """(values up to `closing`, its position, whether the last one has a comma)."""
    items, comma = [], False
    while not tape.text.startswith(closing, position):
        item, end = _value(tape, position, depth)
        items.append(item)
        position = _comma(tape, end, closing)
        comma = "," in tape.text[end:position]
    return items, position, comma


def _dict(tape: Tape, position: int, depth: int) -> tuple[Any, int]:
    position = _symbol(tape, position, "{")
    items: dict[str, Any] = {}
    while not tape.text.startswith("}", position):
        key, position = _string(tape, position, Region.ARG_KEY)
        items[key], position = _value(tape, _symbol(tape, _space(tape, position), ":"), depth)
        position = _comma(tape, position, "}")
    return items, tape.mark_symbol(position, "}", Region.ARG_SCAFFOLD)


def _comma(tape: Tape, position: int, closing: str) -> int:
    """After an item: a comma (the last one may have one, too), or nothing if `closing` comes
    next."""
    position = _space(tape, position)
    return position if tape.text.startswith(closing, position) else _symbol(tape, position, ",")


def _symbol(tape: Tape, position: int, symbol: str) -> int:
    """Mark a symbol of the arguments and the white space after it."""
    return _space(tape, tape.mark_symbol(position, symbol, Region.ARG_SCAFFOLD))


def _space(tape: Tape, position: int) -> int:
    return tape.mark_space(position, Region.ARG_SCAFFOLD)


_READERS: dict[str, Callable[[Tape, int, int], tuple[Any, int]]] = {
    "[": _list,
    "(": _tuple,
    "{": _dict,
}
"""Opening symbol -> reader of (tape, position, depth)."""
