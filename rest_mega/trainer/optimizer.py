"""OptimizerConfig -> mcore's optimizer over this rank's chunks; clipping and learning-rate schedules.

Muon (Jordan et al., 2024; torch.optim.Muon) orthogonalises the update of each hidden matrix; the shards of
a tensor-parallel matrix and the joined QKV and gate-up matrices are each orthogonalised as one block.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rest_mega.config import ConfigError, OptimizerConfig
from rest_mega.trainer.parallel import Parallel

_DECAY = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate over its peak at 1-based optimizer `step` of `total`: warm-up, then decay to `min_lr_ratio`."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    span = max(1, total - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps - 1) / span)
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _DECAY[config.decay](progress)


def wrap(chunks: list[Any], config: OptimizerConfig, parallel: Parallel) -> list[Any]:
    """Chunks inside mcore's DistributedDataParallel: fp32 gradient buffers, reduced over DP x CP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=parallel.device.type == "cuda" and parallel.data_size > 1,
    )
    return [
        DistributedDataParallel(
            config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0, pg_collection=parallel.groups
        )
        for i, chunk in enumerate(chunks)
    ]


def build(chunks: list[Any], config: OptimizerConfig, parallel: Parallel) -> Any:
    """mcore's optimizer for wrapped chunks; its parameters' learning rates are set by `set_lr` before each step."""
    from megatron.core.optimizer import OptimizerConfig as McoreConfig
    from megatron.core.optimizer import get_megatron_optimizer

    bf16 = chunks[0].config.bf16
    settings = McoreConfig(
        optimizer="sgd" if config.name == "sgd" else "adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        sgd_momentum=config.beta1,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.distributed,
    )
    if config.name == "muon":
        return _muon(chunks, config, settings, parallel)
    return get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False, pg_collection=parallel.groups)


def _muon(chunks: list[Any], config: OptimizerConfig, settings: Any, parallel: Parallel) -> Any:
    from megatron.core.optimizer import ChainedOptimizer, FP32Optimizer

    if settings.bf16:
        raise ConfigError("optimizer.name=muon trains in fp32: set model.dtype=fp32 or another optimizer")
    matrices, rest = [], []
    for chunk in chunks:
        for parameter in chunk.parameters():
            plain = parameter.ndim != 2 or getattr(parameter, "is_embedding_or_output_parameter", False)
            (rest if plain else matrices).append(parameter)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)
    parts = [FP32Optimizer(inner, settings, lambda *_: None) for inner in (muon, adam)]
    for part in parts:
        part.grad_stats_parallel_group = parallel.groups.mp
        part.tp_group = parallel.groups.tp
    return ChainedOptimizer(parts)


def set_lr(optimizer: Any, config: OptimizerConfig, step: int, total: int) -> float:
    """Set every group's learning rate for 1-based `step`; returns the main one."""
    factor = lr_factor(config, step, total)
    for group in optimizer.param_groups:
        peak = config.muon_lr if "ns_steps" in group else config.lr
        group["lr"] = peak * factor
    return config.lr * factor


@torch.no_grad()
def apply(optimizer: Any, config: OptimizerConfig) -> tuple[float, bool]:
    """Clip and step: (global gradient norm, whether the step was taken). Non-finite gradients are not applied."""
    from megatron.core.optimizer import clip_grads

    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(norm):
        return norm, False
    if config.clip_grad > 0:
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters:
                clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=config.clip_grad, total_norm=norm)
    return norm, bool(optimizer.step_with_ready_grads())
