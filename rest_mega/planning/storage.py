"""Bytes that a run writes to its run directory: checkpoints, exports, the engine's copy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rest_mega.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from rest_mega.planning.memory import WIDTH, state_bytes
from rest_mega.planning.parameters import Held, model_parameters, stage_parameters
from rest_mega.trainer.model import Architecture


@dataclass(frozen=True)
class Storage:
    """Bytes of tensors in run.dir at the most: while a checkpoint is saved, at the run's end."""

    checkpoint: int
    """Of one checkpoint."""
    checkpoints: int
    """How many lie there while one more is written: run.keep_checkpoints and that one."""
    export: int
    """Of one Hugging Face checkpoint."""
    exports: int
    copies: int
    """The engine's copies of the weights (rollout.sglang.keep_copy), the size of an export each."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.checkpoints * self.checkpoint + (self.exports + self.copies) * self.export


def storage(a: Architecture, config: RunConfig, players: int) -> Storage:
    """What a run of `config` with so many `players` writes."""
    run, engine = config.run, config.rollout.sglang
    exports = int(run.export)
    if run.export_every:
        exports += max(0, run.steps - 1) // run.export_every
    if config.evaluation.best:
        exports += 2  # the one before stays until the better one is whole
    kept = engine.keep_copy or engine.transport == "disk"
    copies = 2 * players * (config.rollout.engine == "sglang" and kept)  # old and new, as above
    return Storage(
        checkpoint_bytes(a, config.parallel, config.model, config.optimizer),
        run.keep_checkpoints + 1,
        model_parameters(a) * WIDTH[config.model.dtype],
        exports,
        copies,
    )


def checkpoint_bytes(
    a: Architecture, parallel: ParallelConfig, model: ModelConfig, optimizer: OptimizerConfig
) -> int:
    """Bytes of the tensors of a training checkpoint: every parameter and every piece of optimizer
    state once, whatever the layout; TP alone matters, by the padding of the vocabulary.

    mcore's distributed optimizer also writes an fp32 copy of parameters that are fp32 themselves
    (`optimizer.state.param.*` of its fully reshardable format).
    """
    whole = stage_parameters(a, ParallelConfig(), 0)
    padding = (a.padded_vocab(parallel.tensor) - a.padded_vocab(1)) * a.hidden
    held = dataclasses.replace(whole, dense=whole.dense + padding * (1 if a.tied else 2))
    parameters, _, state = state_bytes(held, model, optimizer)
    return parameters + state + _twice(held, model, optimizer)


def _twice(held: Held, model: ModelConfig, optimizer: OptimizerConfig) -> int:
    return 4 * held.total if optimizer.distributed and model.dtype == "fp32" else 0
