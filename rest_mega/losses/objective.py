"""One micro-batch -> (loss, sums with counts, maxima): the weighted surrogate over the global
denominator.

L = sum_t w_t l_t / sum_t w_t, both sums over the whole batch of all replicas: the denominator is
known before the first forward, so the gradient does not depend on how the batch was cut into
micro-batches or replicas.
"""

from __future__ import annotations

import torch

from rest_mega.config import LossConfig
from rest_mega.losses.policy import SURROGATES, log_ratio

Report = dict[str, torch.Tensor]

POLICY_SUMS = ("surrogate", "clip_fraction", "ratio", "approx_kl", "entropy", "rollout_gap")
"""Names in the sums of `policy_objective`; each is a tensor [total, count] over trained rows."""
POLICY_MAXIMA = ("rollout_gap_max",)


def policy_objective(
    logprob_R: torch.Tensor,
    entropy_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    rollout_logprob_R: torch.Tensor,
    advantages_R: torch.Tensor,
    weights_R: torch.Tensor,
    config: LossConfig,
    denominator: float,
) -> tuple[torch.Tensor, Report, Report]:
    """The weighted clipped surrogate of one micro-batch, divided by the global sum of weights.

    Rows may be none: the loss is then a zero that backward can walk. Reported statistics are
    unweighted: approx_kl is mean(old - new) (k1), rollout_gap the mean |trainer - engine| log-prob
    of the sampled tokens.
    """
    loss_R, clipped_R = SURROGATES[config.policy](logprob_R, old_logprob_R, advantages_R, config)
    loss = (weights_R * loss_R).sum() / denominator
    with torch.no_grad():
        log_ratio_R = log_ratio(logprob_R, old_logprob_R)
        gap_R = (old_logprob_R - rollout_logprob_R).abs()
        values = (loss_R, clipped_R, log_ratio_R.exp(), -log_ratio_R, entropy_R, gap_R)
        sums = {name: _sum_count(value) for name, value in zip(POLICY_SUMS, values, strict=True)}
        maxima = {"rollout_gap_max": gap_R.max()} if gap_R.numel() else {}
    return loss, sums, maxima


def supervised_objective(
    logprob_R: torch.Tensor, weights_R: torch.Tensor, denominator: float
) -> tuple[torch.Tensor, Report, Report]:
    """Next-token cross-entropy of one micro-batch over the global sum of weights."""
    return -(weights_R * logprob_R).sum() / denominator, {}, {}


def _sum_count(values_R: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [values_R.double().sum(), values_R.new_tensor(values_R.numel(), dtype=torch.float64)]
    )
