"""Advantages of groups against the papers' formulas in plain Python, and their invariances."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError, CreditConfig
from rest_mega.credit.advantages import BATCH_METHODS, METHODS, advantages, has_signal

FEW = settings(max_examples=40, deadline=None)
ALL = pytest.mark.parametrize("method", METHODS)
REWARD = st.one_of(st.sampled_from([-3.0, 0.0, 0.1, 1.0, 4.0]), st.floats(-100, 100))
GROUP = st.lists(REWARD, min_size=2, max_size=8)


def reference(group: list[float], method: str) -> list[float]:
    """The formulas of the papers for one group of at least two."""
    if len(set(group)) == 1:
        return [0.0] * len(group)
    mean = statistics.fmean(group)
    if method == "grpo":
        return [(r - mean) / (statistics.stdev(group) + 1e-6) for r in group]
    if method == "dr_grpo":
        return [r - mean for r in group]
    others = [[r for m, r in enumerate(group) if m != n] for n in range(len(group))]
    return [r - statistics.fmean(other) for r, other in zip(group, others, strict=True)]


@ALL
@FEW
@given(group=GROUP)
def test_advantages_are_the_formula_of_the_paper(method: str, group: list[float]) -> None:
    (found,) = advantages(np.array([group]), method)
    # Rewards that differ by rounding alone lose their digits in the subtraction of the mean.
    scale = max(abs(r) for r in group) * 1e-9 + 1e-12
    noise = scale / (statistics.stdev(group) + 1e-6) if method == "grpo" else scale
    assert found == pytest.approx(reference(group, method), rel=1e-5, abs=noise)


@ALL
@FEW
@given(group=GROUP, order=st.randoms(use_true_random=False))
def test_a_permuted_group_has_permuted_advantages(
    method: str, group: list[float], order: object
) -> None:
    shuffled = list(range(len(group)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    (found,) = advantages(np.array([group]), method)
    (again,) = advantages(np.array([group])[:, shuffled], method)
    assert again == pytest.approx(found[shuffled], rel=1e-4, abs=1e-6)


@ALL
@FEW
@given(groups=st.lists(st.lists(REWARD, min_size=3, max_size=3), min_size=1, max_size=4))
def test_groups_do_not_know_of_each_other(method: str, groups: list[list[float]]) -> None:
    together = advantages(np.array(groups), method)
    apart = [advantages(np.array([group]), method)[0].tolist() for group in groups]
    assert together.tolist() == apart


@ALL
@FEW
@given(group=st.lists(st.integers(-50, 50), min_size=2, max_size=8), shift=st.integers(-50, 50))
def test_a_constant_added_to_a_group_changes_nothing_and_advantages_cancel(
    method: str, group: list[int], shift: int
) -> None:
    (found,) = advantages(np.array([group], np.float64), method)
    (shifted,) = advantages(np.array([group], np.float64) + shift, method)
    assert shifted == pytest.approx(found, rel=1e-5, abs=1e-5)
    assert found.sum() == pytest.approx(0, abs=1e-4)


@FEW
@given(group=st.lists(st.integers(-50, 50), min_size=2, max_size=8), factor=st.floats(0.5, 20))
def test_a_common_factor_cancels_in_grpo_and_stays_in_the_others(
    group: list[int], factor: float
) -> None:
    rewards_PG = np.array([group], np.float64)
    for method, kept in (("grpo", 1.0), ("dr_grpo", factor), ("rloo", factor)):
        scaled, plain = advantages(rewards_PG * factor, method), advantages(rewards_PG, method)
        assert scaled == pytest.approx(plain * kept, rel=1e-4, abs=1e-4)


@ALL
@FEW
@given(reward=REWARD, siblings=st.integers(2, 9))
def test_equal_rewards_have_no_signal_and_no_advantage(
    method: str, reward: float, siblings: int
) -> None:
    rewards_PG = np.full((1, siblings), reward)
    assert has_signal(rewards_PG, method).tolist() == [False]
    assert advantages(rewards_PG, method).tolist() == [[0.0] * siblings]


@ALL
@FEW
@given(reward=REWARD)
def test_a_group_of_one_keeps_its_reward(method: str, reward: float) -> None:
    rewards_PG = np.array([[reward], [0.0]])
    assert advantages(rewards_PG, method).tolist() == rewards_PG.astype(np.float32).tolist()
    assert has_signal(rewards_PG, method).tolist() == [reward != 0, False]


@ALL
@FEW
@given(groups=st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=1, max_size=4))
def test_a_group_without_signal_is_one_of_equal_rewards(
    method: str, groups: list[list[float]]
) -> None:
    signal_P = has_signal(np.array(groups), method)
    assert signal_P.tolist() == [len(set(group)) > 1 for group in groups]
    assert not advantages(np.array(groups), method)[~signal_P].any()


def test_the_authors_example_of_grpo() -> None:
    found = advantages(np.array([[4.0, 1.0, -2.0]]), "grpo")
    assert found[0] == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)


@ALL
def test_no_groups_have_no_advantages(method: str) -> None:
    assert advantages(np.zeros((0, 4)), method).shape == (0, 4)
    assert has_signal(np.zeros((0, 4)), method).tolist() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_must_be_finite(bad: float) -> None:
    for function in (advantages, has_signal):
        with pytest.raises(ConfigError, match="a reward is not finite"):
            function(np.array([[1.0, bad]]), "grpo")


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_rewards_must_be_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must be \[P, G\] with G >= 1"):
        advantages(np.zeros(shape), "grpo")


def test_the_config_knows_the_methods_and_others_are_answered_with_the_nearest() -> None:
    for method in (*METHODS, *BATCH_METHODS):
        CreditConfig(advantage=method)
    with pytest.raises(ConfigError, match=r"credit\.advantage='drgrpo' .* nearest: dr_grpo"):
        advantages(np.zeros((1, 2)), "drgrpo")


# ------------------------------------------------------------------ REINFORCE++

GLOBAL = pytest.mark.parametrize("method", BATCH_METHODS)
WHOLE = st.integers(2, 5).flatmap(
    lambda siblings: st.lists(
        st.lists(st.integers(-9, 9), min_size=siblings, max_size=siblings), min_size=1, max_size=6
    )
)


def global_reference(groups: list[list[int]], method: str) -> list[list[float]]:
    """Equations of REINFORCE++: minus the mean of the batch or the group, over the std of what
    that leaves in the batch."""
    flat = [float(r) for group in groups for r in group]
    mean = statistics.fmean(flat)
    means = [mean if method == "reinforce++" else statistics.fmean(group) for group in groups]
    centred = [[r - m for r in group] for group, m in zip(groups, means, strict=True)]
    std = statistics.pstdev([c for row in centred for c in row], 0.0)
    return [[c / std if std > 0 else 0.0 for c in row] for row in centred]


@GLOBAL
@FEW
@given(groups=WHOLE)
def test_global_advantages_are_the_formula_of_the_paper(
    method: str, groups: list[list[int]]
) -> None:
    found = advantages(np.array(groups, np.float64), method)
    np.testing.assert_allclose(found, global_reference(groups, method), rtol=1e-5, atol=1e-6)


@GLOBAL
@FEW
@given(groups=WHOLE, replicas=st.integers(1, 3), order=st.randoms(use_true_random=False))
def test_a_share_of_the_batch_has_its_advantages_to_the_bit_in_whatever_order_the_batch_comes(
    method: str, groups: list[list[int]], replicas: int, order: object
) -> None:
    batch_PG = np.array(groups, np.float64) / 7
    whole = advantages(batch_PG, method)
    shuffled = list(range(len(batch_PG)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for r in range(replicas):
        mine = slice(r, None, replicas)
        share = advantages(batch_PG[mine], method, batch_PG[shuffled])
        assert share.tolist() == whole[mine].tolist()


@GLOBAL
@FEW
@given(groups=WHOLE, shift=st.integers(-50, 50), factor=st.integers(1, 20))
def test_a_constant_and_a_factor_of_all_rewards_cancel_in_the_batch(
    method: str, groups: list[list[int]], shift: int, factor: int
) -> None:
    rewards_PG = np.array(groups, np.float64)
    moved = advantages(rewards_PG * factor + shift, method)
    np.testing.assert_allclose(moved, advantages(rewards_PG, method), rtol=1e-5, atol=1e-5)


def test_under_the_global_mean_equal_siblings_carry_signal_until_all_rewards_are_equal() -> None:
    rewards_PG = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert has_signal(rewards_PG, "reinforce++").tolist() == [True] * 3
    assert has_signal(rewards_PG, "reinforce++-baseline").tolist() == [False, False, True]
    assert advantages(rewards_PG, "reinforce++").tolist() == [[1, 1], [-1, -1], [1, -1]]
    assert has_signal(np.ones((3, 2)), "reinforce++").tolist() == [False] * 3
    assert not advantages(np.full((3, 2), 0.1), "reinforce++").any()
    assert advantages(np.array([[3.0], [1.0]]), "reinforce++").tolist() == [[1], [-1]]


def test_a_baseline_needs_siblings() -> None:
    with pytest.raises(ConfigError, match="samples_per_prompt to 2 or more"):
        advantages(np.array([[3.0], [1.0]]), "reinforce++-baseline")
