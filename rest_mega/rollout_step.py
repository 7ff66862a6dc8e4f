"""The rollouts of one training step: rounds of prompts until enough groups carry signal -> samples
on every rank, and a player's view of what it played.

With `rollout.oversample` a step's first round begins more groups than it needs and ends when enough
are done; the others are carried into the next step (`rollout.unfinished`), where they come first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rest_mega.config import RunConfig
from rest_mega.credit.advantages import advantages, has_signal
from rest_mega.credit.assign import assign, trained_groups
from rest_mega.data.prompts import PromptStream
from rest_mega.records import Bools, Prompt, Reals, Sample, Trajectory
from rest_mega.rollout.bank import Shelf
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Sampling
from rest_mega.rollout.episode import Group, Row, is_over, key_of_row, row_of
from rest_mega.session import Session
from rest_mega.trainer.exchange import share_rewards, share_samples


def _none() -> Reals:
    return np.zeros((0, 0), dtype=np.float64)


@dataclass(frozen=True)
class RolloutView:
    """One player's rollouts of a step, of all rounds; empty on other ranks."""

    step: int = 0
    groups: Sequence[Sequence[Trajectory]] = ()
    round_P: Sequence[int] = ()
    """The round that played the group, from 0."""
    seed_P: Sequence[str] = ()
    """What seeded its draws: an earlier step's where the group was carried over."""
    rewards_PG: Reals = field(default_factory=_none)
    parts: Mapping[str, Reals] = field(default_factory=dict)
    advantages_PG: Reals = field(default_factory=_none)
    trained_P: Sequence[bool] = ()
    """Whether the group is trained on."""

    @property
    def trained(self) -> list[Trajectory]:
        """The trajectories of this player's samples, in their order."""
        pairs = zip(self.groups, self.trained_P, strict=True)
        return [t for group, trained in pairs if trained for t in group]


@dataclass(frozen=True)
class Rollout:
    """What a step trains on."""

    samples: list[Sample]
    """Of this replica, on all its ranks."""
    mine: slice
    """Those of them that this player has played; none on other ranks."""
    view: RolloutView
    counts: dict[str, float]
    """How many groups were played and trained on, over all replicas; equal on every rank."""

    @property
    def own(self) -> list[Sample]:
        """The samples of `view.trained`."""
        return self.samples[self.mine]


@dataclass(frozen=True)
class _Round:
    """The groups of one round: those that this player played (elsewhere none), and the rewards of
    all."""

    groups: Sequence[Group]
    parts: Mapping[str, Reals]
    mine: slice
    """Which rows of the round are this player's."""
    rewards_PG: Reals
    """Of all players, in the order of the prompts."""


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


class Rollouts:
    """Draws and plays the prompts of step after step; what is carried from one to the next."""

    def __init__(self, session: Session, stream: PromptStream, carried: Sequence[Row] = ()) -> None:
        """`carried`: of the checkpoint that the run resumes from, all players' rows."""
        self._s, self._stream = session, stream
        self._carried = _restored(session, carried) if session.collector is not None else []
        self._before = stream.state(), self._carried

    def unfinished(self) -> list[dict[str, Any]]:
        """What this player carries into the next step, as a checkpoint keeps it."""
        if not self._carried:
            return []
        place = self._s.place
        mine = {"player": [place.player, len(place.players)]}
        return [row_of(m, group.seed) | mine for group in self._carried for m in group.members]

    def play(self, step: int) -> Rollout | None:
        """Draw the step's prompts and play them; None on every rank when a stop was asked for: the
        step is then as good as not begun. Every rank draws the same prompts, a player takes its
        share. Collective.

        With `credit.equal_groups=resample` a further round draws as many prompts as groups lack
        signal, until none lacks it or `credit.resample_rounds` rounds are over.
        """
        self._before = self._stream.state(), self._carried
        shelf = self._s.bank.shelf(step) if self._s.bank is not None else None
        try:
            rounds = self._play_rounds(step, shelf)
            if shelf is not None and rounds:
                shelf.add((g.seed, g.members[place]) for g in self._carried for place in g.open)
        finally:
            if shelf is not None:
                shelf.close()
        if not rounds:
            self._stream.load(self._before[0])
            self._carried = self._before[1]
            return None
        return _rollout(self._s, rounds, step, len(self._carried))

    def discard(self, step: int) -> None:
        """Begin the step that was played last anew, all of it: what was sampled is not to be
        used."""
        self._stream.load(self._before[0])
        collector, bank = self._s.collector, self._s.bank
        if collector is not None and bank is not None:
            bank.forget(step)
            self._carried = [
                collector.open(g.prompt, len(g.members), g.seed, g.members[0].sibling)
                for g in self._before[1]
            ]

    def _play_rounds(self, step: int, shelf: Shelf | None) -> list[_Round]:
        """Empty where a stop was asked for."""
        config, rounds = self._s.config, list[_Round]()
        further = config.credit.resample_rounds if config.credit.equal_groups == "resample" else 0
        missing = config.rollout.prompts_per_step
        while missing and len(rounds) <= further:
            played = self._play_round(missing, step, len(rounds), shelf)
            if played is None:
                return []
            rounds.append(played)
            missing -= int(trained_groups(played.rewards_PG, config.credit).sum())
        return rounds

    def _play_round(self, count: int, step: int, number: int, shelf: Shelf | None) -> _Round | None:
        """A round that is to bring `count` groups over all replicas."""
        s = self._s
        siblings = s.config.rollout.samples_per_prompt
        players = s.place.players
        mine = slice(s.place.player, None, len(players)) if s.place.is_player else slice(0, 0)
        drawn = self._draw(count, first=number == 0)
        groups: list[Group] | None = []
        rewards_PG: Reals | None = None
        parts: Mapping[str, Reals] = {}
        if s.collector is not None and shelf is not None:
            seed = str(rollout_seed(s.config.run.seed, step, number))
            pool = [s.collector.open(p, siblings, seed, siblings * n) for p, n in drawn]
            if number == 0:
                pool, self._carried = [*self._carried, *pool], []
            groups = self._play_pool(s.collector, pool, len(range(count)[mine]), shelf)
        if s.collector is not None and groups is not None:
            rewards_PG, parts = s.inputs.rubric([g.trajectories for g in groups], step)
        whole_PG = share_rewards(s.place, rewards_PG, count, siblings, s.stop())
        return None if groups is None or whole_PG is None else _Round(groups, parts, mine, whole_PG)

    def _play_pool(
        self, collector: Collector, pool: list[Group], need: int, shelf: Shelf
    ) -> list[Group] | None:
        """The first `need` groups of the pool that are done; the others are carried over."""
        config = self._s.config.rollout
        if not collector.repeatable or _complete(pool, shelf.rows, need):
            collector.restore(pool, shelf.rows)
        sampling = Sampling(config.temperature, config.top_p)
        if not collector.play(pool, sampling, need, lambda *episode: shelf.add([episode])):
            return None
        done = [group for group in pool if group.done][:need]
        if config.unfinished == "carry":
            self._carried += [group for group in pool if group not in done]
        return done

    def _draw(self, count: int, *, first: bool) -> list[tuple[Prompt, int]]:
        """This player's new prompts, and how often each was drawn before in the round. The players
        take turns."""
        place, share = self._s.place, self._s.config.rollout.oversample if first else 0.0
        players = len(place.players)
        needs = [len(range(count)[k::players]) for k in range(players)]
        wanted = [need + math.ceil(need * share) for need in needs]
        if first:
            held_N = np.zeros(players)
            if place.is_player:
                held_N[place.player] = len(self._carried)
            held = place.sum(held_N).astype(int).tolist()
            wanted = [max(0, want - have) for want, have in zip(wanted, held, strict=True)]
        takers = [k for turn in range(max(wanted)) for k, want in enumerate(wanted) if turn < want]
        prompts = self._stream.next(len(takers))
        before = occurrences([prompt.id for prompt in prompts])
        drawn = zip(takers, prompts, before, strict=True)
        return [(p, n) for taker, p, n in drawn if place.players[taker] == place.rank]


