"""ModelConfig -> this rank's chunks of a megatron-core GPTModel, shaped after a Hugging Face
config.

A chunk returns hidden states on the last stage, not logits: the head of `losses.head` takes the
trained rows alone and never stores logits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from rest_mega.config import ConfigError, ModelConfig, ParallelConfig, require
from rest_mega.trainer import experts as mixtures
from rest_mega.trainer.experts import Experts
from rest_mega.trainer.families import FAMILIES, Family, check_supported
from rest_mega.trainer.layers import block_spec, uses_transformer_engine
from rest_mega.trainer.parallel import Parallel

VOCABULARY_MULTIPLE = 128
"""Embedding rows are padded to this multiple (times TP beyond it), whatever the layout, as Megatron
does."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder, read from a Hugging Face config."""

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    norm_eps: float
    max_positions: int
    rope_inv_freq: tuple[float, ...]
    """Rotary frequencies, scaling (linear, llama3) included."""
    experts: Experts | None = None

    def is_mixture(self, layer: int) -> bool:
        """Whether the feed-forward part of `layer` (from 0) is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def padded_vocab(self, tensor: int) -> int:
        """Embedding rows with padding: a multiple of 128 and of the tensor-parallel size."""
        multiple = VOCABULARY_MULTIPLE
        while multiple % tensor:
            multiple += VOCABULARY_MULTIPLE
        return -(-self.vocab_size // multiple) * multiple

    def check(self, parallel: ParallelConfig) -> None:
        """ConfigError unless this decoder can be cut as `parallel` says."""
        tp, stages = parallel.tensor, parallel.pipeline * parallel.virtual_pipeline
        _divides("parallel.tensor", tp, "attention heads", self.heads)
        if self.experts is None or not all(self.experts.layers):
            _divides("parallel.tensor", tp, "feed-forward size", self.ffn)
        _divides("parallel.pipeline x parallel.virtual_pipeline", stages, "layers", self.layers)
        require(
            self.kv_heads % tp == 0 or tp % self.kv_heads == 0,
            f"parallel.tensor={tp} and {self.kv_heads} key-value heads: one must be a multiple "
            "of the other",
        )
        if self.experts is not None:
            self.experts.check(parallel)
        require(
            self.experts is not None or parallel.expert == 1,
            f"parallel.expert={parallel.expert} needs a mixture-of-experts model; use 1",
        )


def _divides(key: str, value: int, what: str, size: int) -> None:
    good = [d for d in range(1, size + 1) if size % d == 0]
    require(
        size % value == 0,
        f"{key}={value} does not divide the model's {size} {what}; use one of {good}",
    )


def read_architecture(path: str, key: str = "model.path") -> Architecture:
    """The sizes in `path`/config.json; ConfigError, which names the config's `key`, for an unknown
    family or an unsupported feature."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers' own validation raises kinds of its own
        raise ConfigError(f"{key}={path!r} holds no readable config.json ({error})") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"{key}={path!r} is of family {config.model_type!r}; known: {', '.join(FAMILIES)}; "
            "a file of environment.modules may add one (docs/extending.md)"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    check_supported(config, family, path)
    return Architecture(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        rope_inv_freq=_rope(config, head_dim, path),
        experts=mixtures.read_experts(config, path) if family.experts else None,
    )


def _rope(config: Any, head_dim: int, path: str) -> tuple[float, ...]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return tuple((1.0 / rope["rope_theta"] ** exponents).tolist())
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"{path}/config.json: rope_type={kind!r} is not supported; known: default, linear, "
            "llama3"
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return tuple(frequencies.tolist())


def transformer_config(architecture: Architecture, config: ModelConfig, parallel: Parallel) -> Any:
    """mcore's TransformerConfig; settings that the installed mcore does not have are left out."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    sizes, cuda = parallel.config, parallel.device.type == "cuda"
    te = uses_transformer_engine(config)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    interleaved = sizes.virtual_pipeline > 1
    settings: dict[str, Any] = {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "ffn_hidden_size": architecture.ffn,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_heads,
        "kv_channels": architecture.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.family.qkv_bias,
        "qk_layernorm": architecture.family.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.dtype == "bf16",
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline if interleaved else None,
        "context_parallel_size": sizes.context,
        "sequence_parallel": sizes.sequence,
        "use_cpu_initialization": not cuda,
        "perform_initialization": False,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "deallocate_pipeline_outputs": True,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": cuda,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": cuda,
        "bias_activation_fusion": cuda,
        "apply_rope_fusion": te,
        "gradient_accumulation_fusion": cuda
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        "finalize_model_grads_func": finalize_model_grads,
        **_recompute(config.recompute),
        **mixtures.settings(architecture.experts, config, sizes, grouped=te),
    }
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{key: value for key, value in settings.items() if key in known})


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {"recompute_granularity": "selective"} if mode == "selective" else {}


def build(architecture: Architecture, config: ModelConfig, parallel: Parallel) -> list[Any]:
    """This rank's model chunks (one, or `virtual_pipeline` many), parameters not yet set.

    Each maps ids_T to hidden states [T, 1, D] (T / TP rows under sequence parallelism) on the last
    stage.
    """
    architecture.check(parallel.config)
    mcore = transformer_config(architecture, config, parallel)
    count = parallel.config.virtual_pipeline
    stages = [None] if count == 1 else list(range(count))
    return [_chunk(architecture, config, mcore, parallel, stage) for stage in stages]


def _chunk(
    architecture: Architecture,
    config: ModelConfig,
    mcore: Any,
    parallel: Parallel,
    stage: int | None,
) -> Any:
    from megatron.core.models.gpt import GPTModel

    class PolicyModel(GPTModel):  # type: ignore[misc]
        """GPTModel whose last stage ends with the final norm."""

        def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    last = parallel.config.virtual_pipeline - 1
    model = PolicyModel(
        config=mcore,
        transformer_layer_spec=block_spec(architecture, config, mcore, stage),
        vocab_size=architecture.padded_vocab(parallel.config.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel.is_first_stage and stage in (None, 0),
        post_process=parallel.is_last_stage and stage in (None, last),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        pg_collection=parallel.groups,
        vp_stage=stage,
    )
    _mark_shards(model)
    mixtures.mark(model)
    model.rotary_pos_emb.inv_freq = torch.tensor(architecture.rope_inv_freq, device=parallel.device)
    return model.to(parallel.device)


def _mark_shards(model: Any) -> None:
    """Mark sharded weights for the gradient norm: mcore does so while it initialises them, which we
    skip; biases it marks in any case."""
    from megatron.core import tensor_parallel as tp

    axes = {tp.VocabParallelEmbedding: 0, tp.ColumnParallelLinear: 0, tp.RowParallelLinear: 1}
    for module in model.modules():
        axis, weight = axes.get(type(module)), getattr(module, "weight", None)
        if axis is not None and weight is not None and not hasattr(weight, "partition_dim"):
            tp.set_tensor_model_parallel_attributes(weight, True, axis, 1)


def head_weight(model: Any) -> torch.Tensor:
    """The LM head's rows on this rank, [V, D], of a chunk that has the last stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight
