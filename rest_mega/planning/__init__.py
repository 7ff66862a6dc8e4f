"""What a run needs and how fast it goes, before it is launched."""

from rest_mega.planning.estimate import Plan, plan
from rest_mega.planning.gpus import GPUS, Gpu

__all__ = ["GPUS", "Gpu", "Plan", "plan"]
