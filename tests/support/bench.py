"""Fresh trainers on a run's ranks with a small checkpoint's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from rest_mega.records import Sample
from tests.support.models import save_model

SGD = OptimizerConfig(
    name="sgd", lr=1.0, weight_decay=0.0, beta1=0.0, clip_grad=0.0, distributed=False
)
"""One step of it is the gradient."""
TEMPERATURE = 0.8


def small_case(folder: Path, family: str = "qwen3") -> tuple[str, Any]:
    """(path, architecture) of a two-layer model; ranks need not import transformers."""
    from rest_mega.trainer.model import read_architecture

    path = str(save_model(folder, family, num_hidden_layers=2))
    return path, read_architecture(path)


class Bench:
    """A run on this rank that makes fresh trainers with the checkpoint's parameters."""

    def __init__(self, case: tuple[str, Any], **sizes: int) -> None:
        from rest_mega.trainer import parallel as places

        self.path, self.architecture = case
        self.place = places.start(ParallelConfig(**sizes), "cpu")

    def trainer(
        self,
        optimizer: OptimizerConfig = SGD,
        dtype: str = "fp32",
        tokens: int = 4096,
        loss: LossConfig = LossConfig(),  # noqa: B008  # frozen
        path: str = "",
        aux_loss: float = 0.0,
    ) -> Any:
        """A trainer with the parameters in `path`; empty: the bench's own checkpoint."""
        from rest_mega.sync.load import load, open_source
        from rest_mega.trainer.trainer import Trainer

        trainer = Trainer(
            self.architecture,
            self.place,
            model=ModelConfig(path=self.path, dtype=dtype, moe_aux_loss=aux_loss),
            optimizer=optimizer,
            loss=loss,
            packing=PackingConfig(tokens=tokens),
            temperature=TEMPERATURE,
            total_steps=4,
        )
        source = open_source(path or self.path, "load", self.architecture, 0)
        load(trainer.modules, source, self.architecture, self.place)
        trainer.prepare()
        return trainer

    def step(self, trainer: Any, samples: list[Sample]) -> Any:
        """A policy step with all weights one."""
        (batches,) = trainer.pack(samples)
        (scores,) = trainer.score([batches])
        return trainer.step(batches, scores, [np.ones(len(b.ids_T), np.float32) for b in batches])


def parameters(trainer: Any) -> dict[str, np.ndarray]:
    """Copies by mcore name, of a trainer with one chunk."""
    return {n: p.detach().float().numpy().copy() for n, p in trainer.modules[0].named_parameters()}


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    """The step between two copies, as one vector."""
    return np.concatenate([(after[n].astype(np.float64) - before[n]).ravel() for n in before])
