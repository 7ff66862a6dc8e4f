"""Rewards of groups -> samples for the trainer: regions of every token, one advantage per
trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import advantages, has_signal
from rest_mega.credit.regions import tag_trajectory
from rest_mega.records import Reals, Sample, Trajectory


def assign(
    groups: Sequence[Sequence[Trajectory]],
    rewards_PG: Reals,
    config: CreditConfig,
    dialect: str,
    token_bytes: Callable[[int], bytes],
) -> tuple[list[list[Sample]], int]:
    """(samples of the kept groups, number of groups whose equal rewards carry no signal).

    Groups without signal are left out when `config.drop_equal_groups`; otherwise their advantages
    are 0.
    """
    advantages_PG, signal_P = advantages(rewards_PG, config.advantage), has_signal(rewards_PG)
    kept = [
        [_sample(t, float(a), dialect, token_bytes) for t, a in zip(group, row, strict=True)]
        for group, row, signal in zip(groups, advantages_PG, signal_P, strict=True)
        if signal or not config.drop_equal_groups
    ]
    return kept, int((~signal_P).sum())


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
