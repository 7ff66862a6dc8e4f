"""Mixtures of experts: their sizes from a Hugging Face config, mcore's settings, the router.

Experts are spread over `parallel.expert` ranks of TP x CP x DP. An expert is never cut: a rank
computes whole experts for the tokens that come to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rest_mega.config import ModelConfig, ParallelConfig, require


@dataclass(frozen=True)
class Experts:
    """The sizes of a mixture of experts."""

    count: int
    per_token: int
    ffn: int
    """Feed-forward size of one expert."""
    normalised: bool
    """Whether the chosen experts' probabilities are scaled to sum to one."""
    layers: tuple[bool, ...]
    """Per layer: a mixture, or a dense feed-forward layer."""

    def check(self, parallel: ParallelConfig) -> None:
        """ConfigError unless the experts can be spread as `parallel` says."""
        good = [n for n in range(1, self.count + 1) if self.count % n == 0]
        require(
            self.count % parallel.expert == 0,
            f"parallel.expert={parallel.expert} does not divide the model's {self.count} experts; "
            f"use one of {good}",
        )
        require(
            parallel.tensor == 1 or parallel.sequence,
            f"parallel.tensor={parallel.tensor} of a mixture-of-experts model needs sequence "
            "parallelism (Megatron-Core trains experts in no other way); set "
            "parallel.sequence=true",
        )


def read_experts(config: Any, path: str) -> Experts:
    """The mixture of a Hugging Face Mixtral or Qwen3-MoE config; ConfigError for an unsupported
    one."""
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    count, per_token = config.num_local_experts, config.num_experts_per_tok
    normalised = bool(getattr(config, "norm_topk_prob", True))
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))
    require(
        count >= 1 and 1 <= per_token <= count and any(layers),
        f"{path}/config.json: {count} experts with {per_token} per token in {sum(layers)} layers "
        "make no mixture; a model without one belongs to a dense family such as qwen3",
    )
    require(
        per_token > 1 or not normalised,
        f"{path}/config.json: with num_experts_per_tok=1 and normalised probabilities every "
        "probability is 1 and the router cannot learn; not supported",
    )
    require(
        not getattr(config, "router_jitter_noise", 0.0),
        f"{path}/config.json: router_jitter_noise={getattr(config, 'router_jitter_noise', 0.0)} "
        "is not supported; set it to 0",
    )
    ffn = getattr(config, "moe_intermediate_size", config.intermediate_size)
    return Experts(count, per_token, ffn, normalised, layers)


def settings(
    experts: Experts | None, config: ModelConfig, parallel: ParallelConfig, grouped: bool
) -> dict[str, Any]:
    """What mcore's TransformerConfig says of experts; `grouped`: all of a rank's in one matmul.

    Softmax before the choice gives transformers' plain probabilities; softmax over the chosen
    logits equals its normalised ones. The router computes in fp32 whatever the parameters' dtype.
    """
    require(
        experts is not None or config.moe_aux_loss == 0,
        f"model.moe_aux_loss={config.moe_aux_loss} needs a mixture-of-experts model; use 0",
    )
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": 1 if all(experts.layers) else [int(x) for x in experts.layers],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss else "none",
        "moe_aux_loss_coeff": config.moe_aux_loss,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def use_router(mlp: Any) -> None:
    """Put our router into mcore's spec of a mixture; 0.18 and later have a builder there."""
    submodules = mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules
    submodules.router = _router()


def _router() -> Any:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    class Router(TopKRouter):  # type: ignore[misc]
        """mcore's router, whose auxiliary loss counts once for every token of its micro-batch.

        mcore's own factor assumes its division by the number of trained tokens, and differs
        between versions under sequence and context parallelism.
        """

        def attach_and_log_load_balancing_loss(
            self,
            activation: torch.Tensor,
            aux_loss_coeff: float,
            aux_loss: torch.Tensor,
            aux_loss_name: str,
            reduce_group: Any,
            *_: Any,
            **__: Any,
        ) -> torch.Tensor:
            tokens = activation.shape[0] * reduce_group.size()
            return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)

    return Router


def mark(model: Any) -> None:
    """Mark the weights of experts: their gradients are summed, and their norm taken, over groups of
    their own. mcore does so only when they are spread; done always, checkpoints are alike."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def scale_aux_loss(chunks: list[Any], coefficient: float, tokens: float) -> None:
    """Make the step's auxiliary loss the mean over its `tokens`, times `coefficient`."""
    for chunk in chunks:
        chunk.config.moe_aux_loss_coeff = coefficient / tokens
