"""Replies written piece by piece, so that their calls and the region of every byte are known
without reading them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from rest_mega.dialects import DIALECTS, Region

Call = tuple[str, dict[str, Any]]

NASTY = [
    '"name": "x"',
    "name",
    "{",
    "}}",
    "]",
    "</tool_call>",
    "<think>",
    "<respons",
    "[TOOL_CALLS]",
    "<|python_end|>",
    "\\",
    '\\"',
    "it's",
    "f(x=1)",
    "é東☀️𝄞",
    "\n",
    " ",
    "a\x85\u2003",
]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.sampled_from(NASTY)
)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**18), 10**18),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
)
VALUE = st.recursive(
    SCALAR,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=2),
    max_leaves=5,
)
JSON_CALLS = st.lists(
    st.tuples(TEXT, st.dictionaries(TEXT, VALUE, max_size=3)), min_size=1, max_size=3
)
PYTHON_CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "get_weather", "a.b.c", "_x1"]),
        st.dictionaries(st.sampled_from(["x", "_key", "nameOf2"]), VALUE, max_size=3),
    ),
    min_size=1,
    max_size=3,
)
ITEMS = st.lists(
    st.one_of(st.tuples(st.sampled_from(["think", "text"]), TEXT), JSON_CALLS), max_size=5
)
"""Parts of a reply: (kind, text), or the calls of a block."""


@dataclass(frozen=True)
class Written:
    """A reply and what a reader must find in it."""

    reply: bytes
    regions: list[int] = field(repr=False)
    """Of every byte."""
    calls: list[Call]
    answer: str
    reasoning: str


class Pen:
    """Writes pieces of one region each; `random` chooses white space, escapes and orders."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pieces: list[tuple[bytes, Region]] = []
        self.calls: list[Call] = []
        self.texts: dict[Region, list[str]] = {Region.ANSWER: [], Region.REASONING: []}

    def put(self, text: str, region: Region) -> None:
        """Write one piece."""
        self.pieces.append((text.encode(), region))

    def space(self, region: Region = Region.SCAFFOLD, choices: str = " \n\t\r") -> None:
        """Write no, one or a few white space characters."""
        count = self.random.choice([0, 0, 1, 3])
        self.put("".join(self.random.choices(choices, k=count)), region)

    def text(self, text: str, region: Region) -> None:
        """Write text for the user or reasoning."""
        self.put(text, region)
        self.texts[region].append(text)

    def answer(self, text: str, dialect: str) -> None:
        """Write an answer: no tag of the dialect in it, nothing at its ends that begins one or
        is white space of a tag."""
        for tag in DIALECTS[dialect].tags:
            text = text.replace(tag, "_")
        opening, closing = self.random.choice("A-é\u2003"), self.random.choice([".", ". ", ".\n\n"])
        self.text(opening + text + closing, Region.ANSWER)

    def block(self, name: str, write: Callable[[], None]) -> None:
        """Write <name>...</name> and white space after it."""
        self.put(f"<{name}>", Region.FORMAT)
        write()
        self.put(f"</{name}>", Region.FORMAT)
        self.space()

    def think(self, text: str) -> None:
        """Write a block of thought."""
        text = text.replace("</think>", "_")
        self.block("think", lambda: self.text(text, Region.REASONING))

    def finish(self) -> Written:
        """All that was written."""
        answer, reasoning = (
            "\n".join(filter(None, (text.strip() for text in self.texts[region])))
            for region in (Region.ANSWER, Region.REASONING)
        )
        regions = [int(region) for text, region in self.pieces for _ in text]
        reply = b"".join(text for text, _ in self.pieces)
        return Written(reply, regions, self.calls, answer, reasoning)

    # Calls as JSON objects.

    def json_call(self, call: Call) -> None:
        """Write one object: its keys in any order, a foreign one among them at times."""
        name, arguments = call
        members = ["name", self.random.choice(["arguments", "parameters"])]
        members += self.random.choice([[], ["id"]])
        self.random.shuffle(members)
        self.put("{", Region.SCAFFOLD)
        for n, key in enumerate(members):
            if n:
                self.put(",", Region.SCAFFOLD)
            self.space()
            self.put(json.dumps(key), Region.SCAFFOLD)
            self.space()
            self.put(":", Region.SCAFFOLD)
            self.space()
            if key == "id":
                self.put('{"name": ["}", 1]}', Region.SCAFFOLD)
            elif key == "name":
                self.json_string(name, Region.TOOL_NAME, Region.SCAFFOLD)
            else:
                self.json_value(arguments)
            self.space()
        self.put("}", Region.SCAFFOLD)
        self.calls.append(call)

    def json_value(self, value: Any) -> None:
        """Write a value of the arguments at any depth."""
        if isinstance(value, str):
            self.json_string(value, Region.ARG_VALUE)
        elif isinstance(value, dict):
            self._items("{}", list(value.items()), self._json_member)
        elif isinstance(value, list):
            self._items("[]", value, self.json_value)
        else:
            self.put(json.dumps(value), Region.ARG_VALUE)

    def json_string(self, text: str, region: Region, quotes: Region = Region.ARG_SCAFFOLD) -> None:
        """Write a string, any of its characters escaped."""
        self.put('"', quotes)
        escaped = (json.dumps(c, ensure_ascii=self.random.random() < 0.5)[1:-1] for c in text)
        self.put("".join(escaped), region)
        self.put('"', quotes)

    def _json_member(self, item: tuple[str, Any]) -> None:
        self.json_string(item[0], Region.ARG_KEY)
        self._around(":")
        self.json_value(item[1])

    # Calls as Python.

    def python_calls(self, calls: list[Call]) -> None:
        """Write [name(key=value, ...), ...]."""
        self.put("[", Region.SCAFFOLD)
        for n, call in enumerate(calls):
            if n:
                self.put(",", Region.SCAFFOLD)
            self.space()
            self.put(call[0], Region.TOOL_NAME)
            self.space()
            self._items("()", list(call[1].items()), self._keyword, comma=True)
            self.space()
            self.calls.append(call)
        self.put("]", Region.SCAFFOLD)

    def python_value(self, value: Any) -> None:
        """Write a literal; a list of other than one item may be a tuple."""
        if isinstance(value, str):
            self.python_string(value, Region.ARG_VALUE)
        elif isinstance(value, dict):
            self._items("{}", list(value.items()), self._python_member, comma=True)
        elif isinstance(value, list):
            brackets = "[]" if len(value) == 1 else self.random.choice(["[]", "()"])
            self._items(brackets, value, self.python_value, comma=True)
        else:
            write = self.random.choice([repr, json.dumps])  # True or true, None or null
            self.put(write(value), Region.ARG_VALUE)

    def python_string(self, text: str, region: Region) -> None:
        """Write a string in either kind of quotes, any of its characters escaped."""
        quote = self.random.choice("'\"")
        self.put(quote, Region.ARG_SCAFFOLD)
        self.put("".join(self._python_escape(c, quote) for c in text), region)
        self.put(quote, Region.ARG_SCAFFOLD)

    def _python_escape(self, c: str, quote: str) -> str:
        if c not in (quote, "\\") and c >= " " and self.random.random() < 0.7:
            return c
        ways = [f"\\U{ord(c):08x}"]
        ways += [f"\\u{ord(c):04X}"] if ord(c) < 1 << 16 else []
        ways += [f"\\x{ord(c):02x}"] if ord(c) < 256 else []
        ways += [f"\\{c}"] if c in "'\"\\" else []
        ways += [f"\\{ord(c):03o}"] if ord(c) < 128 else []
        ways += [f"\\{'abtnvfr'[ord(c) - 7]}"] if 7 <= ord(c) <= 13 else []
        return self.random.choice(ways)

    def _python_member(self, item: tuple[str, Any]) -> None:
        self.python_string(item[0], Region.ARG_KEY)
        self._around(":")
        self.python_value(item[1])

    def _keyword(self, item: tuple[str, Any]) -> None:
        self.put(item[0], Region.ARG_KEY)
        self._around("=")
        self.python_value(item[1])

    # Both.

    def _around(self, symbol: str) -> None:
        self.space(Region.ARG_SCAFFOLD)
        self.put(symbol, Region.ARG_SCAFFOLD)
        self.space(Region.ARG_SCAFFOLD)

    def _items(
        self, brackets: str, items: list[Any], write: Callable[[Any], None], comma: bool = False
    ) -> None:
        self.put(brackets[0], Region.ARG_SCAFFOLD)
        self.space(Region.ARG_SCAFFOLD)
        for n, item in enumerate(items):
            if n:
                self._around(",")
            write(item)
            self.space(Region.ARG_SCAFFOLD)
        if comma and items and self.random.random() < 0.3:
            self._around(",")
        self.put(brackets[1], Region.ARG_SCAFFOLD)


