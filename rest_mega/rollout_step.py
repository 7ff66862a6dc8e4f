"""The rollouts of one training step: rounds of prompts until enough groups carry signal -> samples
on every rank, and the lead's view of what it played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rest_mega.config import RunConfig
from rest_mega.credit.advantages import advantages, has_signal
from rest_mega.credit.assign import assign, trained_groups
from rest_mega.data.prompts import PromptStream
from rest_mega.records import Bools, Prompt, Reals, Sample, Trajectory
from rest_mega.rollout.engine import Sampling
from rest_mega.session import Session
from rest_mega.trainer.exchange import share_rewards, share_samples


def _none() -> Reals:
    return np.zeros((0, 0), dtype=np.float64)


@dataclass(frozen=True)
class RolloutView:
    """One lead's rollouts of a step, of all rounds; empty on other ranks."""

    step: int = 0
    groups: Sequence[Sequence[Trajectory]] = ()
    round_P: Sequence[int] = ()
    """The round that played the group, from 0."""
    rewards_PG: Reals = field(default_factory=_none)
    parts: Mapping[str, Reals] = field(default_factory=dict)
    advantages_PG: Reals = field(default_factory=_none)
    trained_P: Sequence[bool] = ()
    """Whether the group is trained on."""

    @property
    def trained(self) -> list[Trajectory]:
        """The trajectories of this replica's samples, in their order."""
        pairs = zip(self.groups, self.trained_P, strict=True)
        return [t for group, trained in pairs if trained for t in group]


@dataclass(frozen=True)
class Rollout:
    """What a step trains on."""

    samples: list[Sample]
    """Of this replica, on all its ranks."""
    view: RolloutView
    counts: dict[str, float]
    """How many groups were played and trained on, over all replicas; equal on every rank."""


@dataclass(frozen=True)
class _Round:
    """The groups of one round: those that this lead played (elsewhere none), and the rewards of
    all."""

    groups: Sequence[Sequence[Trajectory]]
    parts: Mapping[str, Reals]
    mine: slice
    """Which rows of the round are this replica's."""
    rewards_PG: Reals
    """Of all replicas, in the order of the prompts."""


def rollout_seed(seed: int, step: int, number: int) -> tuple[object, ...]:
    """What seeds the draws of a step's round; a prompt drawn anew in a later round is played
    anew."""
    return ("train", seed, step) if number == 0 else ("train", seed, step, number)


def occurrences(ids: Sequence[str]) -> list[int]:
    """How often each id stands before it in the list: a draw across the end of an epoch may hold a
    prompt twice."""
    seen: Counter[str] = Counter()
    found = []
    for one in ids:
        found.append(seen[one])
        seen[one] += 1
    return found


def play_step(session: Session, stream: PromptStream, step: int) -> Rollout | None:
    """Draw the step's prompts and play them; None on every rank when a stop was asked for. Every
    rank draws the same prompts and takes its replica's share. Collective.

    With `credit.equal_groups=resample` a further round draws as many prompts as groups lack signal,
    until none lacks it or `credit.resample_rounds` rounds are over.
    """
    config, rounds = session.config, list[_Round]()
    further = config.credit.resample_rounds if config.credit.equal_groups == "resample" else 0
    missing = config.rollout.prompts_per_step
    while missing and len(rounds) <= further:
        played = _play_round(session, stream.next(missing), step, len(rounds))
        if played is None:
            return None
        rounds.append(played)
        missing -= int(trained_groups(played.rewards_PG, config.credit).sum())
    return _rollout(session, rounds, step)


def _play_round(s: Session, prompts: list[Prompt], step: int, number: int) -> _Round | None:
    siblings = s.config.rollout.samples_per_prompt
    mine = slice(s.place.data_rank, None, s.place.data_size)
    groups: list[list[Trajectory]] | None = []
    rewards_PG: Reals | None = None
    parts: Mapping[str, Reals] = {}
    if s.collector is not None:
        sampling = Sampling(s.config.rollout.temperature, s.config.rollout.top_p)
        seed = rollout_seed(s.config.run.seed, step, number)
        first_P = [siblings * n for n in occurrences([prompt.id for prompt in prompts])]
        groups = s.collector.collect(prompts[mine], siblings, sampling, seed, first_P[mine])
        if groups is not None:
            rewards_PG, parts = s.inputs.rubric(groups, step)
    whole_PG = share_rewards(s.place, rewards_PG, len(prompts), siblings, s.stop())
    return None if groups is None or whole_PG is None else _Round(groups, parts, mine, whole_PG)


def _rollout(s: Session, rounds: Sequence[_Round], step: int) -> Rollout:
    """Advantages over the trained groups of all rounds; samples of those of this replica."""
    config = s.config
    trained = [trained_groups(r.rewards_PG, config.credit) for r in rounds]
    batch_PG = np.concatenate([r.rewards_PG[t] for r, t in zip(rounds, trained, strict=True)])
    view, samples = RolloutView(step), None
    if s.collector is not None:
        trained_P = np.concatenate([t[r.mine] for r, t in zip(rounds, trained, strict=True)])
        view = _view(rounds, trained_P, batch_PG, config, step)
        kept = [group for group, keep in zip(view.groups, trained_P, strict=True) if keep]
        samples = assign(
            kept,
            view.advantages_PG[trained_P],
            view.rewards_PG[trained_P],
            config.tokenizer.dialect,
            s.inputs.tokenizer.token_bytes,
        )
    shared = share_samples(s.place, samples)
    assert shared is not None, "a lead that has played its rounds has samples"
    return Rollout(shared, view, _counts(rounds, len(batch_PG), config.credit.advantage))


def _view(
    rounds: Sequence[_Round], trained_P: Bools, batch_PG: Reals, config: RunConfig, step: int
) -> RolloutView:
    rewards_PG = np.concatenate([r.rewards_PG[r.mine] for r in rounds])
    shape = rewards_PG.shape[1:]
    # A lead without a share in a round has parts of shape [0, 0].
    parts = {
        name: np.concatenate([r.parts[name].reshape(-1, *shape) for r in rounds])
        for name in rounds[0].parts
    }
    return RolloutView(
        step=step,
        groups=[group for r in rounds for group in r.groups],
        round_P=[number for number, r in enumerate(rounds) for _ in r.groups],
        rewards_PG=rewards_PG,
        parts=parts,
        advantages_PG=advantages(rewards_PG, config.credit.advantage, batch_PG),
        trained_P=trained_P.tolist(),
    )


def _counts(rounds: Sequence[_Round], trained: int, method: str) -> dict[str, float]:
    """Metrics of the step's groups: the share that has no signal, how many are trained on, how many
    prompts were drawn besides the first round's."""
    played = [len(r.rewards_PG) for r in rounds]
    signal = sum(int(has_signal(r.rewards_PG, method).sum()) for r in rounds)
    return {
        "groups/without_signal": 1.0 - signal / sum(played),
        "groups/trained": float(trained),
        "groups/resampled": float(sum(played[1:])),
        "groups/rounds": float(len(played)),
    }
