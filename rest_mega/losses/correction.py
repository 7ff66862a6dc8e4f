"""Log-probs of trainer and engine for the sampled tokens -> a factor per row, without gradient, and
statistics of their gap.

With k = pi_trainer / pi_engine at the parameters that sampled, and a band [low, high]:

    tis            min(k, high)                   truncated importance sampling (Yao et al., 2025)
    mis            k inside the band, else 0      IcePop (Ring-1T, arXiv 2510.18855)
    sequence-mask  1 for all rows of a sequence whose exp(mean log k) is inside the band, else 0

The factors are known before the first forward pass and never enter a denominator. Under `tis` and
`mis` they make the loss one of importance sampling from the engine's own distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rest_mega.config import LossConfig
from rest_mega.losses.policy import LOG_RATIO_BOUND, Sequences

Correction = Callable[[torch.Tensor, float, float, Sequences], torch.Tensor]
"""(log k_R clamped to +-20, low, high, sequences) -> factor_R."""

GAP_SUMS = ("rollout_gap", "rollout_ratio", "rollout_masked")
"""Names in the sums of `correct`, [total, count] each: |log k|, the factor, factors that are 0."""
GAP_MAXIMA = ("rollout_gap_max",)


@torch.no_grad()
def correct(
    trainer_logprob_R: torch.Tensor,
    rollout_logprob_R: torch.Tensor,
    config: LossConfig,
    sequences: Sequences,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(factor_R, sums with counts, maxima) of one micro-batch; rows may be none."""
    gap_R = trainer_logprob_R - rollout_logprob_R
    log_k_R = gap_R.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    factor_R = CORRECTIONS[config.correction](log_k_R, *config.correction_band, sequences)
    values = (gap_R.abs(), factor_R, factor_R == 0)
    count = gap_R.new_tensor(gap_R.numel(), dtype=torch.float64)
    sums = {
        name: torch.stack([value.double().sum(), count])
        for name, value in zip(GAP_SUMS, values, strict=True)
    }
    return factor_R, sums, {GAP_MAXIMA[0]: gap_R.abs().max()} if gap_R.numel() else {}


def _none(log_k_R: torch.Tensor, low: float, high: float, sequences: Sequences) -> torch.Tensor:
    return torch.ones_like(log_k_R)


def _tis(log_k_R: torch.Tensor, low: float, high: float, sequences: Sequences) -> torch.Tensor:
    return log_k_R.exp().clamp(max=high)


def _mis(log_k_R: torch.Tensor, low: float, high: float, sequences: Sequences) -> torch.Tensor:
    k_R = log_k_R.exp()
    return torch.where((k_R >= low) & (k_R <= high), k_R, 0.0)


def _sequence_mask(
    log_k_R: torch.Tensor, low: float, high: float, sequences: Sequences
) -> torch.Tensor:
    mean_R = sequences.mean(log_k_R).exp()
    return ((mean_R >= low) & (mean_R <= high)).to(log_k_R.dtype)


CORRECTIONS: dict[str, Correction] = {
    "none": _none,
    "tis": _tis,
    "mis": _mis,
    "sequence-mask": _sequence_mask,
}
