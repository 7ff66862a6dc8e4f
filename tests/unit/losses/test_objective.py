"""The objective is one sum over the whole batch, however the batch is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import LossConfig
from rest_mega.losses.objective import (
    AGGREGATIONS,
    POLICY_SUMS,
    Report,
    Totals,
    denominators,
    penalty_objective,
    policy_objective,
    supervised_objective,
    token_factors,
)
from rest_mega.losses.policy import SURROGATES, Sequences

CONFIG = LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
COLUMNS = ("logprob", "entropy", "old", "advantages", "weights")


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, rows)
    columns = {
        "logprob": old + rng.normal(0, 0.4, rows),
        "entropy": rng.random(rows) * 3,
        "old": old,
        "advantages": rng.normal(size=rows),
        "weights": rng.random(rows) * 2,
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def objective(
    part: dict[str, torch.Tensor], denominator: float
) -> tuple[torch.Tensor, Report, Report]:
    rows = len(part["old"])
    alone = Sequences(torch.arange(rows), torch.ones(rows, dtype=torch.int64))
    return policy_objective(*(part[name] for name in COLUMNS), alone, CONFIG, denominator)


def by_hand(whole: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
    """(loss, mean of every reported statistic), row by row."""
    rows = list(zip(*(whole[name].tolist() for name in COLUMNS), strict=True))
    losses, means = 0.0, dict.fromkeys(POLICY_SUMS, 0.0)
    for logprob, entropy, old, advantage, weight in rows:
        ratio = np.exp(logprob - old)
        bounded = min(max(ratio, 0.8), 1.3)
        value = max(-advantage * ratio, -advantage * bounded)
        clipped = -advantage * bounded > -advantage * ratio
        if advantage < 0 and value > -3 * advantage:
            value, clipped = -3 * advantage, True
        losses += weight * value
        row = (value, clipped, ratio, old - logprob, entropy)
        for name, x in zip(POLICY_SUMS, row, strict=True):
            means[name] += float(x) / len(rows)
    return losses / float(whole["weights"].sum()), means


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_loss_gradient_and_statistics_do_not_depend_on_the_cut(rows: int, cuts: list[int]) -> None:
    whole = batch(rows)
    whole["logprob"].requires_grad_()
    denominator = float(whole["weights"].sum())
    want_loss, want_means = by_hand({name: column.detach() for name, column in whole.items()})
    bounds = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    parts = [
        objective({n: c[a:b] for n, c in whole.items()}, denominator)
        for a, b in itertools.pairwise(bounds)
    ]
    loss = torch.stack([part[0] for part in parts]).sum()
    assert float(loss.detach()) == pytest.approx(want_loss)
    (gradient,) = torch.autograd.grad(loss, whole["logprob"])
    (uncut,) = torch.autograd.grad(objective(whole, denominator)[0], whole["logprob"])
    torch.testing.assert_close(gradient, uncut)
    for name in POLICY_SUMS:
        total, count = torch.stack([part[1][name] for part in parts]).sum(0).tolist()
        assert count == rows
        assert total / count == pytest.approx(want_means[name], abs=1e-9)


PENALTIES = ("logprob", "entropy", "old", "reference", "drift", "shares")


def penalties(rows: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    reference, drift, shares = rng.normal(-2, 1, rows), rng.random(rows), rng.random(rows)
    columns = {"reference": reference, "drift": drift * (drift > 0.7), "shares": shares}
    return batch(rows) | {name: torch.from_numpy(column) for name, column in columns.items()}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalties_are_their_formula_and_their_slopes_however_they_are_cut(estimator: str) -> None:
    config = LossConfig(kl=0.3, kl_estimator=estimator, entropy_bonus=0.2)
    whole = penalties(12)
    moving = [whole[name].requires_grad_() for name in ("logprob", "entropy")]
    parts = [
        penalty_objective(*(whole[n][a:b] for n in PENALTIES), config, 7.0)
        for a, b in ((0, 5), (5, 5), (5, 12))
    ]
    loss = torch.stack([part[0] for part in parts]).sum()
    slopes = torch.autograd.grad(loss, moving)
    want, by_logprob, by_entropy, far = 0.0, [], [], 0.0
    for lp, h, old, ref, drift, share in zip(*(whole[n].tolist() for n in PENALTIES), strict=True):
        d = lp - ref
        k = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
        slope = {"k1": 1.0, "k2": d, "k3": 1 - np.exp(-d)}[estimator]
        want += share * (0.3 * k - 0.2 * h + drift * abs(lp - old)) / 7
        by_logprob.append(share * (0.3 * slope + drift * np.sign(lp - old)) / 7)
        by_entropy.append(-0.2 * share / 7)
        far += np.exp(-d) - 1 + d
    assert float(loss.detach()) == pytest.approx(want, rel=1e-12)
    for got, expected in zip(slopes, (by_logprob, by_entropy), strict=True):
        assert got.tolist() == pytest.approx(expected, rel=1e-9)
    measured = torch.stack([part[1]["reference_kl"] for part in parts]).sum(0)
    assert measured.tolist() == pytest.approx([far, 12.0])


def test_without_a_reference_nothing_is_measured_and_no_kl_can_be_asked_for() -> None:
    columns = [None if n == "reference" else penalties(3)[n] for n in PENALTIES]
    _, sums = penalty_objective(*columns, LossConfig(), 1.0)
    assert sums == {}
    with pytest.raises(AssertionError, match=r"loss\.kl needs"):
        penalty_objective(*columns, LossConfig(kl=0.1), 1.0)


def test_penalties_count_tokens_where_the_surrogate_counts_weights() -> None:
    totals, silent = Totals(2.5, 8.0, 3.0), Totals(0.0, 8.0, 3.0)
    configs = {n: LossConfig(aggregation=n, fixed_length=4) for n in AGGREGATIONS}
    pairs = {n: denominators(totals, config) for n, config in configs.items()}
    assert pairs == {
        "weighted-token-mean": (2.5, 8.0),
        "token-mean": (8.0, 8.0),
        "sequence-mean": (3.0, 3.0),
        "fixed": (12.0, 12.0),
    }
    assert denominators(silent, LossConfig()) == (1.0, 8.0)


def test_weights_scale_a_rows_gradient_and_nothing_else() -> None:
    whole = batch(12)
    whole["logprob"].requires_grad_()
    (before,) = torch.autograd.grad(objective(whole, 5.0)[0], whole["logprob"])
    factor = torch.linspace(0, 3, 12, dtype=torch.float64)
    heavier = whole | {"weights": whole["weights"] * factor}
    loss, sums, _ = objective(heavier, 5.0)
    (after,) = torch.autograd.grad(loss, whole["logprob"])
    torch.testing.assert_close(after, before * factor)
    for name, pair in objective(whole, 5.0)[1].items():
        assert torch.equal(sums[name], pair)


def test_no_rows_are_a_zero_that_backward_can_walk() -> None:
    parameter = torch.ones(3, requires_grad=True)
    empty = {name: parameter[:0] if name == "logprob" else torch.empty(0) for name in COLUMNS}
    loss, sums, maxima = objective(empty, 5.0)
    supervised, _, _ = supervised_objective(empty["logprob"], empty["weights"], 5.0)
    (loss + supervised).backward()
    assert float(loss.detach()) == float(supervised.detach()) == 0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0, 0, 0]
    assert all(pair.tolist() == [0, 0] for pair in sums.values())
    assert maxima == {}


def test_statistics_carry_no_gradient_and_are_summed_in_fp64() -> None:
    part = {name: column.float() for name, column in batch(9).items()}
    part["logprob"].requires_grad_()
    _, sums, _ = objective(part, 1.0)
    assert all(pair.dtype == torch.float64 and not pair.requires_grad for pair in sums.values())


def test_the_supervised_objective_is_the_weighted_cross_entropy() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, weights = torch.arange(7), torch.linspace(0, 2, 7, dtype=torch.float64)
    logprob_R = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss, _, _ = supervised_objective(logprob_R, weights, float(weights.sum()))
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert float(loss) == pytest.approx(float((each * weights).sum() / weights.sum()))


# ------------------------------------------------------------------ aggregation

WEIGHTS = [[0.5, 1.5, 1.0], [2.0], [0.25, 0.75, 1.0, 2.0]]
"""Of the trained tokens of three sequences."""
LOSSES = [[1.0, -2.0, 3.0], [0.5], [-1.0, 4.0, 0.0, 2.0]]
ADVANTAGES = [1.0, -1.0, 0.5]
BY_HAND = {
    # (0.5 - 3 + 3 + 1 - 0.25 + 3 + 0 + 4) = 8.25 over ...
    "weighted-token-mean": 8.25 / 9.0,
    "token-mean": 8.25 / 8,
    "sequence-mean": (0.5 / 3 + 1.0 / 1 + 6.75 / 4) / 3,
    "fixed": 8.25 / (3 * 16),
}


def packed(sequences: list[int], values: list[list[float]]) -> tuple[np.ndarray, ...]:
    """(values, mask, sample) of packed sequences, an untrained token before each and padding
    after."""
    rows: list[tuple[float, bool, int]] = []
    for i in sequences:
        rows += [(9.0, False, i), *((v, True, i) for v in values[i])]
    rows += [(9.0, False, -1)]
    columns = tuple(np.array(column) for column in zip(*rows, strict=True))
    return columns[0].astype(np.float32), columns[1], columns[2].astype(np.int32)


@pytest.mark.parametrize("order", [[[0, 1, 2]], [[2], [0, 1]], [[1], [], [2, 0]]])
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations_are_their_formulas_at_any_cut(name: str, order: list[list[int]]) -> None:
    config = LossConfig(aggregation=name, fixed_length=16)
    total, parts = 0.0, []
    for members in order:
        weights_T, mask_T, sample_T = packed(members, WEIGHTS)
        factors_T, totals = token_factors(weights_T, mask_T, sample_T, config)
        losses_T = packed(members, LOSSES)[0]
        assert not factors_T[~mask_T].any()
        total += float((factors_T * losses_T).sum())
        parts.append((totals.weights, totals.tokens, totals.sequences))
    whole = Totals(*np.sum(parts, axis=0).tolist())
    assert whole == Totals(9.0, 8.0, 3.0)
    assert total / AGGREGATIONS[name](whole, config) == pytest.approx(BY_HAND[name], rel=1e-6)


def test_sequences_without_a_trained_token_are_not_counted() -> None:
    mask_T = np.array([False, False, True, False])
    _, totals = token_factors(
        np.ones(4, np.float32), mask_T, np.array([0, 0, 1, -1], np.int32), LossConfig()
    )
    assert totals == Totals(1.0, 1.0, 1.0)


def test_under_weights_of_mean_one_the_token_means_agree() -> None:
    rng = np.random.default_rng(0)
    weights = [w / np.mean(w) for w in (rng.random(n) + 0.1 for n in (3, 1, 9))]
    _, totals = token_factors(*packed([0, 1, 2], [w.tolist() for w in weights]), LossConfig())
    both = [AGGREGATIONS[n](totals, LossConfig()) for n in ("weighted-token-mean", "token-mean")]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("policy", SURROGATES)
def test_every_surrogate_under_every_aggregation_is_its_rows_times_their_factors(
    policy: str, name: str
) -> None:
    """In one piece and cut into sequences: the same loss, and each row's own gradient scaled."""
    config = LossConfig(policy=policy, aggregation=name, clip_low=0.1, clip_high=0.1)
    weights_T, mask_T, sample_T = packed([0, 1, 2], WEIGHTS)
    factors_T, totals = token_factors(weights_T, mask_T, sample_T, config)
    denominator = AGGREGATIONS[name](totals, config)
    part = {n: c.requires_grad_(n == "logprob") for n, c in batch(8).items()}
    part["weights"] = torch.from_numpy(factors_T[mask_T]).double()
    index_R = torch.from_numpy(sample_T[mask_T].astype(np.int64))
    part["advantages"] = torch.tensor(ADVANTAGES, dtype=torch.float64)[index_R]

    def loss(rows: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        columns = [part[n][rows] for n in COLUMNS]
        return policy_objective(*columns, sequences, config, denominator)[0]

    everything = torch.ones(8, dtype=torch.bool)
    whole = loss(everything, Sequences(index_R, torch.bincount(index_R)))
    cut = sum(
        loss(
            index_R == i, Sequences(torch.zeros(len(w), dtype=torch.int64), torch.tensor([len(w)]))
        )
        for i, w in enumerate(WEIGHTS)
    )
    torch.testing.assert_close(cut, whole)
    (slope,) = torch.autograd.grad(whole, part["logprob"], retain_graph=True)
    (slope_of_cut,) = torch.autograd.grad(cut, part["logprob"])
    torch.testing.assert_close(slope_of_cut, slope)
    own, _ = SURROGATES[policy](
        part["logprob"], part["old"], part["advantages"], config,
        Sequences(index_R, torch.bincount(index_R)),
    )  # fmt: skip
    (unweighted,) = torch.autograd.grad(own.sum(), part["logprob"])
    torch.testing.assert_close(slope, unweighted * part["weights"] / denominator)
