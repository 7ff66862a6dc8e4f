"""Keeps a step's batch in RUN/dumps/step_N: recordings that replay it, and every token with what
trainer and engine say of it.

    config.yaml          the run's config
    gap.json             the gap by region, the limits, the worst token
    bank/                the trajectories, as rollout.engine=replay takes them
    trajectories_R.json  prompt, sibling, rewards, advantage and text of every trajectory
    tokens_R.npz         the trained trajectories one after another, as plain arrays: lengths_S,
                         rewards_S, advantages_S, ids_T, mask_T, regions_T, engine_T, trainer_T
                         (log-probs in nats; NaN where the policy did not sample)

A dump appears whole, and none is overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.dialects import Region
from rest_mega.guard import LIMITS, MISMATCH, Gap, distance
from rest_mega.records import Floats, Microbatch, Sample, Trajectory
from rest_mega.rollout.bank import write_rows
from rest_mega.rollout.episode import row_of
from rest_mega.rollout_step import Rollout, RolloutView
from rest_mega.session import Session
from rest_mega.trainer.global_rows import Scores


def end_run(
    s: Session,
    step: int,
    rollout: Rollout,
    parts: Sequence[Sequence[Microbatch]],
    scores: Sequence[Sequence[Scores]],
    gap: Gap,
) -> int:
    """Keep the batch and say why the run ends; returns the exit code. Collective."""
    folder, worst = write_dump(s, step, rollout, parts, scores, gap)
    s.reporter.event("guard", _message(s, step, folder, worst, gap))
    s.place.barrier()
    return MISMATCH


def _message(s: Session, step: int, folder: Path, worst: Mapping[str, Any], gap: Gap) -> str:
    ranks = s.place.world_size
    start = f"torchrun --nproc-per-node {ranks} -m rest_mega" if ranks > 1 else "rest-mega"
    off = " ".join(f"guard.{name}=null" for name in LIMITS)
    return (
        f"guard: step {step} was not taken: {'; '.join(gap.crossed(s.config.guard))}\n"
        f"  mean {gap.mean:.4g}, p99 {gap.p99:.4g}, max {gap.max:.4g} nats; worst token: "
        f"{worst['text']!r} (id {worst['id']}, {worst['region']}) of prompt {worst['prompt']!r}, "
        f"sibling {worst['sibling']}, turn {worst['turn']}, token {worst['token']}, after "
        f"{worst['before']!r}: trainer {worst['trainer']:.4g}, engine {worst['engine']:.4g}\n"
        f"  the batch is in {folder}; the newest checkpoint is of step {step - 1}\n"
        f"  to play the step again: {start} train {folder / 'config.yaml'} run.fresh=false "
        f"rollout.engine=replay rollout.replay={folder / 'bank'} data.held_out= run.until={step}\n"
        f"  to take it all the same, add {off}"
    )


def write_dump(
    s: Session,
    step: int,
    rollout: Rollout,
    parts: Sequence[Sequence[Microbatch]],
    scores: Sequence[Sequence[Scores]],
    gap: Gap,
) -> tuple[Path, dict[str, Any]]:
    """(folder, worst token) of the step's batch, on every rank. Collective."""
    folder = _folder(s, step)
    partial = folder.with_name(folder.name + ".partial")
    if s.place.is_head:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    s.place.barrier()
    lengths = [len(sample.ids_T) for sample in rollout.samples]
    traces = s.trainer.rows.traces(parts, scores, lengths)[rollout.mine]
    trainer = [t.trainer_T for t in traces]
    worst = _worst(s, rollout, trainer)
    if s.place.is_player:
        _write_player(s, partial, rollout, trainer)
    if s.place.is_head:
        limits = asdict(s.config.guard)
        about = {"step": step, "gap": asdict(gap), "limits": limits, "worst": worst}
        (partial / "gap.json").write_text(json.dumps(about, indent=1))
        (partial / "config.yaml").write_text(json.dumps(s.config.to_dict(), indent=1))  # YAML too
    s.place.barrier()
    if s.place.is_head:
        os.replace(partial, folder)
    s.place.barrier()
    return folder, worst


def _folder(s: Session, step: int) -> Path:
    """The first free name, as the head sees it."""
    dumps, number = Path(s.config.run.dir) / "dumps", 0
    folder = dumps / f"step_{step}"
    while folder.exists():
        number += 1
        folder = dumps / f"step_{step}.{number}"
    return Path(s.place.gather_text(str(folder))[0])