def _complete(pool: Sequence[Group], rows: Mapping[str, Row], need: int) -> bool:
    """The rows hold all that the pool needs. A batch of which a part is known already would be
    decoded in another company, and rounded differently."""

    def over(group: Group) -> bool:
        keys = [group.key(place) for place in group.open]
        return all(key in rows and is_over(rows[key]) for key in keys)

    return sum(map(over, pool)) >= need


def _restored(s: Session, rows: Sequence[Row]) -> list[Group]:
    """The groups of a checkpoint that fall to this player, as far as their prompts are still
    there: its own, or, with another number of players, every n-th."""
    assert s.collector is not None
    me, players, siblings = (
        s.place.player,
        len(s.place.players),
        s.config.rollout.samples_per_prompt,
    )
    prompts = {prompt.id: prompt for prompt in s.inputs.train}
    as_before = all(row["player"][1] == players for row in rows)
    own = [row for row in rows if row["player"][0] == me] if as_before else rows
    names = dict.fromkeys((r["seed"], r["prompt"], r["sibling"] // siblings) for r in own)
    mine = list(names) if as_before else list(names)[me::players]
    groups = [
        s.collector.open(prompts[name], siblings, seed, siblings * number)
        for seed, name, number in mine
        if name in prompts
    ]
    s.collector.restore(groups, {key_of_row(row): row for row in rows})
    return groups


def _rollout(s: Session, rounds: Sequence[_Round], step: int, carried: int) -> Rollout:
    """Advantages over the trained groups of all rounds; the samples of this replica's."""
    config = s.config
    trained = [trained_groups(r.rewards_PG, config.credit) for r in rounds]
    batch_PG = np.concatenate([r.rewards_PG[t] for r, t in zip(rounds, trained, strict=True)])
    view, samples = RolloutView(step), list[Sample]()
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
    whole, mine = share_samples(s.place, samples)
    counts = _counts(rounds, len(batch_PG), config.credit.advantage)
    counts["groups/carried"] = s.place.sum_one(carried)
    return Rollout(whole, mine, view, counts)


def _view(
    rounds: Sequence[_Round], trained_P: Bools, batch_PG: Reals, config: RunConfig, step: int
) -> RolloutView:
    rewards_PG = np.concatenate([r.rewards_PG[r.mine] for r in rounds])
    shape = rewards_PG.shape[1:]
    # A player without a share in a round has parts of shape [0, 0].
    parts = {
        name: np.concatenate([r.parts[name].reshape(-1, *shape) for r in rounds])
        for name in rounds[0].parts
    }
    return RolloutView(
        step=step,
        groups=[group.trajectories for r in rounds for group in r.groups],
        round_P=[number for number, r in enumerate(rounds) for _ in r.groups],
        seed_P=[group.seed for r in rounds for group in r.groups],
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
