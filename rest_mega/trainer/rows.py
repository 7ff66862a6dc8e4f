"""A micro-batch, its scores and weights -> what its trained rows on this rank bring to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rest_mega.config import LossConfig
from rest_mega.losses import correction, objective
from rest_mega.losses.policy import Sequences
from rest_mega.records import Floats, Microbatch
from rest_mega.trainer.forward import local_part
from rest_mega.trainer.global_rows import Scores
from rest_mega.trainer.parallel import Parallel


@dataclass(frozen=True)
class Rows:
    """What one micro-batch's trained rows on this rank bring to the loss, but the log-probs."""

    batch: Microbatch
    """This context rank's part."""
    sequences: Sequences
    old_logprob_R: torch.Tensor
    """The engine's until the trainer's are known."""
    reference_R: torch.Tensor | None
    """Log-probs under the reference policy; None: no reference."""
    advantages_R: torch.Tensor
    weights_R: torch.Tensor
    """Token weight x factor of the aggregation x correction."""
    shares_R: torch.Tensor
    """Factor of the aggregation alone, for the penalties."""
    drift_R: torch.Tensor
    """KL-Cov's coefficients."""
    totals: objective.Totals
    """Of the whole micro-batch."""


@dataclass
class Reports:
    """What the loss closure measured on this rank: sums with counts, and maxima, by name."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: float = 0.0

    def add(
        self, loss: torch.Tensor, sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]
    ) -> None:
        """Add one micro-batch."""
        self.loss += float(loss.detach())
        for name, pair in sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros(2, device=pair.device)) + pair
        for name, value in maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)


class RowMaker:
    """Makes the rows of every micro-batch of a run; `total` is called by all ranks together."""

    def __init__(self, parallel: Parallel, loss: LossConfig) -> None:
        self._parallel, self._loss = parallel, loss

    def rows(
        self, whole: Microbatch, scores: Scores, weights_T: Floats, reports: Reports, *, refer: bool
    ) -> Rows:
        """What this rank's trained rows of a micro-batch bring to the loss; `refer`: the scores
        hold the reference's log-probs (where this rank has the LM head)."""
        batch, head = local_part(whole, self._parallel), self._parallel.is_last_stage
        factors_T, totals = self._factors(whole, weights_T)
        shares_T, _ = self._factors(whole, np.ones_like(weights_T))
        rows = Rows(
            batch=batch,
            sequences=self._sequences(whole, batch),
            old_logprob_R=self._tensor(batch.logprobs_T[batch.mask_T]),
            reference_R=self._tensor(scores.reference_R) if refer and head else None,
            advantages_R=self._tensor(batch.advantages_T[batch.mask_T]),
            weights_R=self._cut(whole, factors_T),
            shares_R=self._cut(whole, shares_T),
            drift_R=self._tensor(batch.drift_T[batch.mask_T]),
            totals=totals,
        )
        return self.with_scores(rows, scores, reports) if head and self._loss.scoring else rows

    def with_scores(self, rows: Rows, scores: Scores, reports: Reports) -> Rows:
        """`rows`, which hold the engine's log-probs, corrected for their gap to the trainer's."""
        trainer_R, engine_R = self._tensor(scores.logprob_R), rows.old_logprob_R
        factor_R, sums, maxima = correction.correct(trainer_R, engine_R, self._loss, rows.sequences)
        reports.add(torch.zeros(()), sums, maxima)
        old_R = engine_R if self._loss.old_logprobs == "rollout" else trainer_R
        return replace(rows, old_logprob_R=old_R, weights_R=rows.weights_R * factor_R)

    def total(self, rows: Sequence[Rows]) -> tuple[objective.Totals, float]:
        """(totals of the global batch, sum of its corrected weights and penalty coefficients: 0
        where there is nothing to learn), the same on every rank."""
        mine = np.zeros(4)
        if self._parallel.counts_tokens:
            mine[3] = sum(float((r.weights_R + r.drift_R).double().sum()) for r in rows)
            if self._parallel.context_rank == 0:  # every context rank has whole ones' totals
                mine[:3] = np.sum([astuple(r.totals) for r in rows], axis=0)
        weights, tokens, sequences, live = self._parallel.sum(mine).tolist()
        live += (self._loss.kl + self._loss.entropy_bonus) * tokens
        return objective.Totals(weights, tokens, sequences), live

    def _factors(self, whole: Microbatch, weights_T: Floats) -> tuple[Floats, objective.Totals]:
        return objective.token_factors(weights_T, whole.mask_T, whole.sample_T, self._loss)

    def _sequences(self, whole: Microbatch, local: Microbatch) -> Sequences:
        """Where this rank's trained rows belong among the sequences of the whole micro-batch."""
        ids_S, tokens_S = np.unique(whole.sample_T[whole.mask_T], return_counts=True)
        index_R = np.searchsorted(ids_S, local.sample_T[local.mask_T])
        group = self._parallel.groups.cp if self._parallel.config.context > 1 else None
        return Sequences(self._tensor(index_R), self._tensor(tokens_S), group)

    def _cut(self, whole: Microbatch, values_T: Floats) -> torch.Tensor:
        """The trained rows of `values_T`, cut as context parallelism cuts the micro-batch."""
        local = local_part(replace(whole, advantages_T=values_T), self._parallel)
        return self._tensor(local.advantages_T[local.mask_T])

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._parallel.device)
