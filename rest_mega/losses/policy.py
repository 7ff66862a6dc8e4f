"""Clipped surrogates, one value per trained row; weights multiply them outside the clip.

PPO's clip is Schulman et al. (arXiv 1707.06347), dual clip Ye et al. (arXiv 1912.09729),
clip-higher (clip_high > clip_low) DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rest_mega.config import LossConfig

LOG_RATIO_BOUND = 20.0

Surrogate = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, LossConfig], tuple[torch.Tensor, torch.Tensor]
]
"""(logprob_R, old_logprob_R, advantage_R, config) -> (loss_R, clipped_R: bool)."""


def log_ratio(logprob_R: torch.Tensor, old_logprob_R: torch.Tensor) -> torch.Tensor:
    """log pi/pi_old per row, clamped to +-20 so that its exponential stays finite."""
    return (logprob_R - old_logprob_R).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ppo(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r) A); for A < 0 at most -c A when dual_clip c > 0."""
    ratio_R = log_ratio(logprob_R, old_logprob_R).exp()
    plain_R = -advantage_R * ratio_R
    bounded_R = -advantage_R * ratio_R.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss_R = torch.maximum(plain_R, bounded_R)
    clipped_R = bounded_R > plain_R
    if config.dual_clip > 0:
        ceiling_R = torch.where(advantage_R < 0, -advantage_R * config.dual_clip, torch.inf)
        clipped_R = clipped_R | (loss_R > ceiling_R)
        loss_R = torch.minimum(loss_R, ceiling_R)
    return loss_R, clipped_R


def reinforce(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A log pi (Williams, 1992); nothing is clipped."""
    return -advantage_R * logprob_R, torch.zeros_like(advantage_R, dtype=torch.bool)


SURROGATES: dict[str, Surrogate] = {"ppo": ppo, "reinforce": reinforce}
