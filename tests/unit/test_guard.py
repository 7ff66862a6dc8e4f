"""Limits, the assertion on ids and the drift of texts, each against a batch made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ConfigError, GuardConfig
from rest_mega.guard import Gap, check_ids, distance, drifted_turns
from rest_mega.records import Prompt, Trajectory, Turn
from rest_mega.trainer.packing import pack
from tests.support.models import random_samples
from tests.support.rollouts import END, TOKENIZER, reply_ids

SAMPLES = random_samples(6)


def packed() -> Any:
    return [pack(SAMPLES[:3], 64, count=3, pad_multiple=2), pack(SAMPLES[3:], 64, count=4)]


def test_a_limit_is_crossed_by_what_lies_above_it_and_by_what_is_no_number() -> None:
    limits = GuardConfig(mean=0.1, p99=1.0, max=None)
    assert Gap(0.1, 1.0, 50.0).crossed(limits) == []
    (told,) = Gap(0.1, 1.25, 50.0).crossed(limits)
    assert told == (
        "the 99th percentile of |trainer - engine| log-prob is 1.25 nats, guard.p99=1 allows 1"
    )
    assert len(Gap(np.inf, np.inf, np.inf).crossed(limits)) == 2
    assert len(Gap(np.nan, np.nan, np.nan).crossed(replace(limits, max=9.0))) == 3
    assert Gap(9, 9, 9).crossed(GuardConfig(mean=None, p99=None)) == []
    with pytest.raises(ConfigError, match=r"guard\.p99=0\.0 must be positive.*null switches"):
        GuardConfig(p99=0.0)


def test_a_log_prob_that_is_no_number_is_infinitely_far() -> None:
    nan, inf = np.nan, np.inf
    trainer, engine = np.float32([0, nan, -inf, -inf, -2]), np.float32([0, 0, -1, -inf, nan])
    assert distance(trainer, engine).tolist() == [0, inf, inf, inf, inf]


def test_packed_samples_are_found_as_they_were_whatever_the_packing() -> None:
    check_ids(SAMPLES, packed())
    check_ids([], [pack([], 64, count=2)])


@pytest.mark.parametrize("name", ["ids_T", "targets_T", "mask_T", "logprobs_T"])
def test_one_changed_token_of_a_micro_batch_is_found(name: str) -> None:
    parts = packed()
    batch = next(b for b in parts[1] if b.mask_T.any())
    at = int(np.flatnonzero(batch.mask_T)[0])
    values = getattr(batch, name).copy()
    values[at] = not values[at] if name == "mask_T" else values[at] + 1
    parts[1] = [replace(b, **{name: values}) if b is batch else b for b in parts[1]]
    with pytest.raises(AssertionError, match=r"sample \d: .* differ from what was sampled"):
        check_ids(SAMPLES, parts)


def test_a_sample_that_is_missing_or_twice_there_is_found() -> None:
    first, second = packed()
    full = next(b for b in second if b.mask_T.any())
    for parts in ([first], [first, [b for b in second if b is not full]], [first, [*second, full]]):
        with pytest.raises(AssertionError, match=r"samples|were packed"):
            check_ids(SAMPLES, parts)


def trajectory(*turns: list[int], cut: bool = False) -> Trajectory:
    """A prompt of two tokens, and the turns one after another."""
    ids, spans, turn_T = [1, 2], [], [-1, -1]
    for number, sampled in enumerate(turns):
        ended = not (cut and number == len(turns) - 1)
        text = TOKENIZER.decode(sampled[:-1] if ended else sampled)
        spans.append(Turn(len(ids), len(ids) + len(sampled), text, True, ended))
        ids, turn_T = ids + sampled, turn_T + [number] * len(sampled)
    which_T = np.array(turn_T, np.int32)
    return Trajectory(
        prompt=Prompt("p", ()),
        sibling=0,
        ids_T=np.array(ids, np.int32),
        logprobs_T=np.float32(which_T >= 0) * -0.5,
        mask_T=which_T >= 0,
        turn_T=which_T,
        version_T=which_T,
        turns=tuple(spans),
        stop="answered",
    )


def test_a_turn_drifts_when_its_text_has_other_ids() -> None:
    own = reply_ids("The total is 12.")
    letters = [i for c in "total" for i in TOKENIZER.encode(c)]
    assert TOKENIZER.decode(letters) == "total"
    assert len(TOKENIZER.encode("total")) < len(letters)
    assert drifted_turns(trajectory(own, own), TOKENIZER) == 0
    assert drifted_turns(trajectory(own, [*letters, END]), TOKENIZER) == 1
    assert drifted_turns(trajectory(own[:-1], cut=True), TOKENIZER) == 0


def test_a_sample_must_be_its_trajectory_token_for_token() -> None:
    t = trajectory(reply_ids("The total is 12."))
    sample = replace(
        SAMPLES[0],
        ids_T=t.ids_T,
        mask_T=t.mask_T,
        logprobs_T=t.logprobs_T,
        regions_T=np.zeros(len(t.ids_T), np.int8),
    )
    check_ids([sample], [pack([sample], 64)], [sample], [t])
    other = replace(sample, ids_T=sample.ids_T + (np.arange(len(t.ids_T)) == 4).astype(np.int32))
    with pytest.raises(AssertionError, match=r"trajectory 0: ids differ .* at token 4"):
        check_ids([other], [pack([other], 64)], [other], [t])
    with pytest.raises(ValueError, match="zip"):
        check_ids([sample], [pack([sample], 64)], [sample], [])
