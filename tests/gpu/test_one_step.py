"""On a GPU: two steps agree with plain transformers, local layers and Transformer Engine's.

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

from rest_mega.config import ModelConfig
from tests.distributed.test_layouts import Layout, reference, two_steps
from tests.support.models import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_local_layers_agree_with_transformers(family: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    got, want = _both(family, tmp_path, ModelConfig(layers="local"))
    np.testing.assert_allclose(got["steps"], want["steps"], rtol=1e-4, atol=1e-5)
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
    got, want = _both(family, tmp_path, ModelConfig(layers="te", dtype="bf16"))
    loss, norm = (np.array([step[i] for step in got["steps"]]) for i in (0, 1))
    np.testing.assert_allclose(loss, [step[0] for step in want["steps"]], rtol=0.05, atol=1e-3)
    np.testing.assert_allclose(norm, [step[1] for step in want["steps"]], rtol=0.05)
    for name, expected in want["gradients"].items():
        found = got["gradients"][name].astype(np.float64)
        cosine = (found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum())
        assert cosine > 0.98, name


def _both(family: str, folder: Path, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.model import read_architecture

    path = str(save_model(folder, family))
    want = reference(path)
    got = two_steps(path, read_architecture(path), Layout(ranks=1), model)
    places.stop()
    assert set(got["gradients"]) == set(want["gradients"])
    return got, want
