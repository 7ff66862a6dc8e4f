"""Sums over the trained rows of the global batch, and what single rows change by them; the rows
themselves stay on the ranks that have the LM head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rest_mega.losses.kl import kl
from rest_mega.records import (
    Floats,
    Ints,
    Microbatch,
    SmallInts,
    TokenCredit,
    Total,
    TrainedRows,
)
from rest_mega.trainer.forward import local_part
from rest_mega.trainer.packing import bounds
from rest_mega.trainer.parallel import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """What forward passes alone say of one micro-batch's trained rows; empty on ranks without the
    LM head, and where it is not known yet."""

    logprob_R: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    entropy_R: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    reference_R: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    """Log-prob under the reference policy, where there is one."""


@dataclass(frozen=True)
class ScoredRows:
    """The rows that this rank's LM head has scored, of all micro-batches; none without a head."""

    sample_R: Ints
    """Index into this replica's samples."""
    token_R: Ints
    """Index into the sample's ids."""
    regions_R: SmallInts
    trainer_R: Floats
    """Log-prob of the scoring pass, in nats."""
    engine_R: Floats
    """Log-prob of the rollout, in nats."""


@dataclass(frozen=True)
class TokenTrace:
    """What training made of the tokens of one sample; NaN where a token was not trained."""

    trainer_T: Floats
    """Log-prob of the scoring pass, in nats."""
    entropy_T: Floats
    """Full-vocabulary entropy of the scoring pass, in nats."""
    advantage_T: Floats
    """As the loss had it: after penalties on the reward and the token rule."""


