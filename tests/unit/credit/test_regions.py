"""Regions of tokens: those of their bytes, however the reply was cut into tokens."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.credit.regions import PRIORITY, tag, tag_trajectory
from rest_mega.dialects import DIALECTS, Region
from rest_mega.records import Prompt, Trajectory, Turn
from tests.support.replies import WRITERS, damaged

VECTORS = json.loads(
    (Path(__file__).parents[2] / "data" / "weight_vectors.json").read_text(encoding="utf-8")
)["replies"]
ARGS = {Region.ARG_KEY, Region.ARG_VALUE, Region.ARG_SCAFFOLD}
ALL = pytest.mark.parametrize("dialect", DIALECTS)
FEW = settings(max_examples=30, deadline=None)


def cut(text: bytes, places: list[float]) -> list[bytes]:
    """The text in pieces, some of them empty."""
    edges = [0, *sorted(int(place * len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def tokens_of(vector: dict[str, Any]) -> list[bytes]:
    """A vector's tokens as bytes."""
    edges = [0, *itertools.accumulate(vector["token_lengths_in_bytes"])]
    text = vector["text"].encode()
    assert edges[-1] == len(text)
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_regions_of_the_reference_vectors(vector: dict[str, Any]) -> None:
    tokens = tokens_of(vector)
    ended = tokens[-1] == b"<|im_end|>"
    regions_T = tag(tokens, "toolrl", end_of_turn=ended)
    kinds = {"format": {Region.FORMAT}, "name": {Region.TOOL_NAME}, "args": ARGS}
    kinds |= {"think": {Region.REASONING}}
    kinds["outside"] = set(Region) - set.union(*kinds.values())
    assert [
        region in kinds[kind] for region, kind in zip(regions_T, vector["region"], strict=True)
    ] == [True] * len(tokens)
    assert (regions_T[-1] == Region.END_OF_TURN) == ended


@ALL
@FEW
@given(data=st.data(), places=st.lists(st.floats(0, 1), max_size=40))
def test_a_token_has_the_strongest_region_of_its_bytes(
    dialect: str, data: st.DataObject, places: list[float]
) -> None:
    written = data.draw(WRITERS[dialect])
    tokens = cut(written.reply, places)
    regions_T = tag(tokens, dialect).tolist()
    assert len(regions_T) == len(tokens)
    start = 0
    for token, region in zip(tokens, regions_T, strict=True):
        # A token without bytes is as the byte that follows it, or as the last one.
        own = written.regions[start : start + len(token)] or written.regions[start : start + 1]
        own = own or written.regions[-1:] or [Region.ANSWER]
        assert region == min(own, key=PRIORITY.index)
        start += len(token)


@ALL
@FEW
@given(data=st.data(), places=st.lists(st.floats(0, 1), max_size=40))
def test_another_cut_into_tokens_leaves_each_bytes_region(
    dialect: str, data: st.DataObject, places: list[float]
) -> None:
    text = data.draw(damaged(dialect))
    by_byte = tag([text[n : n + 1] for n in range(len(text))], dialect).tolist()
    start = 0
    tokens = cut(text, places)
    for token, region in zip(tokens, tag(tokens, dialect).tolist(), strict=True):
        assert not token or region == min(by_byte[start : start + len(token)], key=PRIORITY.index)
        start += len(token)


@ALL
@FEW
@given(data=st.data())
def test_the_bytes_of_a_region_are_what_was_written_for_it(
    dialect: str, data: st.DataObject
) -> None:
    written = data.draw(WRITERS[dialect])
    text = written.reply
    regions_T = tag([text[n : n + 1] for n in range(len(text))], dialect)
    for region in Region:
        own = bytes(b for b, kind in zip(text, written.regions, strict=True) if kind == region)
        assert bytes(np.frombuffer(text, np.uint8)[regions_T == region]) == own


