"""A real server with two tensor ranks and experts: every rank holds what was sent to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.rollout.embedded_engine import named_as_files
from rest_mega.rollout.engine import Request, Sampling
from rest_mega.rollout.sglang_checksums import Checksums, Kind, read_heads
from rest_mega.rollout.sglang_engine import SglangEngine
from tests.support.models import save_model
from tests.support.sglang import PYTHON, server_config

pytestmark = pytest.mark.engine

RANKS_ON_A_CPU = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}


def moved(path: Path, factor: float) -> Any:
    """The checkpoint's model, every matrix scaled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim > 1 else 1.0)
    return model


@torch.no_grad()
def assert_scored(model: Any, request: Request, done: Any) -> None:
    ids = torch.from_numpy(np.concatenate([request.ids_T, done.ids_T]).astype(np.int64))
    logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
    want = logprobs.gather(1, ids[1:, None])[len(request.ids_T) - 1 :, 0]
    np.testing.assert_allclose(done.logprobs_T, want.numpy(), atol=1e-4)


def test_both_ranks_report_the_checksums_of_what_was_sent(tmp_path: Path) -> None:
    """The engine itself refuses weights whose checksums differ; that they would is shown with other
    weights."""
    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    path = save_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    config = server_config()
    config = server_config(
        restarts=0,
        environment={**config.environment, **RANKS_ON_A_CPU},
        arguments={**config.arguments, "tp_size": 2},
    )
    engine = SglangEngine(
        config, model_path=str(path), dtype="fp32", end_of_turn_ids=(3,), device="cpu",
        folder=tmp_path / "servers",
    )  # fmt: skip
    try:
        for version, factor in ((1, 1.0), (2, 1.1)):
            model = moved(path, factor)
            engine.load_parameters(named_as_files(model).items(), version)
            request = Request(np.arange(5, 20, dtype=np.int32), 12, 0)
            (done,) = engine.generate([request], Sampling())
            assert_scored(model, request, done)
            assert set(done.version_T) == {version}
        ranks = engine.checksums()[0]
    finally:
        engine.close()
    sums = {}
    for factor in (1.0, 1.1):
        sums[factor] = Checksums(Kind("cpu", 2), read_heads(str(path)))
        tensors = named_as_files(moved(path, factor)).items()
        sums[factor].add([(name, tensor.detach()) for name, tensor in tensors])
    assert sums[1.1].difference(ranks) == []
    assert sorted(sums[1.1].ranks[0]) == sorted(ranks[0])  # nothing of the server's is left out
    matrices = [name for name in ranks[0] if not name.endswith("norm.weight")]
    assert sums[1.0].difference(ranks) == sorted(matrices)