@st.composite
def hermes(draw: st.DrawFn) -> Written:
    """Thoughts, answers and blocks of one call each, in any order."""
    pen, after_text = Pen(draw(st.integers(0, 1 << 32))), False
    pen.space()
    for item in draw(ITEMS):
        if isinstance(item, tuple) and item[0] == "text":
            if not after_text:
                pen.answer(item[1], "hermes")
        elif isinstance(item, tuple):
            pen.think(item[1])
        else:
            for call in item:
                pen.block("tool_call", lambda call=call: _spaced(pen, call))  # type: ignore[misc]
        after_text = isinstance(item, tuple) and item[0] == "text"
    return pen.finish()


@st.composite
def toolrl(draw: st.DrawFn) -> Written:
    """Thoughts, answers in blocks or bare, and blocks of one or more calls, in any order."""
    pen, after_text = Pen(draw(st.integers(0, 1 << 32))), False
    pen.space()
    for item in draw(ITEMS):
        bare = isinstance(item, tuple) and item[0] == "text" and pen.random.random() < 0.3
        if bare and not after_text:
            pen.answer(item[1], "toolrl")
        elif isinstance(item, tuple) and item[0] == "text":
            text = item[1].replace("</response>", "_")
            pen.block("response", lambda text=text: pen.text(text, Region.ANSWER))  # type: ignore[misc]
            bare = False
        elif isinstance(item, tuple):
            pen.think(item[1])
        else:
            pen.block("tool_call", lambda calls=item: _several(pen, calls))  # type: ignore[misc]
        after_text = bare
    return pen.finish()


