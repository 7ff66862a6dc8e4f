"""What single tokens make of their advantage, against sorting all tokens of all ranks in one
place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError, CreditConfig, LossConfig
from rest_mega.credit.advantages import TOKENS, lots, token_rule
from rest_mega.credit.ranking import kth_largest, ordered, quantile
from rest_mega.losses.policy import SURROGATES, Sequences
from rest_mega.records import Total, TrainedRows

FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 10**6)


def together(world: int, work: Callable[[int, Total], Any]) -> list[Any]:
    """`work(rank, total)` of every rank, in threads that meet at each sum."""
    barrier, given_ = threading.Barrier(world, timeout=10), [np.zeros(0)] * world

    def on(rank: int) -> Any:
        def total(values: np.ndarray) -> np.ndarray:
            given_[rank] = values
            barrier.wait()
            result = np.sum(given_, axis=0)
            barrier.wait()
            return np.asarray(result)

        return work(rank, total)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on, range(world)))


def rows(count: int, seed: int = 0) -> TrainedRows:
    """Rows with equal entropies, zero weights and zero advantages among them."""
    rng = np.random.default_rng(seed)
    return TrainedRows(
        ids_R=rng.integers(0, 50, count).astype(np.int32),
        positions_R=np.arange(count, dtype=np.int32),
        rollout_R=rng.normal(-2, 1, count).astype(np.float32),
        logprob_R=rng.normal(-2, 2, count).astype(np.float32),
        entropy_R=rng.choice(rng.random(max(count // 2, 1)) * 3, count).astype(np.float32),
        advantages_R=(rng.normal(size=count) * (rng.random(count) < 0.8)).astype(np.float32),
        weights_R=(rng.random(count) * (rng.random(count) < 0.8)).astype(np.float32),
    )


def take(whole: TrainedRows, chosen: Any) -> TrainedRows:
    return TrainedRows(*(getattr(whole, f.name)[chosen] for f in fields(TrainedRows)))


def due(config: CreditConfig, whole: TrainedRows, world: int, seed: int, step: int = 3) -> Any:
    """(factor_R, drift_R) of the whole batch, its rows dealt to the ranks at random."""
    rank_R = np.random.default_rng(seed).integers(0, world, len(whole.ids_R))
    rule, due_2R = token_rule(config, step), np.full((2, len(rank_R)), np.nan, np.float32)
    parts = together(world, lambda rank, total: rule(take(whole, rank_R == rank), total))
    for rank, part in enumerate(parts):
        due_2R[:, rank_R == rank] = part.factor_R, part.drift_R
    return due_2R


def factors(config: CreditConfig, whole: TrainedRows, world: int, seed: int, step: int = 3) -> Any:
    """The factor_R of a rule that penalises nothing."""
    factor_R, drift_R = due(config, whole, world, seed, step)
    assert not drift_R.any()
    return factor_R


# ------------------------------------------------------------------ thresholds


@FEW
@given(
    keys=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=30),
    k=st.integers(1, 35),
    world=st.integers(1, 3),
    seed=SEEDS,
)
def test_the_kth_largest_over_all_ranks_is_that_of_all_keys_sorted(
    keys: list[int], k: int, world: int, seed: int
) -> None:
    keys_R = np.array(keys, dtype=np.uint32)
    rank_R = np.random.default_rng(seed).integers(0, world, len(keys))
    found = together(world, lambda r, total: kth_largest(keys_R[rank_R == r], k, total))
    want = sorted(keys, reverse=True)[k - 1] if k <= len(keys) else 0
    assert found == [want] * world


@FEW
@given(
    values=st.lists(st.floats(0, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40),
    percent=st.sampled_from([1, 50, 99, 100]),
    world=st.integers(1, 3),
)
def test_a_quantile_over_all_ranks_is_numpy_s_of_all_values(
    values: list[float], percent: int, world: int
) -> None:
    array = np.array(values, np.float32)
    found = together(world, lambda r, total: quantile(array[r::world], percent, total))
    # In whole hundredths of ranks: percent / 100 may round to just above it.
    want = np.sort(array)[-(-percent * len(array) // 100) - 1]
    assert found == [float(want)] * world
    near = np.quantile(array, percent / 100 - 1e-9, method="inverted_cdf")
    assert near == want


@FEW
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_keys_are_in_the_order_of_their_values(values: list[float]) -> None:
    array, keys = np.array(values, np.float32), ordered(np.array(values, np.float32))
    np.testing.assert_array_equal(keys[:, None] < keys, array[:, None] < array)


# ------------------------------------------------------------------ the rules


@FEW
@given(count=st.integers(0, 60), share=st.floats(0.01, 1), world=st.integers(1, 3), seed=SEEDS)
def test_high_entropy_keeps_the_share_of_weighted_tokens_that_sorting_finds(
    count: int, share: float, world: int, seed: int
) -> None:
    whole = rows(count, seed)
    config = CreditConfig(tokens="high-entropy", high_entropy_share=share)
    factor_R = factors(config, whole, world, seed)
    weighted = sorted(whole.entropy_R[whole.weights_R > 0].tolist(), reverse=True)
    kept = max(1, round(share * len(weighted)))
    least = weighted[kept - 1] if weighted else -np.inf
    assert factor_R.tolist() == [float(h >= least) for h in whole.entropy_R.tolist()]


def test_high_entropy_keeps_a_fifth_when_no_two_are_equal() -> None:
    entropy_R = np.random.default_rng(0).permutation(100).astype(np.float32) / 10
    whole = TrainedRows(
        *(np.ones(100, np.float32),) * 4, entropy_R, *(np.ones(100, np.float32),) * 2
    )
    factor_R = factors(CreditConfig(tokens="high-entropy"), whole, 2, 0)
    assert sorted(entropy_R[factor_R > 0].tolist()) == pytest.approx(np.arange(80, 100) / 10)


@FEW
@given(count=st.integers(0, 60), share=st.floats(0.01, 1), world=st.integers(1, 3), seed=SEEDS)
def test_clip_cov_silences_that_many_of_the_tokens_whose_covariance_is_in_range(
    count: int, share: float, world: int, seed: int
) -> None:
    whole = rows(count, seed)
    config = CreditConfig(
        tokens="clip-cov", clip_cov_share=share, clip_cov_low=0.2, clip_cov_high=2.0
    )
    silent_R = factors(config, whole, world, seed) == 0
    on = whole.weights_R > 0
    logprob, advantage = whole.logprob_R.astype(float), whole.advantages_R.astype(float)
    if not on.any():
        assert not silent_R.any()
        return
    covariance_R = (logprob - logprob[on].mean()) * (advantage - advantage[on].mean())
    inside_R = on & (covariance_R > 0.2) & (covariance_R < 2.0)
    assert not silent_R[~inside_R].any()
    assert silent_R.sum() == min(inside_R.sum(), max(1, round(share * on.sum())))
    assert silent_R.tolist() == (factors(config, whole, 1, 0) == 0).tolist()


@FEW
@given(count=st.integers(0, 60), share=st.floats(0.01, 1), world=st.integers(1, 3), seed=SEEDS)
def test_kl_cov_penalises_the_share_of_weighted_tokens_whose_covariance_sorts_highest(
    count: int, share: float, world: int, seed: int
) -> None:
    whole = rows(count, seed)
    config = CreditConfig(tokens="kl-cov", kl_cov_share=share, kl_cov_coefficient=0.7)
    factor_R, drift_R = due(config, whole, world, seed)
    on = whole.weights_R > 0
    logprob, advantage = whole.logprob_R.astype(float), whole.advantages_R.astype(float)
    means = [float(column[on].mean()) if on.any() else 0.0 for column in (logprob, advantage)]
    covariance_R = (logprob - means[0]) * (advantage - means[1])
    ranked = sorted(covariance_R[on].tolist(), reverse=True)
    least = ranked[max(1, round(share * len(ranked))) - 1] if ranked else np.inf
    close_R = abs(covariance_R - least) <= 1e-6  # equal ones, and what float32 makes equal
    want_R = on & (covariance_R >= least)
    assert factor_R.tolist() == [1.0] * count
    assert ((drift_R > 0) == want_R)[~close_R].all()
    assert (drift_R > 0)[close_R & on].any() == want_R.any()
    assert set(drift_R.tolist()) <= {0.0, float(np.float32(0.7))}


def test_lots_are_uniform_differ_by_step_and_do_not_depend_on_the_order() -> None:
    whole = rows(20_000)
    first, second = lots(whole, 1) / 2**32, lots(whole, 2) / 2**32
    for draws in (first, second):
        assert np.histogram(draws, bins=10, range=(0, 1))[0] == pytest.approx(2000, abs=200)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    order = np.random.default_rng(0).permutation(20_000)
    assert (lots(take(whole, order), 1) / 2**32).tolist() == first[order].tolist()


@FEW
@given(count=st.integers(0, 40), alpha=st.floats(0, 2), kappa=st.floats(1.01, 9), seed=SEEDS)
def test_the_entropy_advantage_is_the_formula_and_keeps_every_sign(
    count: int, alpha: float, kappa: float, seed: int
) -> None:
    whole = rows(count, seed)
    config = CreditConfig(tokens="entropy-advantage", shaping_alpha=alpha, shaping_kappa=kappa)
    shaped_R = whole.advantages_R * factors(config, whole, 2, seed)
    pairs = zip(whole.advantages_R.tolist(), whole.entropy_R.tolist(), strict=True)
    want = [a + min(alpha * h, abs(a) / kappa) for a, h in pairs]
    assert shaped_R == pytest.approx(want, abs=1e-6)
    assert (np.sign(shaped_R) == np.sign(whole.advantages_R)).all()


def test_all_changes_no_advantage() -> None:
    assert factors(CreditConfig(), rows(9), 1, 0).tolist() == [1.0] * 9


def test_an_unknown_rule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(TOKENS)):
        CreditConfig(tokens="other")


# ------------------------------------------------------------------ why a factor will do


@pytest.mark.parametrize("policy", SURROGATES)
def test_a_factor_on_the_advantage_scales_the_surrogate_and_not_its_clipping(policy: str) -> None:
    rng = np.random.default_rng(0)
    old, new, advantage = (torch.from_numpy(rng.normal(size=200)) for _ in range(3))
    factor = torch.from_numpy(rng.random(200) + 0.1)
    surrogate, config = SURROGATES[policy], LossConfig()
    sequences = Sequences(torch.arange(200) % 7, torch.bincount(torch.arange(200) % 7))
    loss, clipped = surrogate(new, old, advantage, config, sequences)
    scaled, still_clipped = surrogate(new, old, factor * advantage, config, sequences)
    torch.testing.assert_close(scaled, factor * loss)
    assert torch.equal(still_clipped, clipped)
