"""The guard: do trainer and engine agree on a step's batch? Its verdict comes before the optimizer
step.

- |log-prob of the trainer - log-prob of the engine| of every trained token that the current policy
  sampled: mean, 99th percentile, maximum, and the mean by region, over all replicas, against the
  thresholds of the config;
- the trained ids are the sampled ids: an assertion, from the engine's ledger to the micro-batches;
- the share of sampled turns whose text, encoded anew, gives other ids: what a trainer would have
  got wrong that tokenised texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from rest_mega.config import GuardConfig
from rest_mega.credit.ranking import quantile
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.dialects import Region
from rest_mega.records import Floats, Microbatch, Sample, Trajectory
from rest_mega.rollout_step import Rollout
from rest_mega.session import Session
from rest_mega.trainer.global_rows import GlobalRows, ScoredRows, Scores
from rest_mega.trainer.parallel import Parallel

MISMATCH = 3
"""Exit code of a run that the guard stopped."""


@dataclass(frozen=True)
class Gap:
    """|trainer - engine| of the log-probs of the trained tokens of all replicas, in nats."""

    mean: float = 0.0
    p99: float = 0.0
    max: float = 0.0
    regions: dict[str, float] = field(default_factory=dict)
    """Name of a region that has trained tokens -> its mean."""

    def metrics(self) -> dict[str, float]:
        """As a step reports them."""
        whole = {f"gap/{name}": getattr(self, name) for name in LIMITS}
        return whole | {f"gap/{name}": value for name, value in self.regions.items()}

    def crossed(self, limits: GuardConfig) -> list[str]:
        """What lies above its limit, in words; empty where all is well."""
        pairs = [(name, getattr(self, name), getattr(limits, name)) for name in LIMITS]
        return [
            f"{LIMITS[name]} |trainer - engine| log-prob is {value:.4g} nats, "
            f"guard.{name}={limit:g} allows {limit:g}"
            for name, value, limit in pairs
            if limit is not None and not value <= limit
        ]


LIMITS = {"mean": "the mean", "p99": "the 99th percentile of", "max": "the largest"}
"""Names of the thresholds, and what they bound in words."""


def announce(s: Session) -> None:
    """Say so where the config lets the guard see nothing."""
    if s.config.guard.every and not s.config.loss.scoring:
        s.reporter.event(
            "guard",
            "guard: loss.scoring=false leaves nothing to compare before a step; it is off",
        )


def examine(
    s: Session,
    step: int,
    rollout: Rollout,
    parts: Sequence[Sequence[Microbatch]],
    scores: Sequence[Sequence[Scores]],
) -> tuple[Gap, dict[str, float]]:
    """(gap, metrics) of the scored batch, the same on every rank; without metrics at a step that
    the config leaves out. AssertionError where a packed token is not the one that was sampled.
    Collective."""
    every = s.config.guard.every
    if not (s.config.loss.scoring and every and step % every == 0):
        return Gap(), {}
    sampled = rollout.view.trained
    check_ids(rollout.samples, parts, rollout.own, sampled)
    scored = sampled_by(step - 1, rollout.samples, s.trainer.rows.scored(parts, scores))
    gap = measure(s.place, s.trainer.rows, scored)
    turns = sum(len(t.turns) for t in sampled)
    drifted = float(sum(drifted_turns(t, s.inputs.tokenizer) for t in sampled))
    return gap, gap.metrics() | s.place.merge({"drift/turns": (drifted, float(turns))})


def measure(place: Parallel, rows: GlobalRows, scored: ScoredRows) -> Gap:
    """The gap over the rows of all ranks. Collective."""
    gap_R = distance(scored.trainer_R, scored.engine_R)
    sums = [
        np.bincount(scored.regions_R, weights=weights, minlength=len(Region))
        for weights in (gap_R, np.ones(len(gap_R)))
    ]
    sum_K, count_K = rows.total(np.stack(sums).astype(np.float64))
    return Gap(
        mean=float(sum_K.sum() / max(count_K.sum(), 1.0)),
        p99=quantile(gap_R, 99, rows.total),
        max=float(place.maximum(np.array([gap_R.max(initial=0.0)]))[0]),
        regions={r.name: float(sum_K[r] / count_K[r]) for r in Region if count_K[r] > 0},
    )


def sampled_by(version: int, samples: Sequence[Sample], scored: ScoredRows) -> ScoredRows:
    """The rows that this version of the policy sampled: of tokens that an earlier one sampled,
    trainer and engine need not say the same."""
    starts_S = np.cumsum([0, *(len(sample.ids_T) for sample in samples)])
    version_T = np.concatenate([np.zeros(0, np.int32), *(s.version_T for s in samples)])
    now_R = version_T[starts_S[scored.sample_R] + scored.token_R] == version
    columns = (getattr(scored, column.name)[now_R] for column in fields(ScoredRows))
    return ScoredRows(*columns)


def distance(trainer: Floats, engine: Floats) -> Floats:
    """|trainer - engine|; infinite where that is not a number."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(trainer - engine)
    return np.where(np.isnan(gap), np.float32(np.inf), gap).astype(np.float32)