def _spaced(pen: Pen, call: Call) -> None:
    pen.space()
    pen.json_call(call)
    pen.space()


def _several(pen: Pen, calls: list[Call]) -> None:
    for call in calls:
        _spaced(pen, call)


@st.composite
def llama3(draw: st.DrawFn) -> Written:
    """Objects parted by semicolons or white space, bare or after text and a tag; or text alone."""
    pen = Pen(draw(st.integers(0, 1 << 32)))
    pen.space()
    kind = draw(st.sampled_from(["bare", "tag", "text and tag", "text"]))
    if "text" in kind:
        pen.answer(draw(TEXT), "llama3")
    if "tag" in kind:
        pen.put("<|python_tag|>", Region.FORMAT)
        pen.space()
    if kind != "text":
        for call in draw(JSON_CALLS):
            pen.json_call(call)
            pen.space(choices="; \n")
    return pen.finish()


@st.composite
def mistral(draw: st.DrawFn) -> Written:
    """Text, a tag and an array of objects; or text alone."""
    pen = Pen(draw(st.integers(0, 1 << 32)))
    pen.space()
    kind = draw(st.sampled_from(["tag", "text and tag", "text"]))
    if "text" in kind:
        pen.answer(draw(TEXT), "mistral")
    if "tag" in kind:
        pen.put("[TOOL_CALLS]", Region.FORMAT)
        pen.space()
        for n, call in enumerate(draw(JSON_CALLS)):
            pen.put("," if n else "[", Region.SCAFFOLD)
            _spaced(pen, call)
        pen.put("]", Region.SCAFFOLD)
        pen.space()
    return pen.finish()


@st.composite
def pythonic(draw: st.DrawFn) -> Written:
    """A bare list of calls, or text and lists of calls between tags."""
    pen = Pen(draw(st.integers(0, 1 << 32)))
    pen.space()
    if draw(st.booleans()):
        pen.python_calls(draw(PYTHON_CALLS))
        pen.space()
        return pen.finish()
    for kind in draw(st.lists(st.sampled_from(["text", "calls"]), max_size=3)):
        if kind == "calls":
            pen.put("<|python_start|>", Region.FORMAT)
            pen.space()
            pen.python_calls(draw(PYTHON_CALLS))
            pen.space()
            pen.put("<|python_end|>", Region.FORMAT)
            pen.space()
        elif not pen.pieces or pen.pieces[-1][1] != Region.ANSWER:
            pen.answer(draw(TEXT), "pythonic")
    return pen.finish()


WRITERS: dict[str, st.SearchStrategy[Written]] = {
    "hermes": hermes(),
    "toolrl": toolrl(),
    "llama3": llama3(),
    "mistral": mistral(),
    "pythonic": pythonic(),
}
"""Dialect -> well-formed replies in it."""


def fragments(dialect: str) -> st.SearchStrategy[bytes]:
    """Bytes that a parser of the dialect is likely to stumble over."""
    pieces = [
        *(tag.encode() for tag in DIALECTS[dialect].tags),
        *(
            symbol.encode()
            for symbol in ["{", "}", "[", "]", "(", ")", '"', "'", "\\", ":", ",", ";", "="]
        ),
        b" ",
        b"\n",
        b"<",
        b"\xe6\x9d",
        b"\xff",
        b'"name"',
        b'"arguments"',
        b'{"name": "f", "arguments": {"x": [1, "a"]}}',
        b"[f(x=1)",
        b"f(",
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"text",
        b"\x00",
    ]
    return st.lists(st.sampled_from(pieces), max_size=12).map(b"".join)


def damaged(dialect: str) -> st.SearchStrategy[bytes]:
    """Well-formed replies of which a few bytes were taken out, replaced or doubled."""

    def damage(written: Written, edits: list[tuple[float, int, bytes]]) -> bytes:
        reply = written.reply
        for place, width, new in edits:
            at = int(place * len(reply))
            reply = reply[:at] + new + reply[at + width :]
        return reply

    edit = st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=2))
    return st.builds(damage, WRITERS[dialect], st.lists(edit, min_size=1, max_size=3))
