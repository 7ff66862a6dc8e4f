"""Log-probs of two policies for the sampled tokens -> an estimate of their KL divergence per token.

For x ~ pi and d = log pi(x) - log ref(x), clamped to +-20 as every log-ratio (Schulman,
http://joschu.net/blog/kl-approx.html):

    name  k                  E[k]          E[grad k], the log-prob of pi moving
    k1    d                  KL(pi||ref)   0
    k2    d^2 / 2            near it       grad KL(pi||ref)
    k3    exp(-d) - 1 + d    KL(pi||ref)   grad KL(ref||pi)

As a reward, where nothing is differentiated, k1 and k3 are unbiased. As a loss the gradient is what
counts (arXiv 2510.01555): k1 adds noise of mean zero, k2 pulls as KL(pi||ref) does, k3 (GRPO, arXiv
2402.03300) as the KL turned round, with a variance that grows where pi is far below ref. All of it
holds for tokens sampled from pi itself; no estimator carries a ratio to the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rest_mega.losses.policy import log_ratio

Estimator = Callable[[torch.Tensor], torch.Tensor]
"""d_R -> k_R."""

ESTIMATORS: dict[str, Estimator] = {
    "k1": lambda d_R: d_R,
    "k2": lambda d_R: 0.5 * d_R.square(),
    "k3": lambda d_R: torch.expm1(-d_R) + d_R,
}


def kl(name: str, logprob_R: torch.Tensor, reference_R: torch.Tensor) -> torch.Tensor:
    """k_R by the estimator `name`, differentiable in both; nats."""
    return ESTIMATORS[name](log_ratio(logprob_R, reference_R))
