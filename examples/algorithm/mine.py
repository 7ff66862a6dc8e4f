"""An algorithm of one's own: a policy loss, an advantage and a preset of token weights.

Named by `environment.modules`; then `loss.policy=sapo`, `credit.advantage=mad` and
`credit.preset=calls` choose them.
"""

from __future__ import annotations

import numpy as np
import torch

from rest_mega.config import LossConfig
from rest_mega.credit.advantages import Doubles, advantage
from rest_mega.credit.curriculum import ARGUMENTS, STRUCTURE, Curriculum, Line
from rest_mega.credit.weights import Preset, add_preset
from rest_mega.losses.policy import Sequences, log_ratio, surrogate

TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05
"""Temperatures of the gate for A > 0 and A < 0, as in the paper."""


@surrogate("sapo")
def sapo(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantage_R: torch.Tensor,
    config: LossConfig,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A sigmoid(tau (r - 1)) 4 / tau: a gate instead of a clip (SAPO, arXiv 2511.20347).

    Its gradient is that of PPO where r = 1 and fades as r leaves 1. Nothing is clipped, so the
    second value, which feeds the metric of the clipped share, is all False.
    """
    ratio_R = log_ratio(logprob_R, old_logprob_R).exp()
    tau_R = torch.where(advantage_R > 0, TAU_POSITIVE, TAU_NEGATIVE)
    gate_R = torch.sigmoid(tau_R * (ratio_R - 1)) * 4 / tau_R
    return -advantage_R * gate_R, torch.zeros_like(advantage_R, dtype=torch.bool)


@advantage("mad")
def mad(centred: Doubles) -> Doubles:
    """Over the mean absolute deviation of the group: one outlier moves it less than the std."""
    deviation = np.abs(centred).mean(axis=1, keepdims=True)
    return np.asarray(centred / (deviation + 1e-6))


add_preset(
    "calls",
    Preset(tau=0.0),  # the curriculum alone; 0 < tau <= 1 brings in the regions' entropies
    Curriculum({region: Line(2.0, -1.0) for region in (*STRUCTURE, *ARGUMENTS)}),
)
"""Tokens of calls weigh twice as much as others at the start of a run, the same at its end."""
