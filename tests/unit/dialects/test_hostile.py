"""Replies made to be slow to read: up to half a megabyte of each ends with the right regions.

Nothing here measures time. An algorithm that is quadratic in the length would need minutes.
"""

from __future__ import annotations

import pytest

from rest_mega.dialects import DIALECTS, Region, parse

SIZE = 500_000
CALL = '{"name": "f", "arguments": '
OPENED = {
    "hermes": f"<tool_call>{CALL}",
    "toolrl": f"<tool_call>{CALL}",
    "llama3": CALL,
    "mistral": f"[TOOL_CALLS][{CALL}",
    "pythonic": "[f(x=",
}
"""Dialect -> a call begun, up to the value of its arguments."""


def flood(unit: str, size: int = SIZE) -> str:
    """The unit again and again."""
    return unit * (size // len(unit.encode()))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "[",
        '{"a":',
        "[[],",
        "(",
        "((),",
        '"',
        "'",
        "\\",
        '"\\"',
        '{"',
        "9",
        "1.",
        " ",
        "\n,",
        "é",
    ],
)
def test_arguments_that_never_end_are_malformed_from_their_block_on(
    dialect: str, unit: str
) -> None:
    reply = parse((OPENED[dialect] + flood(unit)).encode(), dialect)
    assert (reply.regions_B == Region.MALFORMED).all()
    assert reply.calls == ()


@pytest.mark.parametrize(
    ("dialect", "unit", "region"),
    [
        *((dialect, "<", Region.ANSWER) for dialect in ("hermes", "toolrl", "llama3", "mistral")),
        *((dialect, "</tool_cal ", Region.ANSWER) for dialect in DIALECTS),
        *((dialect, "[TOOL_CALLS[ ", Region.ANSWER) for dialect in DIALECTS),
        *((dialect, "\u2003\x85", Region.ANSWER) for dialect in DIALECTS),
        *((dialect, " \n", Region.SCAFFOLD) for dialect in DIALECTS),
        ("hermes", "</tool_call>", Region.MALFORMED),
        ("hermes", "<tool_call>", Region.MALFORMED),
        ("hermes", "<think>", Region.MALFORMED),
        ("toolrl", "<response>", Region.MALFORMED),
        ("llama3", "{", Region.MALFORMED),
        ("llama3", "<|python_tag|>", Region.MALFORMED),
        ("mistral", "[TOOL_CALLS]", Region.MALFORMED),
        ("pythonic", "[a(", Region.MALFORMED),
        ("pythonic", "<|python_start|>", Region.MALFORMED),
    ],
)
def test_a_flood_of_one_thing_is_one_region(dialect: str, unit: str, region: Region) -> None:
    text = flood(unit).encode() + (b"." if region == Region.ANSWER else b"")
    assert set(parse(text, dialect).regions_B.tolist()) == {region}


@pytest.mark.parametrize("ending", ["", "<", "\\", "</tool_call>", "<think>"])
def test_a_flood_of_thoughts_keeps_what_came_before_the_error(ending: str) -> None:
    unit, count = "<think>{\\</think>", 10_000
    reply = parse((unit * count + ending).encode(), "hermes")
    one = [Region.FORMAT] * 7 + [Region.REASONING] * 2 + [Region.FORMAT] * 8
    assert reply.regions_B[: len(unit) * count].tolist() == one * count
    assert reply.reasoning == "\n".join(["{\\"] * count)
    assert reply.well_formed == (ending in ("", "\\"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_flood_of_calls_is_read_call_by_call(dialect: str) -> None:
    unit, parted, before, after = {
        "hermes": (f"<tool_call>{CALL}{{}}}}</tool_call>", "", "", ""),
        "toolrl": (f"{CALL}{{}}}}", "\n", "<tool_call>", "</tool_call>"),
        "llama3": (f"{CALL}{{}}}}", ";", "", ""),
        "mistral": (f"{CALL}{{}}}}", ",", "[TOOL_CALLS][", "]"),
        "pythonic": ("f()", ",", "[", "]"),
    }[dialect]
    count = 3_000
    text = before + parted.join([unit] * count) + after
    reply = parse(text.encode(), dialect)
    assert reply.error == ""
    assert [(call.name, call.arguments) for call in reply.calls] == [("f", {})] * count
    assert (reply.regions_B == Region.TOOL_NAME).sum() == count
    # The same calls with an error at the very end: none counts, and regions stay or are malformed.
    broken = parse((text + "</tool_call>").encode(), dialect)
    assert broken.calls == ()
    kept = broken.regions_B != Region.MALFORMED
    assert broken.regions_B[kept].tolist() == reply.regions_B[: kept.sum()].tolist()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("body", ["\\\\", "{[", "é", "</tool_cal"])
def test_a_long_string_is_one_value(dialect: str, body: str) -> None:
    before, after = {
        "hermes": ("<tool_call>", "</tool_call>"),
        "toolrl": ("<tool_call>", "</tool_call>"),
        "llama3": ("", ""),
        "mistral": ("[TOOL_CALLS][", "]"),
        "pythonic": ("", ""),
    }[dialect]
    inside = flood(body, 200_000)
    string = f'"{inside}"'
    call = f"[f(x={string})]" if dialect == "pythonic" else f'{CALL}{{"x": {string}}}}}'
    reply = parse(f"{before}{call}{after}".encode(), dialect)
    assert reply.error == ""
    assert reply.calls[0].arguments == {"x": inside.replace("\\\\", "\\")}
    assert (reply.regions_B == Region.ARG_VALUE).sum() == len(inside.encode())
