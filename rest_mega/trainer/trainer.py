"""Trainer: pack samples, score them (forward only), and take optimizer steps; the only user of the
optimizer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rest_mega.config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig
from rest_mega.losses import correction, objective
from rest_mega.records import Floats, Microbatch, Sample, StepResult
from rest_mega.trainer import experts, packing
from rest_mega.trainer import model as models
from rest_mega.trainer import optimizer as optimizers
from rest_mega.trainer.forward import Runner, local_part
from rest_mega.trainer.global_rows import GlobalRows, Scores
from rest_mega.trainer.parallel import Parallel
from rest_mega.trainer.reference import Reference
from rest_mega.trainer.rows import Reports, RowMaker, Rows


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
        self._maker = RowMaker(parallel, loss)
        self._reference: Reference | None = None
        self._optimizer_config, self._loss, self._packing = optimizer, loss, packing
        self._total_steps = max(1, total_steps)
        self._temperature, self._head = temperature, model.head
        self._aux_loss = model.moe_aux_loss
        self.modules = models.build(architecture, model, parallel)
        self.optimizer_steps = 0

    def keep_reference(self) -> None:
        """The parameters as they are now are the reference policy from here on; until then there is
        none."""
        self._reference = Reference(self.modules)

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

    def time_pieces(self, timers: Any) -> None:
        """Have megatron-core time forward, backward, sends, receives and gradient sums by `timers`;
        call it after `prepare`."""
        for module in self.modules:
            module.config.timers = timers

    # ---------------------------------------------------------------- batches

    def pack(self, samples: Sequence[Sample], parts: int = 1) -> list[list[Microbatch]]:
        """This replica's samples as `parts` optimizer steps of micro-batches, equally many on every
        replica."""
        bounds = packing.bounds(len(samples), parts)
        return [self._pack(samples[a:b]) for a, b in itertools.pairwise(bounds)]

    def _pack(self, samples: Sequence[Sample]) -> list[Microbatch]:
        sizes = self.parallel.config
        multiple = packing.pad_multiple(sizes)
        pack = functools.partial(packing.pack, samples, self._packing.tokens, pad_multiple=multiple)
        fewest = len(packing.plan([len(s.ids_T) - 1 for s in samples], self._packing.tokens))
        need = int(self.parallel.maximum(np.array([max(1.0, fewest)]))[0])
        stages = sizes.pipeline if sizes.virtual_pipeline > 1 else 1
        return pack(count=-(-need // stages) * stages)

    # ---------------------------------------------------------------- scoring

    def score(self, parts: Sequence[Sequence[Microbatch]]) -> list[list[Scores]]:
        """Log-prob and full-vocabulary entropy of every trained token under the current parameters
        (with `loss.scoring=false` none, and `step` fills them in), and its log-prob under the
        reference policy where there is one."""
        scoring = self._loss.scoring
        scores = [self._score(part) if scoring else [Scores()] * len(part) for part in parts]
        if self._reference is None:
            return scores
        with self._reference.in_place():
            reference = [self._score(part) for part in parts]
        return [
            [replace(row, reference_R=r.logprob_R) for row, r in zip(*both, strict=True)]
            for both in zip(scores, reference, strict=True)
        ]

    def _score(self, batches: Sequence[Microbatch]) -> list[Scores]:
        scores = [Scores()] * len(batches)

        def keep(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> None:
            scores[index] = Scores(*_arrays(logprob_R, entropy_R))

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
        reports, refer = Reports(), self._reference is not None
        rows = [
            self._maker.rows(*one, reports, refer=refer)
            for one in zip(batches, scores, weights, strict=True)
        ]
        totals, live = self._maker.total(rows)
        if live == 0.0:
            gaps = self._reduce(reports, correction.GAP_SUMS, correction.GAP_MAXIMA)[1]
            return self._nothing_to_learn(gaps if totals.tokens else {})
        denominators = objective.denominators(totals, self._loss)

        def loss(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> Any:
            row = rows[index]
            if not self._loss.scoring:
                logprob, entropy = _arrays(logprob_R, entropy_R)
                scores[index] = replace(scores[index], logprob_R=logprob, entropy_R=entropy)
                row = self._maker.with_scores(row, scores[index], reports)
            return self._objective(row, logprob_R, entropy_R, *denominators)

        compared = objective.REFERENCE_SUMS if refer else ()
        sums = (*objective.POLICY_SUMS, *correction.GAP_SUMS, *compared)
        local = [row.batch for row in rows]
        return self._step(local, loss, reports, sums, correction.GAP_MAXIMA)

    def _objective(
        self,
        row: Rows,
        logprob_R: torch.Tensor,
        entropy_R: torch.Tensor,
        denominator: float,
        penalties: float,
    ) -> Any:
        """The weighted surrogate of a micro-batch over its denominator, the penalties over
        theirs."""
        loss, sums, maxima = objective.policy_objective(
            logprob_R,
            entropy_R,
            row.old_logprob_R,
            row.advantages_R,
            row.weights_R,
            row.sequences,
            self._loss,
            denominator,
        )
        penalty, more = objective.penalty_objective(
            logprob_R,
            entropy_R,
            row.old_logprob_R,
            row.reference_R,
            row.drift_R,
            row.shares_R,
            self._loss,
            penalties,
        )
        return loss + penalty, sums | more, maxima

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
        if self._aux_loss:
            tokens = self.rows.total(np.array([float(sum(len(b.ids_T) for b in batches))]))
            experts.scale_aux_loss(self.modules, self._aux_loss, float(tokens[0]))
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


def _arrays(*tensors: torch.Tensor) -> list[Floats]:
    return [x.detach().float().cpu().numpy() for x in tensors]


__all__ = ["Scores", "Trainer"]
