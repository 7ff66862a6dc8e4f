"""Surrogates equal hand-written scalars on a grid, and so do their derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from rest_mega.config import LossConfig
from rest_mega.losses.policy import LOG_RATIO_BOUND, SURROGATES, log_ratio

OLD = -1.25
RATIOS = [0.01, 0.5, 0.79, 0.81, 0.99, 1.0, 1.01, 1.19, 1.21, 1.29, 1.31, 2.0, 2.9, 3.1, 50.0]
ADVANTAGES = [-2.0, -0.5, 0.0, 0.5, 2.0]
CONFIGS = {
    "plain clip": LossConfig(dual_clip=0.0),
    "clip-higher": LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=0.0),
    "dual clip": LossConfig(dual_clip=3.0),
    "clip-higher and dual clip": LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
}


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
        logprob_R, torch.full_like(advantage_R, OLD), advantage_R, config
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


@pytest.mark.parametrize("policy", SURROGATES)
def test_derivatives_are_finite_differences(policy: str) -> None:
    logprob_R, advantage_R = grid()
    old_R, config, step = torch.full_like(advantage_R, OLD), CONFIGS["clip-higher"], 1e-6

    def loss(shift: float) -> torch.Tensor:
        return SURROGATES[policy](logprob_R + shift, old_R, advantage_R, config)[0]

    (slope,) = torch.autograd.grad(loss(0.0).sum(), logprob_R)
    torch.testing.assert_close(slope, (loss(step) - loss(-step)) / (2 * step), rtol=1e-5, atol=1e-6)


def test_on_policy_the_gradient_is_reinforces() -> None:
    logprob_R, advantage_R = grid()
    slopes = []
    for policy in ("ppo", "reinforce"):
        loss_R, clipped_R = SURROGATES[policy](
            logprob_R, logprob_R.detach(), advantage_R, CONFIGS["dual clip"]
        )
        assert not clipped_R.any()
        slopes.append(torch.autograd.grad(loss_R.sum(), logprob_R)[0])
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[1], -advantage_R)


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
            logprob_R, old_R, torch.full((4,), advantage), CONFIGS["plain clip"]
        )
        (slope,) = torch.autograd.grad(loss_R.sum(), logprob_R)
        assert bool(loss_R.isfinite().all())
        assert bool(slope.isfinite().all())
    assert float(loss_R[2].detach()) == pytest.approx(-1.2)
