"""Every dialect: what was written piece by piece is what is read, whole, cut or damaged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.dialects import DIALECTS, Region, Reply, parse
from tests.support.replies import WRITERS, damaged, fragments

ALL = pytest.mark.parametrize("dialect", DIALECTS)
FEW = settings(max_examples=40, deadline=None)


def anything(dialect: str) -> st.SearchStrategy[bytes]:
    """Bytes of all kinds: noise, fragments of the grammar, replies good and damaged."""
    good = WRITERS[dialect].map(lambda written: written.reply)
    return st.one_of(st.binary(max_size=60), fragments(dialect), damaged(dialect), good)


def called(reply: Reply) -> list[tuple[str, str]]:
    """The calls with arguments as texts, so that 1, 1.0 and True differ."""
    return [(call.name, repr(call.arguments)) for call in reply.calls]


def test_every_dialect_has_a_writer_of_replies() -> None:
    assert list(WRITERS) == list(DIALECTS)


@ALL
@FEW
@given(data=st.data())
def test_what_was_written_is_what_is_read(dialect: str, data: st.DataObject) -> None:
    written = data.draw(WRITERS[dialect])
    reply = parse(written.reply, dialect)
    assert (reply.error, reply.well_formed) == ("", True)
    assert reply.regions_B.tolist() == written.regions
    assert called(reply) == [(name, repr(arguments)) for name, arguments in written.calls]
    assert (reply.answer, reply.reasoning) == (written.answer, written.reasoning)


@ALL
@FEW
@given(data=st.data())
def test_a_cut_leaves_regions_as_they_were_or_makes_them_malformed(
    dialect: str, data: st.DataObject
) -> None:
    whole = data.draw(anything(dialect))
    regions = parse(whole, dialect).regions_B
    step = len(whole) // 100 + 1
    for cut in range(data.draw(st.integers(0, step - 1)), len(whole), step):
        left = parse(whole[:cut], dialect).regions_B
        kept = int((left != Region.MALFORMED).sum())
        assert left[:kept].tolist() == regions[:kept].tolist()
        assert (left[kept:] == Region.MALFORMED).all()


@ALL
@FEW
@given(data=st.data())
def test_no_bytes_make_it_raise_and_calls_are_all_or_none(
    dialect: str, data: st.DataObject
) -> None:
    text = data.draw(anything(dialect))
    reply = parse(text, dialect)
    malformed = reply.regions_B == Region.MALFORMED
    assert len(reply.regions_B) == len(text)
    assert reply.well_formed == (reply.error == "") == (not malformed.any())
    assert (Region.TOOL_NAME in reply.regions_B) >= any(c.name for c in reply.calls)
    assert reply.well_formed or not reply.calls
    # MALFORMED is all that follows the first such byte.
    assert (malformed[1:] >= malformed[:-1]).all()


@ALL
@FEW
@given(data=st.data())
def test_the_texts_are_the_bytes_of_their_regions(dialect: str, data: st.DataObject) -> None:
    text = data.draw(anything(dialect))
    reply = parse(text, dialect)
    for region, found in ((Region.ANSWER, reply.answer), (Region.REASONING, reply.reasoning)):
        own = b"".join(
            bytes([byte]) if kind == region else b"\n"
            for byte, kind in zip(text, reply.regions_B, strict=True)
        )
        assert found.split() == own.decode("utf-8", "replace").split()


@FEW
@given(data=st.data())
def test_text_without_tags_or_calls_is_the_same_in_every_dialect(data: st.DataObject) -> None:
    text = data.draw(st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"])))
    replies: list[Any] = [parse(text.encode(), dialect) for dialect in DIALECTS]
    for reply in replies:
        assert (reply.answer, reply.reasoning, reply.calls) == (text.strip(), "", ())
        assert reply.regions_B.tolist() == replies[0].regions_B.tolist()
