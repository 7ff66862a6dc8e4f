"""Held-out success: every held-out prompt once sampled and once greedily, on the published
parameters."""

from __future__ import annotations

from collections.abc import Sequence

from rest_mega.records import Prompt, Trajectory
from rest_mega.rewards import Rubric
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Sampling
from rest_mega.trainer.parallel import Parallel, Sums


def evaluate(
    place: Parallel,
    collector: Collector | None,
    rubric: Rubric,
    prompts: Sequence[Prompt],
    modes: dict[str, Sampling],
    seed: int,
) -> dict[str, float]:
    """Success, reward and entropy (mean of -log p of the sampled tokens, nats) per mode of
    sampling.

    Every player plays its share of the prompts; other ranks pass no collector. The draws depend on
    the prompt alone, so that two evaluations differ by the policy only. Empty when a stop was asked
    for. Collective.
    """
    metrics: dict[str, float] = {}
    mine = prompts[place.player :: len(place.players)] if collector is not None else []
    for name, sampling in modes.items():
        sums = _play(name, collector, rubric, mine, sampling, seed)
        if place.sum_one(sums is None) > 0:
            return {}
        metrics |= place.merge(sums or {})
    return metrics


def _play(
    name: str,
    collector: Collector | None,
    rubric: Rubric,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
) -> Sums | None:
    if collector is None or not prompts:
        return {}
    groups = collector.collect(prompts, 1, sampling, ("held-out", seed))
    if groups is None:
        return None
    rewards_PG, _ = rubric(groups)
    return _sums(name, [t for group in groups for t in group], float(rewards_PG.sum()))


def _sums(name: str, trajectories: Sequence[Trajectory], reward: float) -> Sums:
    count = float(len(trajectories))
    tokens = float(sum(int(t.mask_T.sum()) for t in trajectories))
    sums = {
        f"eval/{name}_reward": (reward, count),
        f"eval/{name}_entropy": (
            -float(sum(float(t.logprobs_T.sum()) for t in trajectories)),
            tokens,
        ),
        f"eval/{name}_malformed": (
            float(sum(not all(u.well_formed for u in t.turns) for t in trajectories)),
            count,
        ),
    }
    judged = [t for t in trajectories if "success" in t.result]
    if judged:
        sums[f"eval/{name}_success"] = _share(judged)
    for kind in sorted({str(t.prompt.task["kind"]) for t in judged if "kind" in t.prompt.task}):
        sums[f"eval/{name}_success/{kind}"] = _share(
            [t for t in judged if t.prompt.task.get("kind") == kind]
        )
    return sums


def _share(judged: Sequence[Trajectory]) -> tuple[float, float]:
    return float(sum(bool(t.result["success"]) for t in judged)), float(len(judged))
