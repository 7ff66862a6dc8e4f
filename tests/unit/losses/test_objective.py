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
    POLICY_MAXIMA,
    POLICY_SUMS,
    Report,
    policy_objective,
    supervised_objective,
)

CONFIG = LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
COLUMNS = ("logprob", "entropy", "old", "rollout", "advantages", "weights")


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, rows)
    columns = {
        "logprob": old + rng.normal(0, 0.4, rows),
        "entropy": rng.random(rows) * 3,
        "old": old,
        "rollout": old + rng.normal(0, 0.05, rows),
        "advantages": rng.normal(size=rows),
        "weights": rng.random(rows) * 2,
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def objective(
    part: dict[str, torch.Tensor], denominator: float
) -> tuple[torch.Tensor, Report, Report]:
    return policy_objective(*(part[name] for name in COLUMNS), CONFIG, denominator)


def by_hand(whole: dict[str, torch.Tensor]) -> tuple[float, dict[str, float], float]:
    """(loss, mean of every reported statistic, largest gap), row by row."""
    rows = list(zip(*(whole[name].tolist() for name in COLUMNS), strict=True))
    losses, means = 0.0, dict.fromkeys(POLICY_SUMS, 0.0)
    for logprob, entropy, old, rollout, advantage, weight in rows:
        ratio = np.exp(logprob - old)
        bounded = min(max(ratio, 0.8), 1.3)
        value = max(-advantage * ratio, -advantage * bounded)
        clipped = -advantage * bounded > -advantage * ratio
        if advantage < 0 and value > -3 * advantage:
            value, clipped = -3 * advantage, True
        losses += weight * value
        row = (value, clipped, ratio, old - logprob, entropy, abs(old - rollout))
        for name, x in zip(POLICY_SUMS, row, strict=True):
            means[name] += float(x) / len(rows)
    gap = max(abs(row[2] - row[3]) for row in rows)
    return losses / float(whole["weights"].sum()), means, gap


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_loss_gradient_and_statistics_do_not_depend_on_the_cut(rows: int, cuts: list[int]) -> None:
    whole = batch(rows)
    whole["logprob"].requires_grad_()
    denominator = float(whole["weights"].sum())
    want_loss, want_means, want_gap = by_hand(
        {name: column.detach() for name, column in whole.items()}
    )
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
    (name,) = POLICY_MAXIMA
    gaps = [float(part[2][name]) for part in parts if name in part[2]]
    assert max(gaps) == pytest.approx(want_gap)


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
    _, sums, maxima = objective(part, 1.0)
    assert all(pair.dtype == torch.float64 and not pair.requires_grad for pair in sums.values())
    assert not any(value.requires_grad for value in maxima.values())


def test_the_supervised_objective_is_the_weighted_cross_entropy() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, weights = torch.arange(7), torch.linspace(0, 2, 7, dtype=torch.float64)
    logprob_R = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss, _, _ = supervised_objective(logprob_R, weights, float(weights.sum()))
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert float(loss) == pytest.approx(float((each * weights).sum() / weights.sum()))
