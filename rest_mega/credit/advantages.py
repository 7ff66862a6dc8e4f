"""Rewards of the siblings of each prompt -> advantages.

Sources: GRPO (arXiv 2402.03300; unbiased std, + 1e-6), Dr. GRPO (arXiv 2503.20783; mean only), RLOO
(arXiv 2402.14740; the mean of the other siblings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from rest_mega.config import one_of, require
from rest_mega.records import Bools, Floats, Reals

Doubles = npt.NDArray[np.float64]


def advantages(rewards_PG: Reals, method: str) -> Floats:
    """advantages_PG of every sibling; 0 in groups without signal.

    `method`: grpo, dr_grpo or rloo. A group of one has no siblings to compare with: its mean counts
    as 0 and its std as 1. Raises ConfigError on an unknown method and on rewards that are not
    finite.
    """
    one_of("credit.advantage", method, METHODS)
    rewards = _check(rewards_PG)
    if rewards.shape[1] == 1:
        return rewards.astype(np.float32)
    result = METHODS[method](rewards - rewards.mean(axis=1, keepdims=True))
    # Equal rewards differ from their mean by rounding alone, which a small std would blow up.
    return np.where(has_signal(rewards_PG)[:, None], result, 0.0).astype(np.float32)


def has_signal(rewards_PG: Reals) -> Bools:
    """signal_P: the group's rewards are not all equal (in a group of one: the reward is not 0)."""
    rewards = _check(rewards_PG)
    return np.asarray(
        rewards[:, 0] != 0 if rewards.shape[1] == 1 else rewards.max(axis=1) > rewards.min(axis=1)
    )


def _grpo(centred: Doubles) -> Doubles:
    return np.asarray(centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-6))


def _dr_grpo(centred: Doubles) -> Doubles:
    return centred


def _rloo(centred: Doubles) -> Doubles:
    siblings = centred.shape[1]
    return np.asarray(centred * (siblings / (siblings - 1)))


METHODS: Mapping[str, Callable[[Doubles], Doubles]] = MappingProxyType(
    {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}
)
"""Name -> function of the rewards centred on their group's mean, G > 1."""


def _check(rewards_PG: Reals) -> Doubles:
    rewards: Doubles = np.asarray(rewards_PG, dtype=np.float64)
    require(
        rewards.ndim == 2 and rewards.shape[1] > 0,
        f"rewards of shape {rewards.shape} must be [P, G] with G >= 1",
    )
    require(
        bool(np.isfinite(rewards).all()),
        "a reward is not finite; look at the reward functions in rewards.parts",
    )
    return rewards
