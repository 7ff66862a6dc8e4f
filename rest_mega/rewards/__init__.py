"""Rewards: a rubric of named functions of one trajectory, each part kept.

A reward of your own, in a file named by `environment.modules`:

    from rest_mega.rewards import reward

    @reward("short")
    def short(trajectory: Trajectory) -> float:
        return 1.0 if len(trajectory.turns) <= 2 else 0.0
"""

from rest_mega.rewards import named as named  # registers the built-in functions
from rest_mega.rewards.rubric import RUBRIC, RewardFunction, Rubric, reward

__all__ = ["RUBRIC", "RewardFunction", "Rubric", "reward"]
