"""The rules of the dialects one by one: what is malformed, from which byte on, and why."""

from __future__ import annotations

import ast
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.dialects import Block, Dialect, Region, parse
from rest_mega.dialects.grammar import read
from rest_mega.dialects.tape import MalformedError, Tape

CALL = '{"name": "f", "arguments": {"x": 1}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"


def runs(reply: str, dialect: str) -> list[tuple[str, str]]:
    """(text, region) of every run of bytes of one region."""
    text = reply.encode()
    regions = parse(text, dialect).regions_B.tolist()
    result: list[tuple[bytes, int]] = []
    for n, region in enumerate(regions):
        if result and result[-1][1] == region:
            result[-1] = (result[-1][0] + text[n : n + 1], region)
        else:
            result.append((text[n : n + 1], region))
    return [(part.decode(), Region(region).name) for part, region in result]


def test_a_whole_reply_of_the_hermes_dialect() -> None:
    reply = f"<think>\nhm <tool_call> \n</think>\n\nSure. \n<tool_call>\n{CALL}\n</tool_call>\n<"
    assert runs(reply, "hermes") == [
        ("<think>", "FORMAT"),
        ("\nhm <tool_call> \n", "REASONING"),
        ("</think>", "FORMAT"),
        ("\n\n", "SCAFFOLD"),
        ("Sure. \n", "ANSWER"),
        ("<tool_call>", "FORMAT"),
        ('\n{"name": "', "SCAFFOLD"),
        ("f", "TOOL_NAME"),
        ('", "arguments": ', "SCAFFOLD"),
        ('{"', "ARG_SCAFFOLD"),
        ("x", "ARG_KEY"),
        ('": ', "ARG_SCAFFOLD"),
        ("1", "ARG_VALUE"),
        ("}", "ARG_SCAFFOLD"),
        ("}\n", "SCAFFOLD"),
        ("</tool_call>", "FORMAT"),
        ("\n", "SCAFFOLD"),
        ("<", "MALFORMED"),
    ]


def test_a_whole_reply_of_the_pythonic_dialect() -> None:
    assert runs("[f(x=[1, 'a'], _y={\"k\": None}), g.h()]", "pythonic") == [
        ("[", "SCAFFOLD"),
        ("f", "TOOL_NAME"),
        ("(", "ARG_SCAFFOLD"),
        ("x", "ARG_KEY"),
        ("=[", "ARG_SCAFFOLD"),
        ("1", "ARG_VALUE"),
        (", '", "ARG_SCAFFOLD"),
        ("a", "ARG_VALUE"),
        ("'], ", "ARG_SCAFFOLD"),
        ("_y", "ARG_KEY"),
        ('={"', "ARG_SCAFFOLD"),
        ("k", "ARG_KEY"),
        ('": ', "ARG_SCAFFOLD"),
        ("None", "ARG_VALUE"),
        ("})", "ARG_SCAFFOLD"),
        (", ", "SCAFFOLD"),
        ("g.h", "TOOL_NAME"),
        ("()", "ARG_SCAFFOLD"),
        ("]", "SCAFFOLD"),
    ]


