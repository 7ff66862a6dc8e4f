"""Tiny random Hugging Face checkpoints of each family, and random samples for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.records import Sample

VOCAB = 300

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False, "router_aux_loss_coef": 0.0}
_QWEN_EXPERTS = _EXPERTS | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE}),
    "llama_linear": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "smollm2": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
    "qwen3_moe": ("Qwen3Moe", _QWEN_EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        _QWEN_EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0, 1]},
    ),
    "mixtral": ("Mixtral", _EXPERTS | {"num_local_experts": 4}),
}


def save_model(folder: Path, family: str, **more: Any) -> Path:
    """A random checkpoint of a family of ours in `folder`."""
    name, settings = FAMILIES[family]
    return save_random(folder, name, **(settings | more))


def save_random(folder: Path, name: str, **settings: Any) -> Path:
    """A random checkpoint of transformers' `name` in `folder`; spread wider than usual, so that
    probabilities differ from uniform."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **(_SIZES | {"initializer_range": 0.1} | settings)
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(
                ("norm.weight", "bias")
            ):  # ones and zeros would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def random_samples(count: int = 8, seed: int = 0) -> list[Sample]:
    """Samples of 6 to 50 tokens with random masks, regions, rollout log-probs and advantages, and
    rewards (of which the advantages know nothing) in groups of four."""
    rng, rewards = np.random.default_rng(seed), np.random.default_rng((seed, 1)).normal(size=count)
    samples = []
    for number in range(count):
        length = int(rng.integers(6, 50))
        samples.append(
            Sample(
                ids_T=rng.integers(0, VOCAB, length).astype(np.int32),
                mask_T=rng.random(length) < 0.6,
                regions_T=rng.integers(0, 4, length).astype(np.int8),
                logprobs_T=rng.normal(-5.5, 0.5, length).astype(np.float32),
                version_T=np.zeros(length, np.int32),
                advantage=float(rng.normal()),
                reward=float(rewards[number]),
                group=number // 4,
            )
        )
    return samples
