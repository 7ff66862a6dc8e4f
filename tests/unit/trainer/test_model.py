"""Architectures are read from Hugging Face configs; what cannot be built is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, ModelConfig, ParallelConfig
from rest_mega.trainer.families import FAMILIES
from rest_mega.trainer.layers import uses_transformer_engine
from rest_mega.trainer.model import Architecture, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def read(folder: Path, model_type: str = "llama", **more: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": model_type} | more))
    return read_architecture(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_file(tmp_path: Path, family: str) -> None:
    a = read(tmp_path, family, tie_word_embeddings=True)
    assert (a.layers, a.hidden, a.ffn, a.heads, a.kv_heads) == (4, 64, 96, 8, 2)
    assert (a.vocab_size, a.max_positions, a.tied, a.norm_eps) == (300, 512, True, 1e-5)
    assert a.family == FAMILIES[family]
    assert read(tmp_path, family, head_dim=32).head_dim == 32


def test_a_head_without_a_size_of_its_own_has_its_share_of_the_hidden_size(tmp_path: Path) -> None:
    assert read(tmp_path, "llama").head_dim == 8


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    a = read(tmp_path, "llama", rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    np.testing.assert_allclose(a.rope_inv_freq, theirs.numpy(), rtol=1e-6)


def test_rotary_settings_of_older_files_are_read_too(tmp_path: Path) -> None:
    new = read(tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    old = read(tmp_path, rope_theta=5e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert old.rope_inv_freq == new.rope_inv_freq


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, r"family 'gpt2'; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding-window attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **settings)


def test_a_sliding_window_that_never_slides_is_no_obstacle(tmp_path: Path) -> None:
    read(tmp_path, "mistral", sliding_window=512)
    read(tmp_path, "mistral", sliding_window=None)
    read(tmp_path, "qwen2", sliding_window=128, use_sliding_window=False)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "{}",
        '{"model_type": "llama", "hidden_size": "big"}',
        '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}',
    ],
)
def test_a_folder_without_a_readable_config_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.path='{tmp_path}' holds no readable config"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor": 3},
            r"parallel\.tensor=3 does not divide .* 8 attention heads; use one of \[1, 2, 4, 8\]",
        ),
        (
            {"pipeline": 3},
            r"virtual_pipeline=3 does not divide the model's 4 layers; use .*\[1, 2, 4\]",
        ),
        ({"pipeline": 2, "virtual_pipeline": 4}, r"virtual_pipeline=8 does not divide .* 4 layers"),
        ({"expert": 2}, r"parallel\.expert=2 needs a mixture-of-experts"),
    ],
)
def test_layouts_that_cannot_cut_the_model_are_refused(
    tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    a = read(tmp_path)
    for good in (
        {"tensor": 8},
        {"tensor": 2, "pipeline": 4},
        {"pipeline": 2, "virtual_pipeline": 2},
    ):
        a.check(ParallelConfig(**good))
    with pytest.raises(ConfigError, match=message):
        a.check(ParallelConfig(**sizes))


def test_key_value_heads_and_ranks_must_be_multiples_of_one_another(tmp_path: Path) -> None:
    a = read(tmp_path, hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    a.check(ParallelConfig(tensor=3))
    a.check(ParallelConfig(tensor=12))
    with pytest.raises(ConfigError, match=r"parallel\.tensor=4 and 6 key-value heads"):
        a.check(ParallelConfig(tensor=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine may be there")
def test_transformer_engine_without_a_gpu_is_refused_and_never_picked() -> None:
    assert not uses_transformer_engine(ModelConfig())
    assert not uses_transformer_engine(ModelConfig(layers="local"))
    with pytest.raises(ConfigError, match=r"model\.layers=te needs a CUDA device.*layers=local"):
        uses_transformer_engine(ModelConfig(layers="te"))
