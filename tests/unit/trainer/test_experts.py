"""Mixtures of experts are read from Hugging Face configs; what cannot be built is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, ModelConfig, ParallelConfig
from rest_mega.trainer.experts import Experts, settings
from rest_mega.trainer.model import Architecture, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 6},
}


def read(folder: Path, kind: str = "qwen3_moe", **more: Any) -> Architecture:
    text = json.dumps(SIZES | {"model_type": kind} | KINDS[kind] | more)
    (folder / "config.json").write_text(text)
    return read_architecture(str(folder))


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    assert read(tmp_path).experts == Experts(6, 2, 32, True, (True,) * 4)
    assert read(tmp_path, "mixtral").experts == Experts(6, 2, 96, True, (True,) * 4)
    plain = read(tmp_path, norm_topk_prob=False).experts
    assert plain == Experts(6, 2, 32, False, (True,) * 4)


@pytest.mark.parametrize(
    "more",
    [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 3}],
    ids=str,
)
def test_layers_are_mixtures_where_transformers_makes_them(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    a = read(tmp_path, **more)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert [a.is_mixture(layer) for layer in range(4)] == theirs
    found = settings(a.experts, ModelConfig(), ParallelConfig(), grouped=False)
    assert found["moe_layer_freq"] == [int(x) for x in theirs]


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "in 0 layers make no mixture"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "6 experts with 7 per token"),
        ("mixtral", {"num_experts_per_tok": 1}, "the router cannot learn"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 is not supported"),
    ],
)
def test_what_is_no_mixture_or_not_supported_is_named(
    tmp_path: Path, kind: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, kind, **more)
    read(tmp_path, num_experts_per_tok=1, norm_topk_prob=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"expert": 4},
            r"parallel\.expert=4 does not divide .* 6 experts; use one of \[1, 2, 3, 6",
        ),
        ({"tensor": 2}, r"parallel\.tensor=2 of a mixture.* set parallel\.sequence=true"),
    ],
)
def test_layouts_that_cannot_spread_the_experts_are_refused(
    tmp_path: Path, sizes: dict[str, Any], message: str
) -> None:
    a = read(tmp_path)
    a.check(ParallelConfig(expert=3, tensor=2, sequence=True))
    with pytest.raises(ConfigError, match=message):
        a.check(ParallelConfig(**sizes))


def test_a_dense_size_that_no_layer_has_needs_no_divisor(tmp_path: Path) -> None:
    wide = ParallelConfig(tensor=2, sequence=True)
    read(tmp_path, intermediate_size=97).check(wide)
    with pytest.raises(ConfigError, match="97"):
        read(tmp_path, intermediate_size=97, mlp_only_layers=[0]).check(wide)


def test_a_stage_has_room_for_whole_groups_of_expert_ranks() -> None:
    assert ParallelConfig(expert=2, pipeline=2).data_parallel(4) == 2
    with pytest.raises(ConfigError, match=r"parallel\.expert=4 does not divide the 2 ranks of a"):
        ParallelConfig(expert=4, pipeline=2).data_parallel(4)


def test_a_balancing_loss_needs_a_mixture_and_is_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe_aux_loss=0\.1 needs a mixture"):
        settings(None, ModelConfig(moe_aux_loss=0.1), ParallelConfig(), grouped=False)
    with pytest.raises(ConfigError, match=r"moe_aux_loss=-1 must not be negative"):
        ModelConfig(moe_aux_loss=-1)
