"""On a GPU: one step agrees with plain transformers, local layers and Transformer Engine's.

    python -m pytest -m gpu tests/gpu

The same comparison as tests/distributed/test_layouts.py, in this process on one device.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ModelConfig, ParallelConfig
from tests.distributed.test_layouts import one_step, reference
from tests.support.models import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_local_layers_agree_with_transformers(family: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    got, want = _step(family, tmp_path, ModelConfig(layers="local"))
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    np.testing.assert_allclose(got["entropy_K"], want["entropy_K"], rtol=1e-4)
    for name, expected in want["gradients"].items():
        bound = 1e-4 * np.abs(expected).max()
        found = got["gradients"][name]
        np.testing.assert_allclose(found, expected, atol=bound, rtol=0, err_msg=name)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="transformer-engine is not installed",
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_transformer_engines_layers_agree_to_bfloat16(family: str, tmp_path: Path) -> None:
    got, want = _step(family, tmp_path, ModelConfig(layers="te", dtype="bf16"))
    assert got["loss"] == pytest.approx(want["loss"], rel=0.05)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.05)
    np.testing.assert_allclose(got["entropy_K"], want["entropy_K"], rtol=0.02)
    for name, expected in want["gradients"].items():
        found = got["gradients"][name].astype(np.float64)
        cosine = (found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum())
        assert cosine > 0.98, name


def _step(family: str, folder: Path, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    path = str(save_model(folder, family))
    want = reference(path)
    got = one_step(path, ParallelConfig(), 64, False, 0, model)
    assert set(got["gradients"]) == set(want["gradients"])
    return got, want
