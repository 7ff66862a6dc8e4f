"""What a training step reports: metrics of rollouts, credit and optimizer steps, and rows for the
report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_mega.credit import weights as credit
from rest_mega.credit.regions import tag_trajectory
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.dialects import Region
from rest_mega.records import Floats, StepResult, Trajectory
from rest_mega.rollout_step import RolloutView
from rest_mega.trainer.global_rows import TokenTrace

STOPS = ("answered", "turn_limit", "token_limit", "length")


def report_rows(
    view: RolloutView,
    tokenizer: Tokenizer,
    dialect: str,
    raw_K: Floats,
    traces: Sequence[TokenTrace],
    count: int,
) -> list[dict[str, Any]]:
    """At most `count` trajectories, whole groups first, as the report shows them.

    `traces`: of the first trained trajectories. `advantage` of a trajectory is the task's, that of
    its tokens the loss's.
    """
    flat = [(p, g) for p, group in enumerate(view.groups) for g in range(len(group))][:count]
    known = iter(traces)
    return [
        _row(view, p, g, tokenizer, dialect, raw_K, next(known) if view.trained_P[p] else None)
        for p, g in flat
    ]


def _row(
    view: RolloutView,
    p: int,
    g: int,
    tokenizer: Tokenizer,
    dialect: str,
    raw_K: Floats,
    trace: TokenTrace | None,
) -> dict[str, Any]:
    t = view.groups[p][g]
    regions_T = tag_trajectory(t, dialect, tokenizer.token_bytes)
    weights_T = credit.normalise(raw_K, regions_T, t.mask_T, np.zeros_like(t.ids_T))
    return {
        "step": view.step,
        "prompt": t.prompt.id,
        "kind": str(t.prompt.task.get("kind", t.prompt.environment)),
        "sibling": t.sibling,
        "reward": float(view.rewards_PG[p, g]),
        "parts": {name: float(values[p, g]) for name, values in view.parts.items()},
        "advantage": float(view.advantages_PG[p, g]),
        "success": t.result.get("success"),
        "stop": t.stop,
        "text": [tokenizer.token_bytes(int(i)).decode("utf-8", "replace") for i in t.ids_T],
        "region": regions_T.tolist(),
        "turn": t.turn_T.tolist(),
        "sampled": _columns(t, weights_T, trace),
        "turns": [
            {
                "start": turn.start,
                "well_formed": turn.well_formed,
                "ended": turn.ended,
                "calls": [{"name": c.name, "arguments": dict(c.arguments)} for c in turn.calls],
                "outcomes": [
                    {"status": o.status, "content": o.content, "seconds": round(o.seconds, 4)}
                    for o in turn.outcomes
                ],
            }
            for turn in t.turns
        ],
    }


def _columns(
    t: Trajectory, weights_T: Floats, trace: TokenTrace | None
) -> dict[str, list[float | None]]:
    """What is known of the sampled tokens alone, in their order, to four digits; null where
    training has not seen one. `gap`: trainer's log-prob less the engine's."""
    columns = {"logprob": t.logprobs_T, "weight": weights_T}
    if trace is not None:
        columns |= {"gap": trace.trainer_T - t.logprobs_T, "entropy": trace.entropy_T}
        columns |= {"advantage": trace.advantage_T}
    return {
        name: [float(f"{x:.4g}") if math.isfinite(x) else None for x in column_T[t.mask_T].tolist()]
        for name, column_T in columns.items()
    }


def rollout_metrics(view: RolloutView) -> dict[str, tuple[float, float]]:
    """Rewards, success, stops and lengths of this player's trajectories."""
    flat = [t for group in view.groups for t in group]
    if not flat:
        return {}
    count = float(len(flat))
    sums = {
        "reward/mean": (float(view.rewards_PG.sum()), count),
        "rollout/tokens": (float(sum(int(t.mask_T.sum()) for t in flat)), count),
        "rollout/length": (float(sum(len(t.ids_T) for t in flat)), count),
        "rollout/turns": (float(sum(len(t.turns) for t in flat)), count),
        "rollout/malformed": (
            float(sum(not all(u.well_formed for u in t.turns) for t in flat)),
            count,
        ),
        "rollout/negative_logprob": (
            -float(sum(t.logprobs_T.sum(dtype=np.float64) for t in flat)),
            float(sum(int(t.mask_T.sum()) for t in flat)),
        ),
        "rollout/stale_tokens": (
            float(sum(int((t.version_T[t.mask_T] < view.step - 1).sum()) for t in flat)),
            float(sum(int(t.mask_T.sum()) for t in flat)),
        ),
    }
    sums |= {f"reward/{name}": (float(values.sum()), count) for name, values in view.parts.items()}
    sums |= {f"stop/{kind}": (float(sum(t.stop == kind for t in flat)), count) for kind in STOPS}
    judged = [bool(t.result["success"]) for t in flat if "success" in t.result]
    if judged:
        sums["success/train"] = (float(sum(judged)), float(len(judged)))
    return sums


def credit_metrics(
    sums_K: Floats,
    counts_K: Floats,
    pulls_K: Floats,
    pulling_K: Floats,
    raw_K: Floats,
    running_K: Floats,
) -> dict[str, float]:
    """Per region r: share of the trained tokens, mean entropy of the step, weight, and share of the
    gradient sum_{t in r} |w_t A_t| / sum_t |w_t A_t| (`pulls_K`, after credit.tokens); the share of
    trained tokens that have a gradient (`pulling_K`); the variance-bound ratio."""
    trained = max(float(counts_K.sum()), 1.0)
    share_K = counts_K / trained
    mean = max(float((share_K * raw_K).sum()), 1e-12)
    pulled = max(float(pulls_K.sum()), 1e-12)
    metrics = {
        "tokens/trained": float(counts_K.sum()),
        "entropy/policy": float(sums_K.sum()) / trained,
        "credit/tokens_with_gradient": float(pulling_K.sum()) / trained,
    }
    for region in Region:
        if counts_K[region] > 0:
            metrics[f"share/{region.name}"] = float(share_K[region])
            metrics[f"entropy/{region.name}"] = float(sums_K[region] / counts_K[region])
            metrics[f"weight/{region.name}"] = float(raw_K[region]) / mean
            metrics[f"gradient/{region.name}"] = float(pulls_K[region]) / pulled
    if counts_K.sum() > 0:
        metrics["credit/variance_bound_ratio"] = credit.variance_bound_ratio(running_K, share_K)
    return metrics


def step_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """Loss, gradient norm and the objective's own metrics, averaged over the step's optimizer
    steps."""
    metrics: dict[str, float] = {
        "train/loss": float(np.mean([r.loss for r in results])),
        "train/grad_norm": float(np.mean([r.grad_norm for r in results])),
        "train/lr": results[-1].lr,
        "train/skipped": float(sum(r.skipped for r in results)),
    }
    for name in dict.fromkeys(name for r in results for name in r.metrics):
        values = [r.metrics[name] for r in results if name in r.metrics]
        metrics[f"policy/{name}"] = float(np.mean(values))
    return metrics
