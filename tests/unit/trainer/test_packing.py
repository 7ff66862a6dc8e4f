"""Packing: every sample once, no bin over its cap, targets shifted by one, bins near the fewest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.records import Microbatch, Sample
from rest_mega.trainer.packing import pack, plan, spread

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def sample(length: int, number: int) -> Sample:
    """A sample in which every field of every token is unlike any other's."""
    rng = np.random.default_rng([length, number])
    return Sample(
        ids_T=rng.integers(1, 2**31 - 1, length + 1).astype(np.int32),
        mask_T=rng.random(length + 1) < 0.5,
        regions_T=rng.integers(0, 11, length + 1).astype(np.int8),
        logprobs_T=rng.normal(size=length + 1).astype(np.float32),
        version_T=np.zeros(length + 1, np.int32),
        advantage=float(rng.normal()),
    )


def members(bins: list[list[int]]) -> list[int]:
    return sorted(i for b in bins for i in b)


@settings(deadline=None)
@given(lengths=LENGTHS, slack=st.integers(0, 60))
def test_every_sample_is_in_one_bin_and_no_bin_is_over_its_cap(
    lengths: list[int], slack: int
) -> None:
    cap = max(lengths, default=1) + slack
    bins = plan(lengths, cap)
    assert members(bins) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in b) for b in bins)
    assert all(0 < total <= cap for total in sums)
    # Best fit opens a bin only where no other has room: any two bins together exceed one.
    assert len(sums) < 2 or sums[0] + sums[1] > cap


@settings(deadline=None)
@given(lengths=LENGTHS, slack=st.integers(0, 60), more=st.integers(0, 40))
def test_spreading_gives_the_count_and_cuts_and_loses_nothing(
    lengths: list[int], slack: int, more: int
) -> None:
    bins = plan(lengths, max(lengths, default=1) + slack)
    largest = max((sum(lengths[i] for i in b) for b in bins), default=0)
    spreaded = spread(bins, lengths, len(bins) + more)
    assert len(spreaded) == len(bins) + more
    assert members(spreaded) == list(range(len(lengths)))
    assert max((sum(lengths[i] for i in b) for b in spreaded), default=0) <= largest
    # A bin is empty only where every other holds a single sample.
    assert all(spreaded) or all(len(b) <= 1 for b in spreaded)


@settings(deadline=None)
@given(
    lengths=LENGTHS, slack=st.integers(0, 60), multiple=st.integers(1, 8), more=st.integers(0, 6)
)
def test_a_micro_batch_is_its_samples_one_after_another_and_padding(
    lengths: list[int], slack: int, multiple: int, more: int
) -> None:
    samples = [sample(n, i) for i, n in enumerate(lengths)]
    cap = max(lengths, default=1) + slack
    count = len(plan(lengths, cap)) + more
    batches = pack(samples, cap, pad_multiple=multiple, count=count)
    assert len(batches) == count
    seen = [i for batch in batches for i in check(batch, samples, cap, multiple)]
    assert sorted(seen) == list(range(len(samples)))


def check(batch: Microbatch, samples: list[Sample], cap: int, multiple: int) -> list[int]:
    """Walks the micro-batch sample by sample; returns which ones it holds."""
    at, seen = 0, []
    while at < len(batch.ids_T) and batch.sample_T[at] >= 0:
        i = int(batch.sample_T[at])
        s, n = samples[i], len(samples[i].ids_T) - 1
        here = slice(at, at + n)
        assert batch.lengths_S[len(seen)] == n
        assert (batch.sample_T[here] == i).all()
        np.testing.assert_array_equal(batch.ids_T[here], s.ids_T[:-1])
        np.testing.assert_array_equal(batch.positions_T[here], np.arange(n))
        for name in ("mask_T", "regions_T", "logprobs_T"):
            np.testing.assert_array_equal(getattr(batch, name)[here], getattr(s, name)[1:])
        np.testing.assert_array_equal(batch.targets_T[here], s.ids_T[1:])
        assert (batch.advantages_T[here] == np.float32(s.advantage)).all()
        assert batch.mask_T[here].sum() == s.trained_tokens
        seen.append(i)
        at += n
    padding = len(batch.ids_T) - at
    assert at <= cap
    assert len(batch.ids_T) % multiple == 0
    assert 0 < padding <= multiple if not seen else padding < multiple
    assert batch.lengths_S.tolist()[len(seen) :] == [padding] * (padding > 0)
    assert (batch.sample_T[at:] == -1).all()
    assert not batch.mask_T[at:].any()
    for name in ("ids_T", "targets_T", "positions_T", "regions_T", "advantages_T", "logprobs_T"):
        array = getattr(batch, name)
        assert len(array) == len(batch.ids_T)
        assert not array[at:].any()
    return seen


@pytest.mark.parametrize("cap", [2048, 4096, 16384])
def test_long_tailed_lengths_fill_their_bins(cap: int) -> None:
    drawn = np.random.default_rng(0).lognormal(6.0, 0.8, 8192)
    lengths = drawn.clip(16, cap).astype(int).tolist()
    fewest = -(-sum(lengths) // cap)
    assert len(plan(lengths, cap)) <= fewest * 1.01 + 1


def test_packing_is_deterministic_and_without_samples_one_filler_trains_nothing() -> None:
    samples = [sample(5, i) for i in range(9)]
    for one, other in zip(pack(samples, 12), pack(samples, 12), strict=True):
        assert one.sample_T.tolist() == other.sample_T.tolist()
    assert pack([], 12) == []
    (filler,) = pack([], 12, pad_multiple=4, count=1)
    assert filler.lengths_S.tolist() == [4]
    assert not filler.mask_T.any()


def test_a_sample_over_the_cap_is_refused_with_both_remedies() -> None:
    with pytest.raises(ValueError, match=r"needs 9 tokens, packing\.tokens is 8: raise packing"):
        pack([sample(3, 0), sample(9, 1)], 8)
    assert len(pack([sample(9, 1)], 9)) == 1


def test_fewer_bins_than_needed_are_refused() -> None:
    with pytest.raises(ValueError, match="2 micro-batches are needed, count=1 were agreed on"):
        pack([sample(5, 0), sample(5, 1)], 8, count=1)
