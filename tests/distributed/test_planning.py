"""Predicted bytes of parameters, gradients and optimizer state are those of real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from rest_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from rest_mega.planning.memory import state_bytes
from rest_mega.planning.parameters import stage_parameters
from rest_mega.trainer.model import read_architecture
from tests.support.models import save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TIED, UNTIED, MIXED = "qwen3", "qwen2", "qwen3_moe_mixed"
LAYOUTS = [
    (1, {}, (TIED, UNTIED, MIXED)),
    (2, {"tensor": 2}, (TIED, UNTIED)),
    (2, {"pipeline": 2, "virtual_pipeline": 2}, (TIED, UNTIED)),
    (2, {"pipeline": 2}, (TIED, MIXED)),
    (2, {}, (TIED,)),
    (2, {"expert": 2}, (MIXED,)),
    (4, {"tensor": 2, "pipeline": 2}, (TIED, UNTIED)),
]
ADAM = OptimizerConfig(lr=1e-3)


def measured(cases: Any, sizes: Any, dtype: str) -> list[tuple[int, int, int, int, int]]:
    """(pipeline rank, bytes of parameters, of gradients, of optimizer state, data size) of a
    model."""
    from rest_mega.trainer import optimizer as optimizers
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.model import build

    place = places.start(ParallelConfig(**sizes), "cpu")
    answer = []
    for a in cases:
        chunks = optimizers.wrap(build(a, ModelConfig(dtype=dtype), place), ADAM, place)
        made = optimizers.build(chunks, ADAM, place)
        held = [p for chunk in chunks for p in chunk.module.parameters()]
        parameters = sum(p.nbytes for p in held)
        gradients = sum(p.main_grad.nbytes for p in held)
        state = 0
        for part in getattr(made, "chained_optimizers", [made]):
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    kept = part.optimizer.state[p]
                    state += kept["exp_avg"].nbytes + kept["exp_avg_sq"].nbytes
                    state += p.nbytes * (dtype == "bf16")  # its fp32 master copy
        answer.append((place.pipeline_rank, parameters, gradients, state, place.data_size))
    return answer


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("ranks", "sizes", "families"), LAYOUTS, ids=str)
def test_predicted_bytes_are_the_measured_ones(
    ranks: int, sizes: Any, families: Any, dtype: str, tmp_path: Any
) -> None:
    cases = [read_architecture(str(save_model(tmp_path / f, f))) for f in families]
    seen = run_ranks(measured, ranks, cases, sizes, dtype)
    parallel, model = ParallelConfig(**sizes), ModelConfig(dtype=dtype)
    for number, a in enumerate(cases):
        states, expected = 0, 0.0
        for rank in seen:
            stage, parameters, gradients, state, data = rank[number]
            held = stage_parameters(a, parallel, stage)
            told = state_bytes(held, model, ADAM)
            assert (parameters, gradients) == told[:2]
            states += state  # Megatron cuts its buffers anywhere: equal in sum over the ranks
            per = told[2] // held.total
            expected += per * (held.dense / data + held.expert / (data / parallel.expert))
        assert states == expected
