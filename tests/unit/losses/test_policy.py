"""Surrogates equal hand-written scalars on a grid, and so do their derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from rest_mega.config import LossConfig
from rest_mega.losses.policy import LOG_RATIO_BOUND, SURROGATES, Sequences, log_ratio

OLD = -1.25
RATIOS = [0.01, 0.5, 0.79, 0.81, 0.99, 1.0, 1.01, 1.19, 1.21, 1.29, 1.31, 2.0, 2.9, 3.1, 50.0]
ADVANTAGES = [-2.0, -0.5, 0.0, 0.5, 2.0]
CONFIGS = {
    "plain clip": LossConfig(dual_clip=0.0),
    "clip-higher": LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=0.0),
    "dual clip": LossConfig(dual_clip=3.0),
    "clip-higher and dual clip": LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
}


def alone(rows: int) -> Sequences:
    """Every row a sequence of its own."""
    return Sequences(torch.arange(rows), torch.ones(rows, dtype=torch.int64))


def by_hand(ratio: float, advantage: float, config: LossConfig) -> tuple[float, float]:
    """(loss, its derivative by log pi), case by case from the papers."""
    if advantage > 0:
        if ratio > 1 + config.clip_high:
            return -advantage * (1 + config.clip_high), 0.0
        return -advantage * ratio, -advantage * ratio
    if config.dual_clip and ratio > config.dual_clip:
        return -advantage * config.dual_clip, 0.0
    if ratio < 1 - config.clip_low:
        return -advantage * (1 - config.clip_low), 0.0
    return -advantage * ratio, -advantage * ratio


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi of every ratio, advantage) in all combinations."""
    pairs = [(OLD + math.log(r), a) for r in RATIOS for a in ADVANTAGES]
    logprob_R, advantage_R = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    return logprob_R.requires_grad_(), advantage_R


@pytest.mark.parametrize("name", CONFIGS)
def test_ppo_is_its_cases_in_value_and_derivative(name: str) -> None:
    config = CONFIGS[name]
    logprob_R, advantage_R = grid()
    loss_R, clipped_R = SURROGATES["ppo"](
        logprob_R, torch.full_like(advantage_R, OLD), advantage_R, config, alone(len(advantage_R))
    )
    loss_R.sum().backward()
    assert logprob_R.grad is not None
    want = [by_hand(r, a, config) for r in RATIOS for a in ADVANTAGES]
    values, slopes = torch.tensor(want, dtype=torch.float64).T
    torch.testing.assert_close(loss_R, values)
    torch.testing.assert_close(logprob_R.grad, slopes)
    # Clipped is what has lost its gradient, zero advantages aside.
    signal = advantage_R != 0
    assert torch.equal(clipped_R[signal], (slopes == 0)[signal])
    assert not clipped_R[~signal].any()


