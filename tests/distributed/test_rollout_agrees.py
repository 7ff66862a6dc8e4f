"""What the engine samples with published weights, the trainer scores with the same log-probs."""

from __future__ import annotations

from typing import Any

import pytest

from rest_mega.config import ParallelConfig
from rest_mega.rollout.engine import Engine
from tests.support.agreement import gaps
from tests.support.models import save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _embedded(path: str, device: Any) -> Engine:
    from rest_mega.rollout.embedded_engine import EmbeddedEngine

    return EmbeddedEngine(
        path, end_of_turn_ids=(3,), pad_id=0, batch_size=3, dtype="fp32", device=device
    )


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)],
    ids=["tp2", "pp2"],
)
def test_engine_and_trainer_agree_before_and_after_a_step(
    parallel: ParallelConfig, tmp_path: Any
) -> None:
    from rest_mega.trainer.model import read_architecture

    path = str(save_model(tmp_path, "qwen3", num_hidden_layers=2))
    for answer in run_ranks(gaps, 2, path, read_architecture(path), parallel, _embedded):
        assert answer["versions"] == [0, 1]
        assert max(answer["gaps"]) < 2e-5
        assert answer["moved"] > 0.01 or not answer["last"]