def _trained(sample: Sample) -> Any:
    """Where loss is; a sequence's first token has no prediction."""
    return sample.mask_T & (np.arange(len(sample.mask_T)) > 0)


# ------------------------------------------------------------------ the worst token


def _worst(s: Session, rollout: Rollout, trainer: Sequence[Floats]) -> dict[str, Any]:
    """The trained token of the largest gap over all replicas, in words; the same on every rank."""
    mine = json.dumps(_worst_of_mine(s, rollout, trainer))
    found = [json.loads(text) for text in s.place.gather_text(mine)]
    return max((one for one in found if one), key=lambda one: float(one["gap"]), default={})


def _worst_of_mine(s: Session, rollout: Rollout, trainer: Sequence[Floats]) -> dict[str, Any]:
    top: dict[str, Any] = {}
    for sample, t, trainer_T in zip(rollout.own, rollout.view.trained, trainer, strict=True):
        gap_T = np.where(_trained(sample), distance(trainer_T, sample.logprobs_T), -1.0)
        at = int(gap_T.argmax())
        if gap_T[at] > top.get("gap", -1.0):
            top = _describe(s, sample, t, at, trainer_T) | {"gap": float(gap_T[at])}
    return top


def _describe(
    s: Session, sample: Sample, t: Trajectory, at: int, trainer_T: Floats
) -> dict[str, Any]:
    tokenizer, ids = s.inputs.tokenizer, sample.ids_T
    return {
        "prompt": t.prompt.id,
        "sibling": t.sibling,
        "turn": int(t.turn_T[at]),
        "token": at,
        "id": int(ids[at]),
        "text": tokenizer.decode(ids[at : at + 1].tolist()),
        "before": tokenizer.decode(ids[max(0, at - 12) : at].tolist()),
        "region": Region(int(sample.regions_T[at])).name,
        "trainer": float(trainer_T[at]),
        "engine": float(sample.logprobs_T[at]),
    }


# ------------------------------------------------------------------ one player's files


def _write_player(s: Session, folder: Path, rollout: Rollout, trainer: Sequence[Floats]) -> None:
    number, view = s.place.player, rollout.view
    pairs = zip(view.groups, view.seed_P, strict=True)
    rows = (row_of(t, seed) for group, seed in pairs for t in group)
    write_rows(folder / "bank", view.step, number, rows)
    about = [
        _trajectory(view, p, g) for p, group in enumerate(view.groups) for g in range(len(group))
    ]
    (folder / f"trajectories_{number}.json").write_text(json.dumps(about, indent=1))
    rewards = [x for x, kept in zip(view.rewards_PG, view.trained_P, strict=True) if kept]
    np.savez(folder / f"tokens_{number}.npz", **_tokens(rollout.own, rewards, trainer))


def _trajectory(view: RolloutView, p: int, g: int) -> dict[str, Any]:
    t = view.groups[p][g]
    return {
        "prompt": t.prompt.id,
        "sibling": t.sibling,
        "round": view.round_P[p],
        "trained": view.trained_P[p],
        "reward": float(view.rewards_PG[p, g]),
        "parts": {name: float(values[p, g]) for name, values in view.parts.items()},
        "advantage": float(view.advantages_PG[p, g]),
        "stop": t.stop,
        "turns": [turn.text for turn in t.turns],
    }


def _tokens(
    samples: Sequence[Sample], rewards: Sequence[Any], trainer: Sequence[Floats]
) -> dict[str, Any]:
    def joined(columns: Sequence[Any], dtype: Any) -> Any:
        return np.concatenate([np.zeros(0, dtype), *columns]).astype(dtype)

    engine = [np.where(x.mask_T, x.logprobs_T, np.nan) for x in samples]
    return {
        "lengths_S": np.array([len(x.ids_T) for x in samples], dtype=np.int64),
        "rewards_S": joined(rewards, np.float64),
        "advantages_S": np.array([x.advantage for x in samples], dtype=np.float64),
        "ids_T": joined([x.ids_T for x in samples], np.int32),
        "mask_T": joined([x.mask_T for x in samples], np.bool_),
        "regions_T": joined([x.regions_T for x in samples], np.int8),
        "engine_T": joined(engine, np.float32),
        "trainer_T": joined(trainer, np.float32),
    }