@pytest.mark.parametrize(
    ("dialect", "good", "bad", "error"),
    [
        # Blocks that are not closed, closed twice, or closed with something between.
        ("hermes", "", "<think>hm", "<think> is not closed at byte 0"),
        ("hermes", "a ", "</think>", "</think> closes nothing at byte 2"),
        ("hermes", f"{HERMES}\n", "</tool_call>", "</tool_call> closes nothing"),
        ("hermes", "", f"<tool_call>{CALL}", "not closed, expected </tool_call> at byte 47"),
        ("hermes", "", f"<tool_call>{CALL}{CALL}</tool_call>", "expected </tool_call> at byte 47"),
        ("hermes", f"{HERMES}\n", f"<tool_call>\n{CALL}", "expected </tool_call>"),
        ("hermes", "text ", "<tool_call></tool_call>", "must be a JSON object: expected '{'"),
        ("hermes", "text ", "</thin", "the reply ends inside a tag at byte 5"),
        ("toolrl", "", "<response>hi", "<response> is not closed at byte 0"),
        ("toolrl", "", f"<tool_call>{CALL},{CALL}</tool_call>", "expected </tool_call>"),
        # Objects that are no calls.
        ("hermes", "", f"<tool_call>[{CALL}]</tool_call>", "must be a JSON object"),
        ("hermes", "", HERMES.replace('"x"', "x"), "not JSON: Expecting property name"),
        ("hermes", "", HERMES.replace("1", "NaN"), "not JSON: NaN is no JSON number"),
        ("hermes", "", HERMES.replace("1", "-Infinity"), "-Infinity is no JSON number"),
        ("hermes", "", HERMES.replace("1", "01"), "not JSON: Expecting ',' delimiter"),
        ("hermes", "", HERMES.replace("1", '"\n"'), "not JSON: Invalid control character"),
        ("hermes", "", HERMES.replace("1", r'"\ud800"'), "a lone surrogate in the call"),
        ("hermes", "", HERMES.replace("1", r'"\q"'), "not JSON: Invalid \\escape"),
        ("hermes", "", HERMES.replace("1}", "1,}"), "not JSON"),
        ("hermes", "", HERMES.replace("1}}", "1},}"), "not JSON"),
        ("hermes", "", HERMES.replace("1}}", "1};"), "expected ',' or '}'"),
        ("hermes", "", HERMES.replace('"name":', '"name"'), "expected a quoted key and a colon"),
        ("hermes", "", HERMES.replace('"name":', "1:"), "expected a quoted key and a colon"),
        ("hermes", "", HERMES.replace("1", "9" * 5000), "not JSON: Exceeds the limit"),
        ("hermes", "", HERMES.replace('"f"', "3"), 'a call needs "name", a string'),
        ("hermes", "", HERMES.replace("name", "tool"), 'a call needs "name", a string'),
        ("hermes", "", HERMES.replace('{"x": 1}', '"{}"'), '"arguments", "parameters", an object'),
        ("hermes", "", HERMES.replace('{"x": 1}', "null"), '"arguments", "parameters", an object'),
        ("hermes", "", HERMES.replace("arguments", "args"), '"arguments", "parameters"'),
        ("hermes", "", HERMES.replace("}}", '}, "parameters": {}}'), "a call needs one of"),
        ("hermes", "", HERMES.replace("}}", '}, "name": "g"}'), "the key 'name' occurs twice"),
        # Text after calls that last to the end of the reply.
        ("llama3", f"{CALL}; ", "and more", "must be a JSON object"),
        ("llama3", "a ", "<|python_tag|>", "must be a JSON object"),
        ("llama3", f"{CALL};{CALL} ", "<|python_tag|>", "must be a JSON object"),
        ("mistral", f"[TOOL_CALLS][{CALL}] ", "done", "text after the last call"),
        ("mistral", f"[TOOL_CALLS][{CALL}] ", "[TOOL_CALLS]", "text after the last call"),
        ("mistral", "a ", "[TOOL_CALLS]" + CALL, "expected '['"),
        ("mistral", "a ", f"[TOOL_CALLS][{CALL}", "expected ']'"),
        ("mistral", "a ", "[TOOL_CALLS][]", "must be a JSON object"),
        ("mistral", "see ", "[", "the reply ends inside a tag"),
        ("pythonic", "[f(x=1)] ", "done", "text after the last call"),
        # Python that is no list of calls with literals.
        ("pythonic", " ", "[f", "ends before it is clear whether it is a call at byte 1"),
        ("pythonic", "", "[f(1)]", "expected key=value"),
        ("pythonic", "", "[f(,)]", "expected key=value"),
        ("pythonic", "", "[f(x=1,,)]", "expected key=value"),
        ("pythonic", "", "[f(x=1, x=2)]", "the argument 'x' occurs twice"),
        ("pythonic", "", "[f(x=y)]", "'y' is no literal"),
        ("pythonic", "", "[f(x=)]", "expected a literal"),
        ("pythonic", "", "[f(x=1_000)]", "expected a literal"),
        ("pythonic", "", "[f(x=0x1F)]", "expected a literal"),
        ("pythonic", "", "[f(x='a\nb')]", "expected a quoted string on one line"),
        ("pythonic", "", "[f(x='ab)]", "expected a quoted string on one line"),
        ("pythonic", "", "[f(x={1: 2})]", "expected a quoted string"),
        ("pythonic", "", "[f(x=r'a')]", "'r' is no literal"),
        ("pythonic", "", r"[f(x='\ud800')]", "a lone surrogate in the call"),
        ("pythonic", "", "[f(x=" + "9" * 5000 + ")]", "not a number: Exceeds the limit"),
        ("pythonic", "", "[f(x=1)", "expected ']'"),
        ("pythonic", "", "[f(x=1), 2]", "expected the name of a function"),
        ("pythonic", "a ", "<|python_start|>[f()]", "not closed, expected <|python_end|>"),
        ("pythonic", "a ", "<|python_end|>", "<|python_end|> closes nothing"),
    ],
)
def test_the_first_error_and_all_that_follows_is_malformed(
    dialect: str, good: str, bad: str, error: str
) -> None:
    reply = parse(f"{good}{bad}".encode(), dialect)
    assert error in reply.error
    assert (reply.regions_B == Region.MALFORMED).tolist() == [False] * len(good) + [True] * len(bad)
    assert reply.calls == ()
    # Nothing after the first error can mend it.
    longer = parse(f"{good}{bad}\n{HERMES}".encode(), dialect)
    if "ends" not in error and "is not closed at" not in error:
        assert not longer.well_formed
        assert longer.regions_B[: len(good)].tolist() == reply.regions_B[: len(good)].tolist()


