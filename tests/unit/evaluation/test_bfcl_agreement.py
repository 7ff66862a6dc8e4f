"""Our verdicts on BFCL's entries are those of its official pipeline on the same raw outputs, sample
by sample: gold answers, spoilt ones, and texts that are no answers at all."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rest_mega.evaluation.bfcl_judge import Judged, judge_reply
from rest_mega.evaluation.bfcl_scores import MULTI_TURN
from rest_mega.evaluation.suite import Played
from rest_mega.records import Turn
from tests.support import bfcl_official as official
from tests.support.bfcl_replies import (
    CATEGORIES,
    DIALECTS,
    OTHERS,
    UNREACHABLE,
    UNREACHABLE_AS_CODE,
    Call,
    around,
    garbled,
    gold,
    mutants,
    written,
)
from tests.support.bfcl_traces import played, suite, tasks

pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed: make bfcl")

NO_TURN = Turn(0, 0, "", True)
RECORDED = Path(__file__).parents[2] / "data" / "bfcl" / "replies.jsonl"


def both(category: str, entry_id: str, dialect: str, text: str) -> tuple[Judged, dict[str, Any]]:
    """(our verdict, the official one)"""
    entry, truth = official.entries(category)[entry_id]
    found = official.judge(category, entry_id, text, official.handler(dialect))
    return judge_reply(text, dialect, category, entry, truth), found


def has_operators(text: str) -> bool:
    """As a Python literal: what Llama's official handler evaluates, and we do not."""
    try:
        nodes = list(ast.walk(ast.parse(text.replace("<|python_tag|>", "").lstrip(), mode="eval")))
    except SyntaxError:
        return False
    return any(isinstance(n, ast.BinOp | ast.UnaryOp | ast.Compare | ast.BoolOp) for n in nodes)


def agree(category: str, entry_id: str, dialect: str, text: str) -> Judged:
    ours, theirs = both(category, entry_id, dialect, text)
    if dialect == "llama3" and ours.calls is None and has_operators(text):
        return ours
    expected = (theirs["valid"], official.kind(theirs))
    assert (ours.valid, ours.kind) == expected, (entry_id, dialect, text, theirs, ours)
    if "error" in theirs and ours.calls is not None and "wrong_output" not in ours.kind:
        assert ours.reason == "; ".join(map(str, theirs["error"])), entry_id
    return ours


def test_recorded_outputs_get_the_verdict_that_was_recorded_with_them() -> None:
    """Right and wrong ones of every category; the official pipeline still says the same."""
    rows = [json.loads(line) for line in RECORDED.read_text("utf-8").split("\n") if line]
    assert {(row["category"], row["valid"]) for row in rows} == {
        (category, valid) for category in (*CATEGORIES, *MULTI_TURN) for valid in (True, False)
    }
    for row in rows:
        category, dialect, expected = row["category"], row["dialect"], (row["valid"], row["kind"])
        raw = row["turns"] if "turns" in row else row["text"]
        theirs = official.judge(category, row["id"], raw, official.handler(dialect))
        assert (theirs["valid"], official.kind(theirs)) == expected, row
        (task,) = (one for one in tasks(category) if one.prompt.id == row["id"])
        if "turns" in row:
            episode = Played((NO_TURN,), "answered", result=played(task, raw))
        else:
            turn = dataclasses.replace(NO_TURN, text=raw)
            episode = Played((turn,), "answered", dialect=dialect)
        verdict = suite().judge(task, episode)
        assert (verdict.valid, verdict.kind) == expected, row


def sampled(category: str, every: int) -> Iterator[tuple[str, list[Call]]]:
    """(id, gold calls) of one in `every` entries of the category, of at least one."""
    for entry_id, (entry, truth) in list(official.entries(category).items())[::every]:
        yield entry_id, gold(category, entry, truth)


def check_gold(category: str, every: int) -> None:
    for entry_id, calls in sampled(category, every):
        for dialect in DIALECTS:
            judged = agree(category, entry_id, dialect, written(calls, dialect, category))
            refused = "irrelevance" in category and bool(calls)
            code = dialect == "pythonic" and entry_id in UNREACHABLE_AS_CODE
            right = not (refused or code or entry_id in UNREACHABLE)
            semicolon = dialect == "llama3" and ";" in str(calls)  # its handler parts calls there
            assert judged.valid == right or semicolon, (entry_id, dialect, judged)


def check_spoilt(category: str, every: int, chance: Random) -> Counter[tuple[str, bool]]:
    """(way of spoiling, the verdict) -> replies"""
    seen: Counter[tuple[str, bool]] = Counter()
    for entry_id, calls in sampled(category, every):
        for how, spoilt in mutants(calls, chance) if calls else ():
            dialect = chance.choice(DIALECTS)
            judged = agree(category, entry_id, dialect, written(spoilt, dialect, category))
            seen[how, judged.valid] += 1
    return seen


def check_texts(category: str, every: int, chance: Random, more: int) -> Counter[tuple[str, bool]]:
    seen: Counter[tuple[str, bool]] = Counter()
    for entry_id, calls in sampled(category, every):
        for dialect in DIALECTS:
            text = written(calls, dialect, category)
            texts = {**dict(around(text)), **OTHERS}
            texts |= {f"garbled {n}": garbled(text, chance) for n in range(more)}
            for how, one in texts.items():
                judged = agree(category, entry_id, dialect, one)
                seen[how.split()[0], judged.valid] += 1
    return seen


@pytest.mark.parametrize("category", CATEGORIES)
def test_gold_answers_are_right_in_both(category: str) -> None:
    check_gold(category, every=7)


@pytest.mark.parametrize("category", CATEGORIES)
def test_spoilt_answers_get_the_official_verdict(category: str) -> None:
    count = len(official.entries(category))
    seen = check_spoilt(category, max(1, count // 8), Random(category))
    assert {valid for _, valid in seen} == {True, False}


@pytest.mark.parametrize("category", CATEGORIES)
def test_whatever_is_written_gets_the_official_verdict(category: str) -> None:
    count = len(official.entries(category))
    seen = check_texts(category, max(1, count // 2), Random(category), more=5)
    assert sum(seen.values()) > 100


def test_what_is_spoilt_where_order_matters_is_wrong_and_right_where_it_does_not() -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for category in ("simple_python", "multiple", "parallel", "parallel_multiple"):
        seen += check_spoilt(category, 20, Random(1))
    for how in ("order of calls", "order of keys"):
        assert seen[how, True] > 0
        assert seen[how, False] == 0
    for how in ("value", "name", "one more", "one less", "one argument more", "none"):
        assert (seen[how, True], seen[how, False] > 0) == (0, True), how
    for how in ("type", "argument missing", "order in a list"):
        assert seen[how, False] > 0, how


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_entry_agrees_whatever_is_done_to_its_gold_answer(category: str) -> None:
    """The whole sweep; -s says of how many replies."""
    check_gold(category, every=1)
    spoilt = check_spoilt(category, 1, Random(category))
    texts = check_texts(category, 3, Random(category), more=20)
    right = sum(count for (_, valid), count in (spoilt + texts).items() if valid)
    sys.stdout.write(f"{category}: {sum((spoilt + texts).values())} replies, {right} right\n")
