"""Rewards of groups -> samples for the trainer: regions of every token, one advantage per
trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import has_signal
from rest_mega.credit.regions import tag_trajectory
from rest_mega.records import Bools, Reals, Sample, Trajectory


def trained_groups(rewards_PG: Reals, config: CreditConfig) -> Bools:
    """trained_P: the groups of a step that are trained on: all of them with `equal_groups=keep`,
    otherwise those with signal."""
    signal_P = has_signal(rewards_PG, config.advantage)
    return np.ones_like(signal_P) if config.equal_groups == "keep" else signal_P


def assign(
    groups: Sequence[Sequence[Trajectory]],
    advantages_PG: Reals,
    dialect: str,
    token_bytes: Callable[[int], bytes],
) -> list[Sample]:
    """The samples of all groups, one after another, with the advantages given."""
    return [
        _sample(trajectory, float(advantage), dialect, token_bytes)
        for group, row in zip(groups, advantages_PG, strict=True)
        for trajectory, advantage in zip(group, row, strict=True)
    ]


def _sample(
    trajectory: Trajectory, advantage: float, dialect: str, token_bytes: Callable[[int], bytes]
) -> Sample:
    return Sample(
        ids_T=trajectory.ids_T,
        mask_T=trajectory.mask_T,
        regions_T=tag_trajectory(trajectory, dialect, token_bytes),
        logprobs_T=trajectory.logprobs_T,
        advantage=advantage,
    )