class GlobalRows:
    """The trained rows of all replicas; every method is called by all ranks together."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel

    def region_sums(
        self,
        parts: Sequence[Sequence[Microbatch]],
        scores: Sequence[Sequence[Scores]],
        regions: int,
    ) -> tuple[Any, Any]:
        """(sum_K of entropies, count_K) per region id 0..regions-1 over the global batch, on every
        rank; tokens without scores yet are left out."""
        sums = np.zeros((2, regions))
        for batches, rows in zip(parts, scores, strict=True):
            for whole, row in zip(batches, rows, strict=True):
                batch = local_part(whole, self._parallel)
                if len(row.entropy_R):
                    found = batch.regions_T[batch.mask_T]
                    sums[0] += np.bincount(found, weights=row.entropy_R, minlength=regions)
                    sums[1] += np.bincount(found, minlength=regions)
        total = self.total(sums)
        return total[0], total[1]

    def scored(
        self, parts: Sequence[Sequence[Microbatch]], scores: Sequence[Sequence[Scores]]
    ) -> ScoredRows:
        """The rows with scores that this rank holds, and where they stand; not collective."""
        columns, before = [], 0
        for part, rows in zip(parts, scores, strict=True):
            for b, row in zip(part, rows, strict=True):
                i = self._held(b) if len(row.logprob_R) else self._held(b)[:0]
                columns.append(
                    (before + b.sample_T[i], 1 + b.positions_T[i], b.regions_T[i],
                     row.logprob_R, b.logprobs_T[i])
                )  # fmt: skip
            before += 1 + max(int(b.sample_T.max(initial=-1)) for b in part)
        return ScoredRows(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def traces(
        self,
        parts: Sequence[Sequence[Microbatch]],
        scores: Sequence[Sequence[Scores]],
        lengths_S: Sequence[int],
    ) -> list[TokenTrace]:
        """Of this replica's first samples, as many as there are `lengths_S` (tokens of each sample,
        in their order), on every rank of the replica."""
        starts_S, rows = np.cumsum([0, *lengths_S]), self.scored(parts, scores)
        held = [
            (batch.advantages_T[self._held(batch)], row.entropy_R)
            for batch, row in zip(_chain(parts), _chain(scores), strict=True)
            if len(row.logprob_R)
        ]
        whole = np.zeros((4, int(starts_S[-1])))
        if self._parallel.counts_tokens and held:  # one rank per token; the others add zeros
            advantage_R, entropy_R = (np.concatenate(column) for column in zip(*held, strict=True))
            shown = rows.sample_R < len(lengths_S)
            at_R = starts_S[rows.sample_R[shown]] + rows.token_R[shown]
            columns_R: tuple[Any, ...] = (
                rows.trainer_R,
                entropy_R,
                advantage_R,
                np.ones(len(entropy_R)),
            )
            for row_T, column_R in zip(whole, columns_R, strict=True):
                row_T[at_R] = column_R[shown]
        *columns, trained_T = self._parallel.sum_in_replica(whole)
        nan = [np.where(trained_T > 0, column, np.nan).astype(np.float32) for column in columns]
        split = (np.split(column, starts_S[1:-1])[: len(lengths_S)] for column in nan)
        return [TokenTrace(*three) for three in zip(*split, strict=True)]

    def pull_sums(
        self,
        parts: Sequence[Sequence[Microbatch]],
        weights: Sequence[Sequence[Floats]],
        regions: int,
    ) -> tuple[Any, Any]:
        """(sum_K of |weight x advantage|, number_K of tokens where it is not 0) per region id over
        the global batch, on every rank."""
        sums = np.zeros((2, regions))
        for batch, weights_T in _pairs(parts, weights):
            at_R = self._held(batch)
            found, pull_R = batch.regions_T[at_R], abs(weights_T[at_R] * batch.advantages_T[at_R])
            sums[0] += np.bincount(found, weights=pull_R, minlength=regions)
            sums[1] += np.bincount(found, weights=pull_R > 0, minlength=regions)
        total = self.total(sums)
        return total[0], total[1]

    def kl_of_samples(
        self,
        parts: Sequence[Sequence[Microbatch]],
        scores: Sequence[Sequence[Scores]],
        estimator: str,
        samples: int,
    ) -> npt.NDArray[np.float64]:
        """kl_S, the estimate of KL(scored policy || reference) in nats, summed over the trained
        tokens of each of this replica's `samples`; in their order, and the same on all ranks of the
        replica."""
        kl_S = np.zeros(samples)
        starts = bounds(samples, len(parts))[:-1]
        for start, part, rows in zip(starts, parts, scores, strict=True):
            for batch, row in zip(part, rows, strict=True):
                at_R = start + batch.sample_T[self._held(batch)]
                pair = (torch.from_numpy(x).double() for x in (row.logprob_R, row.reference_R))
                kl_S += np.bincount(at_R, kl(estimator, *pair).numpy(), samples)
        mine = kl_S if self._parallel.counts_tokens else np.zeros_like(kl_S)
        return self._parallel.sum_in_replica(mine)

    def with_advantages(
        self, parts: Sequence[Sequence[Microbatch]], advantage_S: Floats
    ) -> list[list[Microbatch]]:
        """`parts` with other advantages of this replica's samples, in their order."""
        starts = bounds(len(advantage_S), len(parts))[:-1]
        padded_S = np.append(advantage_S, np.float32(0))
        return [
            [
                replace(b, advantages_T=padded_S[np.where(b.sample_T < 0, -1, start + b.sample_T)])
                for b in part
            ]
            for start, part in zip(starts, parts, strict=True)
        ]

    def credit_tokens(
        self,
        parts: Sequence[Sequence[Microbatch]],
        scores: Sequence[Sequence[Scores]],
        weights: Sequence[Sequence[Floats]],
        rule: Callable[[TrainedRows, Total], TokenCredit],
    ) -> list[list[Microbatch]]:
        """`parts` with every trained token's advantage times its factor, and its penalty on drift,
        by `rule(rows of all parts, total)`.

        A context-parallel rank changes the tokens that it computes, a rank without the LM head
        none: no others are read. Tensor ranks have equal scores, so they decide alike.
        """
        found = [
            (batch, self._held(batch), row, weights_T)
            for (batch, weights_T), row in zip(
                _pairs(parts, weights), itertools.chain.from_iterable(scores), strict=True
            )
        ]
        columns = [
            (b.targets_T[i], b.positions_T[i], b.logprobs_T[i], row.logprob_R, row.entropy_R,
             b.advantages_T[i], w[i])
            for b, i, row, w in found
        ]  # fmt: skip
        rows = TrainedRows(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        cuts = np.cumsum([len(i) for _, i, _, _ in found])[:-1]
        due = rule(rows, self.total)
        factors, drifts = np.split(due.factor_R, cuts), np.split(due.drift_R, cuts)
        credited = (
            _credited(b, i, factor_R, drift_R)
            for (b, i, _, _), factor_R, drift_R in zip(found, factors, drifts, strict=True)
        )
        return [list(itertools.islice(credited, len(part))) for part in parts]

    def _held(self, batch: Microbatch) -> Ints:
        """Where in the whole micro-batch the rows are that this rank's LM head computes, in their
        order; none without a head."""
        if not self._parallel.is_last_stage:
            return np.empty(0, dtype=np.int32)
        numbered = replace(batch, positions_T=np.arange(len(batch.ids_T), dtype=np.int32))
        local = local_part(numbered, self._parallel)
        return local.positions_T[local.mask_T]

    def total(self, values: Any) -> Any:
        """Sum over the ranks that hold distinct tokens: one tensor rank of one stage per token."""
        return self._parallel.sum(values if self._parallel.counts_tokens else np.zeros_like(values))


def _chain(parts: Sequence[Sequence[T]]) -> list[T]:
    """The micro-batches of all parts."""
    return list(itertools.chain.from_iterable(parts))


def _pairs(
    parts: Sequence[Sequence[Microbatch]], weights: Sequence[Sequence[Floats]]
) -> list[tuple[Microbatch, Floats]]:
    """Every micro-batch of all parts with its weights_T."""
    return [pair for part in zip(parts, weights, strict=True) for pair in zip(*part, strict=True)]


def _credited(batch: Microbatch, at_R: Ints, factor_R: Floats, drift_R: Floats) -> Microbatch:
    advantages_T, drift_T = batch.advantages_T.copy(), batch.drift_T.copy()
    advantages_T[at_R] *= factor_R
    drift_T[at_R] = drift_R
    return replace(batch, advantages_T=advantages_T, drift_T=drift_T)
