"""OptimizerConfig -> mcore's optimizer over this rank's chunks; clipping and learning-rate
schedules.

Muon orthogonalises the update of each hidden matrix; the shards of
a tensor-parallel matrix and the joined QKV and gate-up matrices are each orthogonalised as one
block.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rest_mega.config import OptimizerConfig
from rest_mega.trainer.adam import GroupStepAdam
from rest_mega.trainer.muon import Muon
from rest_mega.trainer.parallel import Parallel

_DECAY = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate over its peak at 1-based optimizer `step` of `total`: warm-up, then decay to
    `min_lr_ratio`, which the step after the last would have."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    span = max(1, total - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps - 1) / span)
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _DECAY[config.decay](progress)


def wrap(chunks: list[Any], config: OptimizerConfig, parallel: Parallel) -> list[Any]:
    """Chunks inside mcore's DistributedDataParallel: fp32 gradient buffers, reduced over DP x
    CP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=parallel.device.type == "cuda" and parallel.data_size > 1,
    )
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp,
            module=chunk,
            disable_bucketing=i > 0,
            pg_collection=parallel.groups,
        )
        for i, chunk in enumerate(chunks)
    ]


def build(chunks: list[Any], config: OptimizerConfig, parallel: Parallel) -> Any:
    """mcore's optimizer for wrapped chunks; its parameters' learning rates are set by `set_lr`
    before each step."""
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
        optimizer = _muon(chunks, config, settings, parallel)
    else:
        optimizer = get_megatron_optimizer(
            settings, chunks, use_gloo_process_groups=False, pg_collection=parallel.groups
        )
    _begin_state(optimizer)
    return optimizer


def _begin_state(optimizer: Any) -> None:
    """All state exists from the start, so that a checkpoint can be made before the first step and
    loaded into a new optimizer."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None:  # mcore has none for SGD
            part.init_state_fn = lambda inner, _: _fill_state(inner, ("momentum_buffer",))
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def _muon(chunks: list[Any], config: OptimizerConfig, settings: Any, parallel: Parallel) -> Any:
    from megatron.core.optimizer import ChainedOptimizer

    assert not settings.bf16, "the config refuses muon in bf16"
    everywhere = [p for chunk in chunks for p in chunk.parameters()]
    spread = [p for p in everywhere if not getattr(p, "allreduce", True)]
    parts = _muon_parts([p for p in everywhere if getattr(p, "allreduce", True)], config, settings)
    for part in parts:
        part.grad_stats_parallel_group = parallel.groups.mp
    if chunks[0].config.num_moe_experts:  # a stage without experts joins in the norm all the same
        parts.append(_turning(spread, config, settings, is_expert=True))
        parts[-1].grad_stats_parallel_group = parallel.groups.tp_ep_pp
    for part in parts:
        part.tp_group = parallel.groups.tp
    return ChainedOptimizer(parts)


def _turning(
    matrices: list[Any], config: OptimizerConfig, settings: Any, *, is_expert: bool
) -> Any:
    """Muon in mcore's wrapper."""
    from megatron.core.optimizer import FP32Optimizer

    group = _group(matrices, 1.0, is_expert_parallel=is_expert)
    muon = Muon([group], lr=config.muon_lr, weight_decay=config.weight_decay)
    return FP32Optimizer(muon, settings, lambda inner, _: _fill_state(inner, ("momentum_buffer",)))


def _muon_parts(parameters: list[Any], config: OptimizerConfig, settings: Any) -> list[Any]:
    """Muon for the hidden matrices among `parameters`, AdamW for the rest."""
    from megatron.core.optimizer import FP32Optimizer

    matrices = [
        p
        for p in parameters
        if p.ndim == 2 and not getattr(p, "is_embedding_or_output_parameter", False)
    ]
    rest = [p for p in parameters if all(p is not m for m in matrices)]
    wide, narrow = ([p for p in rest if (p.ndim > 1) is many] for many in (True, False))
    groups = [
        _group(g, decay, weight_decay=config.weight_decay * decay)
        for g, decay in ((wide, 1.0), (narrow, 0.0))
        if g
    ]
    adam = GroupStepAdam(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    fill = lambda inner, _: _fill_state(inner, ("exp_avg", "exp_avg_sq"))  # noqa: E731
    return [
        _turning(matrices, config, settings, is_expert=False),
        FP32Optimizer(adam, settings, fill),
    ]


def _group(parameters: list[Any], wd_mult: float, **more: Any) -> dict[str, Any]:
    """A parameter group with the keys by which mcore tells groups apart in a checkpoint."""
    keys = {
        "wd_mult": wd_mult,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
    }
    return {"params": parameters, **keys, **more}


def _fill_state(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> None:
    """State that exists before a checkpoint is loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in names:
                optimizer.state[parameter].setdefault(name, torch.zeros_like(parameter))


def set_lr(optimizer: Any, config: OptimizerConfig, step: int, total: int) -> float:
    """Set every group's learning rate for 1-based `step`; returns the main one.

    Also its weight decay: mcore marks norms and biases (`wd_mult` 0), and leaves it to its own
    scheduler, which is not used here, to heed the mark.
    """
    factor = lr_factor(config, step, total)
    for group in optimizer.param_groups:
        peak = config.muon_lr if "momentum" in group and config.name == "muon" else config.lr
        group["lr"] = peak * factor
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return config.lr * factor


@torch.no_grad()
def apply(optimizer: Any, config: OptimizerConfig) -> tuple[float, bool]:
    """Clip and step: (global gradient norm, whether the step was taken). Non-finite gradients are
    not applied."""
    from megatron.core.optimizer import clip_grads

    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(norm):
        return norm, False
    if config.clip_grad > 0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            parameters = part.get_parameters()
            if parameters:
                clip_grads.clip_grad_by_total_norm_fp32(
                    parameters, max_norm=config.clip_grad, total_norm=norm
                )
    return norm, bool(optimizer.step_with_ready_grads())