# ------------------------------------------------------------------ ids


def check_ids(
    samples: Sequence[Sample],
    parts: Sequence[Sequence[Microbatch]],
    own: Sequence[Sample] = (),
    trajectories: Sequence[Trajectory] = (),
) -> None:
    """AssertionError unless every sample is packed once, token for token as the engine sampled it.

    `own`: those of the samples that this rank has played; `trajectories`: of these, as the ledger
    wrote them.
    """
    for number, (sample, t) in enumerate(zip(own, trajectories, strict=True)):
        _same(f"trajectory {number}", "ids", sample.ids_T, t.ids_T)
        _same(f"trajectory {number}", "mask", sample.mask_T, t.turn_T >= 0)
        _same(f"trajectory {number}", "log-probs", sample.logprobs_T, t.logprobs_T)
    before = 0
    for part in parts:
        found = sorted(
            before + number for batch in part for number in _packed(batch, samples, before)
        )
        assert found == list(range(before, before + len(found))), f"samples {found} of {before}.."
        before += len(found)
    assert before == len(samples), f"{before} of {len(samples)} samples were packed"


def _packed(batch: Microbatch, samples: Sequence[Sample], before: int) -> list[int]:
    """The samples in a micro-batch, each compared with what was packed of it."""
    ends = np.cumsum(batch.lengths_S).tolist()
    found = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        number = int(batch.sample_T[start])
        if number < 0:
            assert not batch.mask_T[start:end].any(), "padding is trained on"
            continue
        sample, where = samples[before + number], f"sample {before + number}"
        _same(where, "inputs", batch.ids_T[start:end], sample.ids_T[:-1])
        _same(where, "targets", batch.targets_T[start:end], sample.ids_T[1:])
        _same(where, "mask", batch.mask_T[start:end], sample.mask_T[1:])
        _same(where, "log-probs", batch.logprobs_T[start:end], sample.logprobs_T[1:])
        found.append(number)
    return found


def _same(where: str, what: str, got: np.ndarray, want: np.ndarray) -> None:
    if not np.array_equal(got, want, equal_nan=got.dtype.kind == "f"):
        same = min(len(got), len(want))
        at = [*np.flatnonzero(got[:same] != want[:same]).tolist(), same][0]
        raise AssertionError(
            f"{where}: {what} differ from what was sampled at token {at}: "
            f"{got[at : at + 5]} instead of {want[at : at + 5]}"
        )


def drifted_turns(trajectory: Trajectory, tokenizer: Tokenizer) -> int:
    """How many sampled turns have a text that the tokenizer writes with other ids."""
    end = tokenizer.end_of_turn_ids[0]
    before = tokenizer.token_bytes(end).decode()  # a turn never stands at the start of a text
    drifted = 0
    for turn in trajectory.turns:
        sampled = trajectory.ids_T[turn.start : turn.end - turn.ended].tolist()
        drifted += tokenizer.encode(before + turn.text) != [end, *sampled]
    return drifted
