"""Trainer: pack samples, score them (forward only), and take optimizer steps; the only user of the
optimizer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rest_mega.config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig
from rest_mega.losses import correction, objective
from rest_mega.losses.policy import Sequences
from rest_mega.records import Floats, Microbatch, Sample, StepResult
from rest_mega.trainer import model as models
from rest_mega.trainer import optimizer as optimizers
from rest_mega.trainer import packing
from rest_mega.trainer.forward import Runner, local_part
from rest_mega.trainer.global_rows import GlobalRows, Scores
from rest_mega.trainer.parallel import Parallel


@dataclass(frozen=True)
class Rows:
    """What one micro-batch's trained rows on this rank bring to the loss, but the log-probs."""

    batch: Microbatch
    """This context rank's part."""
    sequences: Sequences
    old_logprob_R: torch.Tensor
    """The engine's until the trainer's are known."""
    advantages_R: torch.Tensor
    weights_R: torch.Tensor
    """Token weight x factor of the aggregation x correction."""
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


class Trainer:
    """The policy on this rank and its optimizer; every method is called by all ranks together."""

    def __init__(
        self,
        architecture: models.Architecture,
        parallel: Parallel,
        *,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        packing: PackingConfig,
        temperature: float,
        total_steps: int,
    ) -> None:
        """`total_steps`: optimizer steps of the whole run, for the schedules; `temperature`: of the
        rollouts."""
        self.architecture, self.parallel = architecture, parallel
        self.rows = GlobalRows(parallel)
        self._optimizer_config, self._loss, self._packing = optimizer, loss, packing
        self._total_steps = max(1, total_steps)
        self._temperature, self._head = temperature, model.head
        self.modules = models.build(architecture, model, parallel)
        self.optimizer_steps = 0

    def prepare(self) -> None:
        """Wrap the modules and build the optimizer; call it once, after the parameters are set."""
        self.chunks = optimizers.wrap(self.modules, self._optimizer_config, self.parallel)
        mcore, many = self.modules[0].config, len(self.chunks) > 1
        mcore.no_sync_func = [c.no_sync for c in self.chunks] if many else self.chunks[0].no_sync
        if self.chunks[0].ddp_config.overlap_grad_reduce:
            starts = [c.start_grad_sync for c in self.chunks]
            mcore.grad_sync_func = starts if many else starts[0]
        self.optimizer = optimizers.build(self.chunks, self._optimizer_config, self.parallel)
        self._runner = Runner(
            self.chunks, self.parallel, self.architecture.vocab_size, self._temperature, self._head
        )

    # ---------------------------------------------------------------- batches

    def pack(self, samples: Sequence[Sample], parts: int = 1) -> list[list[Microbatch]]:
        """This replica's samples as `parts` optimizer steps of micro-batches, equally many on every
        replica."""
        bounds = [len(samples) * i // parts for i in range(parts + 1)]
        return [self._pack(samples[a:b]) for a, b in itertools.pairwise(bounds)]

    def _pack(self, samples: Sequence[Sample]) -> list[Microbatch]:
        sizes = self.parallel.config
        multiple = sizes.tensor if sizes.sequence and sizes.context == 1 else 1
        pack = functools.partial(packing.pack, samples, self._packing.tokens, pad_multiple=multiple)
        fewest = len(packing.plan([len(s.ids_T) - 1 for s in samples], self._packing.tokens))
        need = int(self.parallel.maximum(np.array([max(1.0, fewest)]))[0])
        stages = sizes.pipeline if sizes.virtual_pipeline > 1 else 1
        return pack(count=-(-need // stages) * stages)

    # ---------------------------------------------------------------- scoring

    def score(self, parts: Sequence[Sequence[Microbatch]]) -> list[list[Scores]]:
        """Log-prob and full-vocabulary entropy of every trained token under the current
        parameters; with `loss.scoring=false` empty ones, which `step` fills in."""
        return [self._score(batches) for batches in parts]

    def _score(self, batches: Sequence[Microbatch]) -> list[Scores]:
        empty = np.empty(0, dtype=np.float32)
        scores = [Scores(empty, empty)] * len(batches)
        if not self._loss.scoring:
            return scores

        def keep(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> None:
            scores[index] = _scores(logprob_R, entropy_R)

        for chunk in self.chunks:
            chunk.eval()
        self._runner.score(self._local(batches), keep)
        return scores

    def _local(self, batches: Sequence[Microbatch]) -> list[Microbatch]:
        return [local_part(batch, self.parallel) for batch in batches]

    # ---------------------------------------------------------------- optimizer steps

    def step(
        self, batches: Sequence[Microbatch], scores: list[Scores], weights: Sequence[Floats]
    ) -> StepResult:
        """One policy-gradient step. `weights[m]` holds weights_T of micro-batch m (whole, before
        any CP cut). With `loss.scoring=false` it writes the scores of its own forward pass into
        `scores`."""
        reports = Reports()
        rows = [self._rows(*one, reports) for one in zip(batches, scores, weights, strict=True)]
        totals, live = self._totals(rows)
        if live == 0.0:
            gaps = self._reduce(reports, correction.GAP_SUMS, correction.GAP_MAXIMA)[1]
            return self._nothing_to_learn(gaps if totals.tokens else {})
        denominator = objective.AGGREGATIONS[self._loss.aggregation](totals, self._loss)

        def loss(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> Any:
            row = rows[index]
            if not self._loss.scoring:
                scores[index] = _scores(logprob_R, entropy_R)
                row = self._with_scores(row, scores[index], reports)
            return objective.policy_objective(
                logprob_R,
                entropy_R,
                row.old_logprob_R,
                row.advantages_R,
                row.weights_R,
                row.sequences,
                self._loss,
                denominator,
            )

        sums = objective.POLICY_SUMS + correction.GAP_SUMS
        local = [row.batch for row in rows]
        return self._step(local, loss, reports, sums, correction.GAP_MAXIMA)

    def _rows(self, whole: Microbatch, scores: Scores, weights_T: Floats, reports: Reports) -> Rows:
        """What this rank's trained rows of a micro-batch bring to the loss."""
        factors_T, totals = objective.token_factors(
            weights_T, whole.mask_T, whole.sample_T, self._loss
        )
        batch = local_part(whole, self.parallel)
        mask_T = batch.mask_T
        engine_R = self._tensor(batch.logprobs_T[mask_T])
        weights_R = self._tensor(self._local_array(whole, factors_T)[mask_T])
        advantages_R = self._tensor(batch.advantages_T[mask_T])
        sequences = self._sequences(whole, batch)
        rows = Rows(batch, sequences, engine_R, advantages_R, weights_R, totals)
        known = self.parallel.is_last_stage and self._loss.scoring
        return self._with_scores(rows, scores, reports) if known else rows

    def _with_scores(self, rows: Rows, scores: Scores, reports: Reports) -> Rows:
        """`rows`, which hold the engine's log-probs, corrected for their gap to the trainer's."""
        trainer_R, engine_R = self._tensor(scores.logprob_R), rows.old_logprob_R
        factor_R, sums, maxima = correction.correct(trainer_R, engine_R, self._loss, rows.sequences)
        reports.add(torch.zeros(()), sums, maxima)
        old_R = engine_R if self._loss.old_logprobs == "rollout" else trainer_R
        return replace(rows, old_logprob_R=old_R, weights_R=rows.weights_R * factor_R)

    def _sequences(self, whole: Microbatch, local: Microbatch) -> Sequences:
        """Where this rank's trained rows belong among the sequences of the whole micro-batch."""
        ids_S, tokens_S = np.unique(whole.sample_T[whole.mask_T], return_counts=True)
        index_R = np.searchsorted(ids_S, local.sample_T[local.mask_T])
        group = self.parallel.groups.cp if self.parallel.config.context > 1 else None
        return Sequences(self._tensor(index_R), self._tensor(tokens_S), group)

    def _totals(self, rows: Sequence[Rows]) -> tuple[objective.Totals, float]:
        """(totals of the global batch, its sum of corrected weights), the same on every rank."""
        mine = np.zeros(4)
        if self.parallel.counts_tokens:
            mine[3] = sum(float(r.weights_R.double().sum()) for r in rows)
            if self.parallel.context_rank == 0:  # every context rank has the totals of whole ones
                mine[:3] = np.sum([astuple(r.totals) for r in rows], axis=0)
        weights, tokens, sequences, live = self.parallel.sum(mine).tolist()
        return objective.Totals(weights, tokens, sequences), live

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.parallel.device)

    def supervised_step(self, batches: Sequence[Microbatch]) -> StepResult:
        """One step of next-token cross-entropy on the trained tokens."""
        local = self._local(batches)
        tokens = sum(float(b.mask_T.sum()) for b in local)
        denominator = float(self.rows.total(np.array([tokens]))[0])

        def loss(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> Any:
            return objective.supervised_objective(
                logprob_R, torch.ones_like(logprob_R), denominator
            )

        if denominator == 0.0:
            return self._nothing_to_learn({})
        return self._step(local, loss, Reports(), (), ())

    def _nothing_to_learn(self, metrics: dict[str, float]) -> StepResult:
        """A batch without a weighted token: the schedule goes on, parameters and moments stay."""
        lr = self._next_lr()
        return StepResult(loss=0.0, grad_norm=0.0, lr=lr, skipped=True, metrics=metrics)

    def _next_lr(self) -> float:
        self.optimizer_steps += 1
        return optimizers.set_lr(
            self.optimizer, self._optimizer_config, self.optimizer_steps, self._total_steps
        )

    def _local_array(self, batch: Microbatch, values_T: Floats) -> Floats:
        """`values_T` cut as the micro-batch itself is cut by context parallelism."""
        return local_part(replace(batch, advantages_T=values_T), self.parallel).advantages_T

    def _step(
        self,
        batches: list[Microbatch],
        loss: Callable[[int, torch.Tensor, torch.Tensor], Any],
        reports: Reports,
        sums: Sequence[str],
        maxima: Sequence[str],
    ) -> StepResult:
        def closure(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> torch.Tensor:
            value, summed, largest = loss(index, logprob_R, entropy_R)
            reports.add(value, summed, largest)
            return value

        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._runner.train(batches, closure)
        lr = self._next_lr()
        norm, taken = optimizers.apply(self.optimizer, self._optimizer_config)
        total, metrics = self._reduce(reports, sums, maxima)
        return StepResult(loss=total, grad_norm=norm, lr=lr, skipped=not taken, metrics=metrics)

    def _reduce(
        self, reports: Reports, sums: Sequence[str], maxima: Sequence[str]
    ) -> tuple[float, dict[str, float]]:
        """Global loss and metrics on every rank: two host collectives for all names together."""
        count = self.parallel.counts_tokens
        row = [reports.loss if count else 0.0]
        for name in sums:
            row += reports.sums[name].tolist() if count and name in reports.sums else [0.0, 0.0]
        total = self.parallel.sum(np.array(row))
        metrics = {n: total[1 + 2 * i] / max(total[2 + 2 * i], 1.0) for i, n in enumerate(sums)}
        if maxima:
            largest = [
                float(reports.maxima.get(n, torch.tensor(-np.inf))) if count else -np.inf
                for n in maxima
            ]
            top = self.parallel.maximum(np.array(largest))
            metrics |= {n: float(v) for n, v in zip(maxima, top, strict=True)}
        return float(total[0]), {name: float(value) for name, value in metrics.items()}


def _scores(logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> Scores:
    return Scores(*(x.detach().float().cpu().numpy() for x in (logprob_R, entropy_R)))


__all__ = ["Scores", "Trainer"]