@pytest.mark.parametrize("policy", [name for name in SURROGATES if name != "cispo"])
def test_derivatives_are_finite_differences(policy: str) -> None:
    logprob_R, advantage_R = grid()
    old_R, config, step = torch.full_like(advantage_R, OLD), CONFIGS["clip-higher"], 1e-6
    sequences = alone(len(advantage_R))

    def loss(shift: float) -> torch.Tensor:
        return SURROGATES[policy](logprob_R + shift, old_R, advantage_R, config, sequences)[0]

    (slope,) = torch.autograd.grad(loss(0.0).sum(), logprob_R)
    torch.testing.assert_close(slope, (loss(step) - loss(-step)) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", SURROGATES)
def test_on_policy_the_gradient_is_reinforces(policy: str) -> None:
    logprob_R, advantage_R = grid()
    sequences = Sequences(torch.arange(len(advantage_R)) // 5, torch.full((len(RATIOS),), 5))
    loss_R, clipped_R = SURROGATES[policy](
        logprob_R, logprob_R.detach(), advantage_R, CONFIGS["dual clip"], sequences
    )
    assert not clipped_R.any()
    (slope,) = torch.autograd.grad(loss_R.sum(), logprob_R)
    torch.testing.assert_close(slope, -advantage_R)


def test_extreme_log_ratios_are_bounded_and_everything_stays_finite() -> None:
    logprob_R = torch.tensor([-1e4, -30.0, 0.0, -1e30], requires_grad=True)
    old_R = torch.tensor([0.0, -5.0, -1e4, -1e30])
    assert log_ratio(logprob_R, old_R).tolist() == [
        -LOG_RATIO_BOUND,
        -LOG_RATIO_BOUND,
        LOG_RATIO_BOUND,
        0,
    ]
    for advantage in (-1.0, 1.0):
        loss_R, _ = SURROGATES["ppo"](
            logprob_R, old_R, torch.full((4,), advantage), CONFIGS["plain clip"], alone(4)
        )
        (slope,) = torch.autograd.grad(loss_R.sum(), logprob_R)
        assert bool(loss_R.isfinite().all())
        assert bool(slope.isfinite().all())
    assert float(loss_R[2].detach()) == pytest.approx(-1.2)


# ------------------------------------------------------------------ GSPO

LENGTHS = [1, 4, 7, 2, 5]
SIGNS = [1.5, -0.5, 2.0, -1.0, 0.25]


def trajectories(spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
    """(log pi, log pi_old, advantage, sequences) of five sequences, their rows mixed up."""
    draw = torch.Generator().manual_seed(3)
    index_R = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    index_R = index_R[torch.randperm(len(index_R), generator=draw)]
    old_R = -torch.rand(len(index_R), generator=draw, dtype=torch.float64) * 3
    noise_R = torch.randn(len(index_R), generator=draw, dtype=torch.float64)
    advantage_R = torch.tensor(SIGNS, dtype=torch.float64)[index_R]
    logprob_R = (old_R + spread * noise_R).requires_grad_()
    return logprob_R, old_R, advantage_R, Sequences(index_R, torch.tensor(LENGTHS))


def gspo_by_the_paper(
    logprob_R: torch.Tensor, old_R: torch.Tensor, sequences: Sequences, config: LossConfig
) -> torch.Tensor:
    """Eq. 5: the mean over sequences of -min(s A, clip(s) A), differentiated as it stands."""
    losses = []
    for i, advantage in enumerate(SIGNS):
        rows = sequences.index_R == i
        s = ((logprob_R - old_R)[rows].mean()).exp()
        bounded = s.clamp(1 - config.clip_low, 1 + config.clip_high)
        losses.append(-torch.minimum(s * advantage, bounded * advantage))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("bounds", [(0.01, 0.01), (0.1, 0.05), (0.9, 9.0)])
def test_gspo_under_equal_weights_is_the_papers_objective_and_gradient(
    bounds: tuple[float, float],
) -> None:
    config = LossConfig(policy="gspo", clip_low=bounds[0], clip_high=bounds[1])
    logprob_R, old_R, advantage_R, sequences = trajectories()
    loss_R, clipped_R = SURROGATES["gspo"](logprob_R, old_R, advantage_R, config, sequences)
    share_R = 1 / (5 * torch.tensor(LENGTHS, dtype=torch.float64)[sequences.index_R])
    want = gspo_by_the_paper(logprob_R, old_R, sequences, config)
    torch.testing.assert_close((share_R * loss_R).sum(), want)
    (slope,) = torch.autograd.grad((share_R * loss_R).sum(), logprob_R)
    (slope_of_paper,) = torch.autograd.grad(want, logprob_R)
    torch.testing.assert_close(slope, slope_of_paper)
    assert torch.equal(clipped_R, slope_of_paper == 0)


def test_gspos_rows_keep_their_own_weight() -> None:
    config = LossConfig(policy="gspo", clip_low=0.9, clip_high=9.0)
    logprob_R, old_R, advantage_R, sequences = trajectories()
    loss_R, _ = SURROGATES["gspo"](logprob_R, old_R, advantage_R, config, sequences)
    weights_R = torch.linspace(0, 2, len(loss_R), dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights_R * loss_R).sum(), logprob_R)
    torch.testing.assert_close(slope, weights_R * loss_R.detach())


def test_gspo_of_sequences_of_one_token_is_ppo() -> None:
    logprob_R, advantage_R = grid()
    old_R, config = torch.full_like(advantage_R, OLD), CONFIGS["clip-higher"]
    values, slopes = [], []
    for policy in ("ppo", "gspo"):
        loss_R, clipped_R = SURROGATES[policy](
            logprob_R, old_R, advantage_R, config, alone(len(old_R))
        )
        values.append(torch.stack([loss_R.detach(), clipped_R.double()]))
        slopes.append(torch.autograd.grad(loss_R.sum(), logprob_R)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*slopes)


def test_gspo_stays_finite_at_extreme_ratios() -> None:
    logprob_R = torch.tensor([-1e4, -1e4, 0.0], requires_grad=True)
    old_R = torch.tensor([0.0, 0.0, -1e4])
    sequences = Sequences(torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    for advantage in (-1.0, 1.0):
        loss_R, _ = SURROGATES["gspo"](
            logprob_R, old_R, torch.full((3,), advantage), CONFIGS["plain clip"], sequences
        )
        (slope,) = torch.autograd.grad(loss_R.sum(), logprob_R)
        assert bool(loss_R.isfinite().all())
        assert bool(slope.isfinite().all())


# ------------------------------------------------------------------ CISPO


@pytest.mark.parametrize("name", CONFIGS)
def test_cispo_is_reinforce_scaled_by_the_clipped_ratio(name: str) -> None:
    config = CONFIGS[name]
    logprob_R, advantage_R = grid()
    loss_R, clipped_R = SURROGATES["cispo"](
        logprob_R, torch.full_like(advantage_R, OLD), advantage_R, config, alone(len(advantage_R))
    )
    (slope,) = torch.autograd.grad(loss_R.sum(), logprob_R)
    bounded = [min(max(r, 1 - config.clip_low), 1 + config.clip_high) for r in RATIOS]
    rows = [(r, b, a) for r, b in zip(RATIOS, bounded, strict=True) for a in ADVANTAGES]
    want = [(-b * a * (OLD + math.log(r)), -b * a) for r, b, a in rows]
    values, slopes = torch.tensor(want, dtype=torch.float64).T
    torch.testing.assert_close(loss_R.detach(), values)
    torch.testing.assert_close(slope, slopes)
    assert clipped_R.tolist() == [r != b for r, b, _ in rows]


# ------------------------------------------------------------------ sequences


def test_a_sequence_mean_is_the_mean_of_its_rows_and_carries_no_gradient() -> None:
    logprob_R, _, _, sequences = trajectories()
    mean_R = sequences.mean(logprob_R)
    assert not mean_R.requires_grad
    for i in range(5):
        rows = sequences.index_R == i
        assert mean_R[rows].tolist() == pytest.approx(
            [float(logprob_R[rows].detach().mean())] * LENGTHS[i], abs=1e-15
        )


def test_no_rows_have_no_means() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert Sequences(nothing, nothing).mean(torch.empty(0)).tolist() == []
