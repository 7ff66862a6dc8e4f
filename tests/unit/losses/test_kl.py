"""KL estimators are their formulas, and their means and mean gradients what the table claims."""

from __future__ import annotations

import math

import pytest
import torch

from rest_mega.losses.kl import ESTIMATORS, kl

GAPS = [-19.0, -3.0, -0.5, -1e-4, 0.0, 1e-4, 0.5, 3.0, 19.0]


def by_hand(name: str, d: float) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d}[name]


def slope_by_hand(name: str, d: float) -> float:
    return {"k1": 1.0, "k2": d, "k3": -math.expm1(-d)}[name]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimators_and_slopes_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    logprob_R = torch.tensor(GAPS, dtype=dtype, requires_grad=True)
    k_R = kl(name, logprob_R, torch.zeros_like(logprob_R))
    (slope_R,) = torch.autograd.grad(k_R.sum(), logprob_R)
    close = {"rel": 1e-6, "abs": 1e-7} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-15}
    assert k_R.tolist() == pytest.approx([by_hand(name, d) for d in GAPS], **close)
    assert slope_R.tolist() == pytest.approx([slope_by_hand(name, d) for d in GAPS], **close)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_beyond_twenty_nats_an_estimator_stands_still(name: str) -> None:
    logprob_R = torch.tensor([-90.0, 90.0], requires_grad=True)
    k_R = kl(name, logprob_R, torch.zeros(2))
    (slope_R,) = torch.autograd.grad(k_R.sum(), logprob_R)
    assert k_R.tolist() == pytest.approx([by_hand(name, d) for d in (-20.0, 20.0)])
    assert slope_R.tolist() == [0.0, 0.0]


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of pi, log-probs of the reference) over eleven tokens, far apart."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), (2 * other).log_softmax(-1)


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one.exp() * (one - other)).sum()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_mean_over_the_policy_is_the_divergence(name: str) -> None:
    logits, reference_V = policies()
    pi_V = logits.log_softmax(-1)
    mean = (pi_V.exp() * kl(name, pi_V, reference_V)).sum()
    torch.testing.assert_close(mean, divergence(pi_V, reference_V))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_gradient_is_none_that_of_the_divergence_or_of_the_reverse(name: str) -> None:
    logits, reference_V = policies()
    pi_V = logits.log_softmax(-1)
    sampled = (pi_V.detach().exp() * kl(name, pi_V, reference_V)).sum()
    (got,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    target = {
        "k1": 0 * logits.sum(),
        "k2": divergence(pi_V, reference_V),
        "k3": divergence(reference_V, pi_V),
    }[name]
    (want,) = torch.autograd.grad(target, logits)
    torch.testing.assert_close(got, want)
