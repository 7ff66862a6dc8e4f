"""Rewards of groups -> samples for the trainer: regions of every token, one advantage per
trajectory; and their advantages anew when a penalty on the reward becomes known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import advantages, has_signal
from rest_mega.credit.regions import tag_trajectory
from rest_mega.records import Floats, Reals, Sample, Trajectory


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
        [
            _sample(t, float(a), float(r), number, dialect, token_bytes)
            for t, a, r in zip(group, row, rewards_G, strict=True)
        ]
        for number, (group, row, rewards_G, signal) in enumerate(
            zip(groups, advantages_PG, rewards_PG, signal_P, strict=True)
        )
        if signal or not config.drop_equal_groups
    ]
    return kept, int((~signal_P).sum())


def penalised(samples: Sequence[Sample], penalty_S: Reals, config: CreditConfig) -> Floats:
    """advantage_S of the rewards less `penalty_S`, within each group of `samples` (of any order).

    A kept group of equal rewards now has the advantages that its penalties alone give.
    """
    reward_S = np.array([s.reward for s in samples]) - penalty_S
    group_S = np.array([s.group for s in samples], dtype=np.int64)
    result_S = np.zeros(len(samples), dtype=np.float32)
    for group in np.unique(group_S):
        siblings = group_S == group
        result_S[siblings] = advantages(reward_S[siblings][None], config.advantage)[0]
    return result_S


def _sample(
    trajectory: Trajectory,
    advantage: float,
    reward: float,
    group: int,
    dialect: str,
    token_bytes: Callable[[int], bytes],
) -> Sample:
    return Sample(
        ids_T=trajectory.ids_T,
        mask_T=trajectory.mask_T,
        regions_T=tag_trajectory(trajectory, dialect, token_bytes),
        logprobs_T=trajectory.logprobs_T,
        advantage=advantage,
        reward=reward,
        group=group,
    )