@ALL
@FEW
@given(data=st.data(), places=st.lists(st.floats(0, 1), max_size=20), end=st.binary(max_size=9))
def test_the_end_of_turn_token_is_no_text(
    dialect: str, data: st.DataObject, places: list[float], end: bytes
) -> None:
    tokens = cut(data.draw(damaged(dialect)), places)
    without = tag(tokens, dialect).tolist()
    assert tag([*tokens, end], dialect, end_of_turn=True).tolist() == [*without, Region.END_OF_TURN]


@pytest.mark.parametrize("strong", range(len(PRIORITY) - 1))
def test_the_order_of_priorities_is_that_of_the_authors_constants(strong: int) -> None:
    # Until step 200, where arguments begin to weigh more than the format.
    weight = {Region.TOOL_NAME: 1.2, Region.FORMAT: 1.0, Region.REASONING: 0.6}
    weight |= dict.fromkeys(ARGS, 0.6)
    assert set(PRIORITY) == set(Region)
    assert weight.get(PRIORITY[strong], 0) >= weight.get(PRIORITY[strong + 1], 0)


@pytest.mark.parametrize(
    ("token", "region"),
    [
        (b'"f", "', Region.TOOL_NAME),
        (b"<tool_call>\n{", Region.FORMAT),
        (b'{"x": 1}', Region.ARG_VALUE),
        (b'{"x', Region.ARG_KEY),
        (b"}}\n", Region.ARG_SCAFFOLD),
        (b"b </", Region.FORMAT),
        (b"\na", Region.ANSWER),
    ],
)
def test_a_token_that_straddles_regions_takes_the_stronger(token: bytes, region: Region) -> None:
    call = b'<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    text = b"<think>b </think>\na" + call
    at = text.index(token)
    tokens = [text[:at], token, text[at + len(token) :]]
    assert tag(tokens, "hermes")[1] == region


def test_no_tokens_have_no_regions() -> None:
    for dialect in DIALECTS:
        assert tag([], dialect).tolist() == []
        assert tag([], dialect, end_of_turn=True).tolist() == []
        assert tag([b"", b""], dialect).tolist() == [Region.ANSWER] * 2


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dialect='toolrll' .* nearest: toolrl"):
        tag([b"a"], "toolrll")


def test_a_trajectory_is_tagged_turn_by_turn_and_observed_elsewhere() -> None:
    words = [
        *(b"<prompt> ", b"</tool_call>"),
        *(b"<tool_call>", b'{"name": "f", "arguments": {}}', b"</tool_call>", b"<end>"),
        *(b"<tool_result>", b"{"),
        *(b"Done", b".", b"<"),
    ]
    ids_T = np.arange(len(words), dtype=np.int32)
    turn_T = np.array([-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1], np.int32)
    trajectory = Trajectory(
        prompt=Prompt("p", ()),
        sibling=0,
        ids_T=ids_T,
        logprobs_T=np.zeros(len(words), np.float32),
        mask_T=turn_T >= 0,
        turn_T=turn_T,
        version_T=turn_T,
        turns=(Turn(2, 6, "", True), Turn(8, 11, "", False, ended=False)),
        stop="token_limit",
    )
    tagged = tag_trajectory(trajectory, "hermes", lambda i: words[i])
    expected = [
        *[Region.OBSERVATION] * 2,
        *(Region.FORMAT, Region.TOOL_NAME, Region.FORMAT, Region.END_OF_TURN),
        *[Region.OBSERVATION] * 2,
        *(Region.ANSWER, Region.ANSWER, Region.MALFORMED),
    ]
    assert tagged.tolist() == expected
    # A turn's regions do not depend on the other turns.
    for turn in trajectory.turns:
        alone = tag(words[turn.start : turn.end], "hermes", end_of_turn=turn.ended)
        assert tagged[turn.start : turn.end].tolist() == alone.tolist()
    # Tokens that the mask takes out are observed, too, and leave the others as they are.
    mask_T = trajectory.mask_T & (ids_T != 3)
    expected[3] = Region.OBSERVATION
    masked = tag_trajectory(replace(trajectory, mask_T=mask_T), "hermes", lambda i: words[i])
    assert masked.tolist() == expected