def test_an_error_keeps_the_texts_before_it_and_no_call() -> None:
    reply = parse(f"<think> a </think> b {HERMES}\nc<tool_call>{{".encode(), "hermes")
    assert (reply.reasoning, reply.answer, reply.calls) == ("a", "b\nc", ())


@pytest.mark.parametrize(
    "reply",
    [
        "[1, 2]",
        "[f]",
        "[] none",
        "f(x=1)",
        "['f'(x=1)]",
        "a [f(x=1)]",
        "[f] (x)",
        "{'f': 1}",
    ],
)
def test_what_only_looks_like_a_list_of_calls_is_an_answer(reply: str) -> None:
    read = parse(reply.encode(), "pythonic")
    assert (read.answer, read.well_formed, read.calls) == (reply, True, ())


@pytest.mark.parametrize("reply", ["[see (1)]", "[f(x)]"])
def test_what_begins_like_a_list_of_calls_must_be_one(reply: str) -> None:
    assert parse(reply.encode(), "pythonic").regions_B.tolist() == [Region.MALFORMED] * len(reply)


@settings(max_examples=200, deadline=None)
@given(
    body=st.lists(
        st.sampled_from([*"abfnrtvxuUN017{}' é", "\\", "\\", '\\"', "0041", "00000041"])
    ).map("".join)
)
def test_python_strings_mean_what_they_mean_in_python(body: str) -> None:
    try:
        expected: Any = ast.literal_eval(f'"{body}"')
    except (SyntaxError, ValueError):
        return
    if "\\N{" in body:  # needs the table of Unicode names
        return
    (call,) = parse(f'[f(x="{body}")]'.encode(), "pythonic").calls
    assert call.arguments == {"x": expected}


def python_source(value: Any) -> str:
    """The repr of a value, but for infinities, which Python has no literal for."""
    if isinstance(value, list):
        return f"[{', '.join(map(python_source, value))}]"
    if isinstance(value, dict):
        items = (f"{key!r}: {python_source(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


@settings(max_examples=60, deadline=None)
@example(value={"inf": ["inf", -math.inf]})
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=3),
        max_leaves=4,
    )
)
def test_the_repr_of_a_value_is_read_as_that_value(value: Any) -> None:
    (call,) = parse(f"[f(x={python_source(value)})]".encode(), "pythonic").calls
    assert repr(call.arguments["x"]) == repr(value)


