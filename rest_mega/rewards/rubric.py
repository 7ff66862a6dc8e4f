"""The table of reward functions, and the weighted sum that a run's rubric takes of some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rest_mega.config import RewardConfig, one_of, require
from rest_mega.records import Trajectory
from rest_mega.rewards.schedule import LAST, SCHEDULES

RewardFunction = Callable[[Trajectory], float]
Rewards = npt.NDArray[np.float64]

RUBRIC: dict[str, RewardFunction] = {}
"""Name -> function of one whole trajectory; `rewards.parts` chooses from it."""


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function as `name`; ConfigError where the name is taken."""

    def register(function: RewardFunction) -> RewardFunction:
        require(
            name not in RUBRIC, f"the reward {name!r} is registered already; choose another name"
        )
        RUBRIC[name] = function
        return function

    return register


class Rubric:
    """The weighted sum of the functions that `rewards.parts` names."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises ConfigError for a name that nothing registered, with the nearest known ones."""
        for name in config.parts:
            one_of("rewards.parts", name, sorted(RUBRIC))
        self._parts = dict(config.parts)
        self._schedule = SCHEDULES[config.schedule]

    def __call__(
        self, groups: Sequence[Sequence[Trajectory]], step: float = LAST
    ) -> tuple[Rewards, dict[str, Rewards]]:
        """`groups[p][g]` -> (rewards_PG, name of a part -> its values_PG before the coefficient).

        `step` counts from 1, for the schedule of the coefficients; an evaluation leaves it out.
        Raises ValueError for groups of unequal size and for a value that is not finite.
        """
        sizes = {len(group) for group in groups}
        require(
            len(sizes) <= 1,
            f"groups of unequal size {sorted(sizes)}; give every prompt the same number of "
            "siblings",
        )
        shape = (len(groups), *sizes) if sizes else (0, 0)
        parts = {
            name: np.array(
                [[_value(name, t) for t in group] for group in groups], dtype=np.float64
            ).reshape(shape)
            for name in self._parts
        }
        factors = self._schedule(step)
        total = np.zeros(shape)
        for name, values in parts.items():
            total += self._parts[name] * factors.get(name, 1.0) * values
        return total, parts


def _value(name: str, trajectory: Trajectory) -> float:
    value = float(RUBRIC[name](trajectory))
    require(
        math.isfinite(value),
        f"the reward {name!r} of prompt {trajectory.prompt.id!r} (sibling {trajectory.sibling}) "
        f"is {value}: "
        "a reward must be a finite number; mend the function or leave it out of rewards.parts",
    )
    return value
