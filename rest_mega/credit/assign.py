"""Rewards of groups -> samples for the trainer: regions of every token, one advantage per
trajectory; and their advantages anew when a penalty on the reward becomes known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import advantages, has_signal
from rest_mega.credit.regions import tag_trajectory
from rest_mega.records import Bools, Floats, Reals, Sample, Trajectory


def trained_groups(rewards_PG: Reals, config: CreditConfig) -> Bools:
    """trained_P: the groups of a step that are trained on: all of them with `equal_groups=keep`,
    otherwise those with signal."""
    signal_P = has_signal(rewards_PG, config.advantage)
    return np.ones_like(signal_P) if config.equal_groups == "keep" else signal_P


def assign(
    groups: Sequence[Sequence[Trajectory]],
    advantages_PG: Reals,
    rewards_PG: Reals,
    dialect: str,
    token_bytes: Callable[[int], bytes],
) -> list[Sample]:
    """The samples of all groups, one after another, with the advantages and rewards given."""
    return [
        _sample(t, float(advantage), float(reward), number, dialect, token_bytes)
        for number, (group, advantage_G, reward_G) in enumerate(
            zip(groups, advantages_PG, rewards_PG, strict=True)
        )
        for t, advantage, reward in zip(group, advantage_G, reward_G, strict=True)
    ]


def penalised(
    samples: Sequence[Sample],
    penalty_S: Reals,
    config: CreditConfig,
    everywhere: Callable[[Reals], Reals] = lambda rewards_PG: rewards_PG,
) -> Floats:
    """advantage_S of the rewards less `penalty_S`; whole groups, the samples in any order.

    `everywhere`: rewards of these groups -> of all replicas' groups, called once (REINFORCE++ looks
    at the global batch). A kept group of equal rewards now has the advantages that its penalties
    alone give.
    """
    group_S = np.array([s.group for s in samples], dtype=np.int64)
    order_S = np.argsort(group_S, kind="stable")
    reward_S = np.array([s.reward for s in samples], dtype=np.float64) - penalty_S
    siblings = int((group_S == group_S[0]).sum()) if samples else 1
    reward_PG = reward_S[order_S].reshape(-1, siblings)
    batch_PG = everywhere(reward_PG)
    result_S = np.zeros(len(samples), dtype=np.float32)
    if samples:
        result_S[order_S] = advantages(reward_PG, config.advantage, batch_PG).ravel()
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
        version_T=trajectory.version_T,
        advantage=advantage,
        reward=reward,
        group=group,
    )