@pytest.mark.parametrize(
    ("source", "value"),
    [("()", []), ("(1)", 1), ("(1,)", [1]), ("(1, 2)", [1, 2]), ("((1),)", [1]), ("+1.", 1.0)],
)
def test_tuples_are_lists_and_parentheses_alone_mean_nothing(source: str, value: Any) -> None:
    (call,) = parse(f"[f(x={source})]".encode(), "pythonic").calls
    assert repr(call.arguments) == repr({"x": value})


@pytest.mark.parametrize(
    ("dialect", "before", "after"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ', "}}</tool_call>"),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": ', "}}]"),
        ("pythonic", "[f(x=", ")]"),
    ],
)
def test_arguments_nest_64_levels_and_no_more(dialect: str, before: str, after: str) -> None:
    # The object of the arguments is the first level in JSON; in Python there is none around x.
    most = 64 if dialect == "pythonic" else 63

    def nested(depth: int, brackets: tuple[str, str]) -> bool:
        opening, closing = brackets
        reply = parse(f"{before}{opening * depth}{closing * depth}{after}".encode(), dialect)
        return reply.well_formed or "deeper than 64" not in reply.error

    assert nested(most, ("[", "]"))
    assert not nested(most + 1, ("[", "]"))
    wide = json.dumps([[1, {"a": [2]}]] * 200)
    assert parse(f"{before}{wide}{after}".encode(), dialect).well_formed


def test_keys_are_read_as_written_even_with_escapes_and_repeats() -> None:
    block = r'<tool_call>{"n\u0061me": "f", "arguments": {"é": 1, "x": {"name": "g"}}}</tool_call>'
    (call,) = parse(block.encode(), "hermes").calls
    assert (call.name, call.arguments) == ("f", {"é": 1, "x": {"name": "g"}})


def test_bytes_that_are_no_utf_8_become_replacement_characters() -> None:
    reply = b'a\xff<tool_call>{"name": "\xe6\x9d", "arguments": {"x": "\x80y"}}</tool_call>'
    read = parse(reply, "hermes")
    assert (read.answer, read.calls[0].name) == ("a\ufffd", "\ufffd")
    assert read.calls[0].arguments == {"x": "\ufffdy"}


@pytest.mark.parametrize("space", [b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xa0"])
def test_white_space_is_jsons_alone(space: bytes) -> None:
    text = parse(space + b"a", "hermes")
    assert text.regions_B.tolist() == [Region.ANSWER] * 2
    wrong = {
        "hermes": (HERMES.replace(": ", ":~"), HERMES.replace("\n", "~")),
        "llama3": (f"{CALL}~", f"{CALL}~{CALL}"),
        "pythonic": ("[f(~x=1)]", "[f(x=1~)]", "[f(x=1)~]", "[f(x=1)]~", "[f(x=[~])]"),
    }
    for dialect, replies in wrong.items():
        for reply in replies:
            read = parse(reply.encode().replace(b"~", space), dialect)
            assert not read.well_formed
            assert parse(reply.encode().replace(b"~", b" "), dialect).well_formed


def test_the_beginning_of_a_tag_at_the_end_is_the_longest_of_those_that_fit() -> None:
    dialect = Dialect((Block("[<a>", "", Region.ANSWER), Block("<b>", "</b>", Region.REASONING)))
    for text, malformed in (("x [<", 2), ("x [ <", 1), ("x [", 1), ("x <[", 1), ("x [<b", 2)):
        tape = Tape(text.encode())
        with pytest.raises(MalformedError, match=f"inside a tag at byte {len(text) - malformed}"):
            read(tape, dialect)


def test_an_unknown_dialect_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"dialect='hermess' is not known; .* nearest: hermes"):
        parse(b"", "hermess")
