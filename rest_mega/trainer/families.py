"""Families of decoders: what sets each apart from Llama, and what no family may have.

A family of your own, in a file named by `environment.modules`:

    from rest_mega.trainer.families import Family, add_family

    add_family("seed_oss", Family(qkv_bias=True))

It must be Llama's block (RMSNorm before attention and before a SwiGLU layer, rotary positions over
the whole head, grouped queries) with the differences that `Family` names, and Llama's names of
tensors; anything else needs code in model.py, layers.py and sync/names.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rest_mega.config import require


@dataclass(frozen=True)
class Family:
    """What sets a family of decoders apart from Llama."""

    qkv_bias: bool = False
    """Queries, keys and values have a bias; the output projection has none."""
    qk_norm: bool = False
    """An RMSNorm over each head of queries and keys, before rotation."""
    experts: str = ""
    """The name of a layer's mixture in Hugging Face files; empty: all layers are dense."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts="mlp"),
    "mixtral": Family(experts="block_sparse_moe"),
}
"""By the `model_type` of a Hugging Face config.json."""


def add_family(name: str, family: Family) -> None:
    """Read a config.json of model_type `name` as this family; ConfigError where the name is
    taken."""
    require(name not in FAMILIES, f"model family {name!r} is there already")
    FAMILIES[name] = family


def check_supported(config: Any, family: Family, path: str) -> None:
    """ConfigError where the Hugging Face `config` in the folder `path` has what no layer of ours
    computes, or has not what its family promises."""
    bias = getattr(config, "attention_bias", family.qkv_bias)
    unsupported = {
        "sliding-window attention": bool(getattr(config, "sliding_window", None))
        and getattr(config, "use_sliding_window", True)
        and config.sliding_window < config.max_position_embeddings,
        f"attention_bias={bias}": bool(bias) != family.qkv_bias,
        "attention_out_bias": bool(getattr(config, "attention_out_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
    }
    require(
        not any(unsupported.values()),
        f"{path}/config.json: {[k for k, v in unsupported.items() if v]} not supported",
    )
