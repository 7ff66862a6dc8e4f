"""Architecture -> mcore's specs of a chunk's layers: Transformer Engine's, or local ones.

Local layers have our attention core and RMSNorm (`attention.py`); a mixture of experts has our
router (`experts.py`), and on a GPU with Transformer Engine one grouped matmul for all experts.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from rest_mega.config import ModelConfig, require
from rest_mega.trainer import experts as mixtures

if TYPE_CHECKING:
    from rest_mega.trainer.model import Architecture


def uses_transformer_engine(config: ModelConfig) -> bool:
    """Whether layers are Transformer Engine's; ConfigError when asked for and not there."""
    there = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    require(
        config.layers != "te" or there,
        "model.layers=te needs a CUDA device and transformer-engine: pip install "
        "'rest-mega[gpu]' or model.layers=local",
    )
    return there and config.layers != "local"


def block_spec(
    architecture: Architecture, config: ModelConfig, mcore: Any, stage: int | None
) -> Any:
    """The specs of this chunk's layers, and its final norm."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    te = uses_transformer_engine(config)
    first = get_transformer_layer_offset(mcore, vp_stage=stage)
    layers = range(first, first + get_num_layers_to_build(mcore, vp_stage=stage))
    specs = {
        mixture: _te_spec(architecture, mixture) if te else _local_spec(architecture, mixture)
        for mixture in {architecture.is_mixture(layer) for layer in layers}
    }
    return TransformerBlockSubmodules(
        layer_specs=[specs[architecture.is_mixture(layer)] for layer in layers],
        layer_norm=_final_norm(te),
    )


def _final_norm(te: bool) -> Any:
    from rest_mega.trainer.attention import RMSNorm

    if not te:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _spec_settings(architecture: Architecture, mixture: bool, grouped: bool) -> dict[str, Any]:
    experts = architecture.experts.count if architecture.experts and mixture else None
    return {
        "qk_layernorm": architecture.family.qk_norm,
        "num_experts": experts,
        "moe_grouped_gemm": grouped and mixture,
    }


def _te_spec(architecture: Architecture, mixture: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs

    spec = specs.get_gpt_layer_with_transformer_engine_spec(
        **_spec_settings(architecture, mixture, grouped=True)
    )
    if mixture:
        mixtures.use_router(spec.submodules.mlp)
    return spec


def _local_spec(architecture: Architecture, mixture: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs

    from rest_mega.trainer.attention import PackedAttention, RMSNorm

    spec = specs.get_gpt_layer_local_spec(**_spec_settings(architecture, mixture, grouped=False))
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if architecture.family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if mixture:
        mixtures.use_router(layer.mlp)
        # Before a mixture Transformer Engine's layers have this norm as a module too.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec
