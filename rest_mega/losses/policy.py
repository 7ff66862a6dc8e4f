"""Clipped surrogates, one value per trained row; weights multiply them outside the clip.

PPO's clip is Schulman et al. (arXiv 1707.06347), dual clip Ye et al. (arXiv 1912.09729),
clip-higher (clip_high > clip_low) DAPO (arXiv 2503.14476), GSPO Zheng et al. (arXiv 2507.18071),
CISPO MiniMax-M1 (arXiv 2506.13585).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rest_mega.config import LossConfig, require

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class Sequences:
    """Which sequence each trained row of this rank belongs to; its other rows may lie on other
    ranks of `group`."""

    index_R: torch.Tensor
    """int64, 0..S-1."""
    tokens_S: torch.Tensor
    """Trained tokens of every whole sequence, on all ranks of `group` together; at least 1."""
    group: dist.ProcessGroup | None = None
    """Context-parallel ranks that share the sequences; None: they are all here."""

    @torch.no_grad()
    def mean(self, values_R: torch.Tensor) -> torch.Tensor:
        """Per row, the mean of `values_R` over the trained tokens of its sequence, summed in
        float64; without gradient. All ranks of `group` call it together."""
        sums_S = torch.zeros(len(self.tokens_S), dtype=torch.float64, device=values_R.device)
        sums_S.index_add_(0, self.index_R, values_R.double())
        if self.group is not None:
            dist.all_reduce(sums_S, group=self.group)
        return (sums_S / self.tokens_S)[self.index_R].to(values_R.dtype)


Surrogate = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, LossConfig, Sequences],
    tuple[torch.Tensor, torch.Tensor],
]
"""(logprob_R, old_logprob_R, advantage_R, config, sequences) -> (loss_R, clipped_R: bool)."""


def log_ratio(logprob_R: torch.Tensor, old_logprob_R: torch.Tensor) -> torch.Tensor:
    """log pi/pi_old per row, clamped to +-20 so that its exponential stays finite."""
    return (logprob_R - old_logprob_R).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ppo(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r) A); for A < 0 at most -c A when dual_clip c > 0."""
    ratio_R = log_ratio(logprob_R, old_logprob_R).exp()
    loss_R, clipped_R = _clip(ratio_R, advantage_R, config)
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
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A log pi (Williams, 1992); nothing is clipped."""
    return -advantage_R * logprob_R, torch.zeros_like(advantage_R, dtype=torch.bool)


def gspo(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(s A, clip(s) A), s = exp(mean of log pi/pi_old over the sequence's trained tokens).

    Each row's s moves with its own log pi alone (GSPO-token, the paper's section 4.3): the gradient
    of a row is s A grad log pi, which under equal weights is that of GSPO and under other weights
    keeps them, where the plain form would spread every token's weight over its whole sequence.
    """
    mean_R = sequences.mean(logprob_R - old_logprob_R)
    ratio_R = log_ratio(logprob_R - logprob_R.detach(), -mean_R).exp()
    return _clip(ratio_R, advantage_R, config)


def cispo(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sg(clip(r)) A log pi: the ratio is clipped and carries no gradient, every token keeps
    its own."""
    ratio_R = log_ratio(logprob_R.detach(), old_logprob_R).exp()
    bounded_R = ratio_R.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -bounded_R * advantage_R * logprob_R, bounded_R != ratio_R


def _clip(
    ratio_R: torch.Tensor, advantage_R: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-min(r A, clip(r) A), where the clipped side is taken)."""
    plain_R = -advantage_R * ratio_R
    bounded_R = -advantage_R * ratio_R.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(plain_R, bounded_R), bounded_R > plain_R


SURROGATES: dict[str, Surrogate] = {
    "ppo": ppo,
    "reinforce": reinforce,
    "gspo": gspo,
    "cispo": cispo,
}
"""Name -> surrogate; `loss.policy` chooses from it."""


def surrogate(name: str) -> Callable[[Surrogate], Surrogate]:
    """Register the decorated function as `name`; ConfigError where the name is taken.

    It must be positively homogeneous in the advantage (credit.tokens scales advantages), and a row
    may look at other rows through `sequences` alone.
    """

    def register(function: Surrogate) -> Surrogate:
        free = name not in SURROGATES
        require(free, f"the policy loss {name!r} is registered already; choose another name")
        SURROGATES[name] = function
        return function

    return register
