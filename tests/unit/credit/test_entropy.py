"""The running mean of region entropies against the recurrence written out."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.credit.entropy import UNKNOWN_ENTROPY, EntropyTracker
from rest_mega.dialects import Region

FEW = settings(max_examples=40, deadline=None)
K = len(Region)
Step = list[tuple[float, int]]
"""(mean entropy, tokens) of every region."""


def some_step(seed: int) -> Step:
    """Entropies from none to ten nats; about a third of the regions without tokens."""
    r = random.Random(seed)
    counts = [0, 0, 1, 2, 3, 50]
    return [(r.choice([0.0, r.random(), r.uniform(0, 10)]), r.choice(counts)) for _ in Region]


STEP = st.integers(0, 1 << 32).map(some_step)
STEPS = st.lists(STEP, max_size=6)
MOMENTUM = st.sampled_from([0.0, 0.5, 0.9, 0.99])


def tracked(steps: list[Step], momentum: float) -> EntropyTracker:
    tracker = EntropyTracker(momentum)
    for step in steps:
        mean_K, count_K = np.array(step).T
        tracker.update((mean_K * count_K).astype(np.float64), count_K)
    return tracker


def reference(steps: list[Step], momentum: float) -> list[float]:
    """The running means, region by region in plain Python."""
    means: list[float | None] = [None] * K
    for step in steps:
        for k, (mean, count) in enumerate(step):
            if count:
                old = means[k]
                means[k] = mean if old is None else momentum * old + (1 - momentum) * mean
    seen = [mean for mean in means if mean is not None]
    default = sum(seen) / len(seen) if seen else UNKNOWN_ENTROPY
    return [default if mean is None else mean for mean in means]


@FEW
@given(steps=STEPS, momentum=MOMENTUM)
def test_the_running_mean_is_the_recurrence(steps: list[Step], momentum: float) -> None:
    expected = reference(steps, momentum)
    assert tracked(steps, momentum).means_K == pytest.approx(expected, rel=1e-5, abs=1e-30)


@FEW
@given(before=STEPS, after=STEPS, momentum=MOMENTUM)
def test_a_state_through_json_goes_on_as_if_nothing_had_happened(
    before: list[Step], after: list[Step], momentum: float
) -> None:
    whole, resumed = tracked([*before, *after], momentum), EntropyTracker(momentum)
    saved = tracked(before, momentum).state()
    resumed.load(json.loads(json.dumps(saved, allow_nan=False)))
    assert resumed.state() == saved
    for step in after:
        mean_K, count_K = np.array(step).T
        resumed.update((mean_K * count_K).astype(np.float64), count_K)
    assert resumed.state() == whole.state()
    assert resumed.means_K.tolist() == whole.means_K.tolist()


@FEW
@given(step=STEP)
def test_the_first_step_counts_in_full(step: Step) -> None:
    expected_K = tracked([step], 0.0).means_K
    assert tracked([step], 0.99).means_K == pytest.approx(expected_K, rel=1e-6)


def test_before_any_step_all_regions_are_alike() -> None:
    assert EntropyTracker(0.9).means_K.tolist() == [UNKNOWN_ENTROPY] * K


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_that_are_not_finite_are_left_out_region_by_region(bad: float) -> None:
    tracker = EntropyTracker(0.5)
    tracker.update(np.full(K, 4.0), np.full(K, 2.0))
    sum_K = np.full(K, 8.0)
    sum_K[Region.ANSWER] = bad
    tracker.update(sum_K, np.full(K, 2.0))
    expected = np.full(K, 3.0)
    expected[Region.ANSWER] = 2.0
    assert tracker.means_K.tolist() == expected.tolist()


def test_an_entropy_that_rounding_made_negative_counts_as_none() -> None:
    tracker = EntropyTracker(0.0)
    tracker.update(np.full(K, -1e-7), np.ones(K))
    assert tracker.means_K.tolist() == [0.0] * K


def test_a_state_of_other_regions_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"entropies of 3 regions, this version {K}"):
        EntropyTracker(0.9).load({"means": [0.1, None, 0.3]})


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0])
def test_momentum_lies_between_nought_and_one(momentum: float) -> None:
    with pytest.raises(ConfigError, match=rf"momentum={momentum} must be in \[0, 1\)"):
        EntropyTracker(momentum)
