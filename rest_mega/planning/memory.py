"""Bytes on a rank of each pipeline stage: parameters, gradients, optimizer, activations, head."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rest_mega.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from rest_mega.planning.parameters import Held, stage_layers, stage_parameters
from rest_mega.planning.schedule import in_flight
from rest_mega.trainer.model import Architecture

WIDTH = {"bf16": 2, "fp32": 4}
HEAD_TILE = 256 * 2**20
"""Bytes allowed for the head's scratch tiles: logits are never stored. An assumption."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage, while the trainer trains."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    """The mean over the data-parallel ranks: Megatron cuts its buffers there."""
    activations: int
    head: int

    @property
    def state(self) -> int:
        """What stays while the engine samples: nothing of it is moved to the host."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of them."""
        return self.state + self.activations + self.head


def state_bytes(held: Held, model: ModelConfig, optimizer: OptimizerConfig) -> tuple[int, int, int]:
    """(parameters, gradients, optimizer state before it is cut) of a rank that holds `held`.

    Gradients are fp32 (Megatron's DDP buffers). Adam keeps two fp32 moments, Muon one for a matrix,
    SGD one; bf16 parameters have an fp32 master copy beside.
    """
    moments = {
        "adam": 8 * held.total,
        "sgd": 4 * held.total,
        "muon": 8 * held.total - 4 * held.matrices,
    }[optimizer.name]
    master = 4 * held.total if model.dtype == "bf16" else 0
    return WIDTH[model.dtype] * held.total, 4 * held.total, moments + master


def layer_activations(a: Architecture, config: RunConfig, layer: int) -> float:
    """Bytes that one layer keeps for its backward pass, per token of a micro-batch.

    What an RMSNorm, flash-attention, SwiGLU layer saves: the counting of Korthikanti et al. 2022
    (arXiv 2205.05198, section 4) for these layers. Sequence parallelism divides the norms' part.
    """
    sizes, width = config.parallel, WIDTH[config.model.dtype]
    around = sizes.tensor if sizes.sequence else 1
    if config.model.recompute == "full":
        return width * a.hidden / (around * sizes.context)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    norms = 4 * a.hidden / around  # two norms' inputs and outputs
    projected = (q + 2 * kv) * (2 if a.family.qk_norm else 1)
    attention = projected + q  # q, k, v and the output
    if config.model.recompute == "selective":
        attention -= q
    if a.experts is not None and a.is_mixture(layer):
        chosen = a.experts.per_token
        feed = chosen * (2 * a.hidden + 3 * a.experts.ffn) / around
        inner = attention / sizes.tensor + feed
    else:
        inner = (attention + 3 * a.ffn) / sizes.tensor
    gathered = 0.0  # keys and values of all context-parallel ranks, by local layers
    if sizes.context > 1 and config.model.recompute == "none":
        gathered = 2 * kv / sizes.tensor
    return width * ((norms + inner) / sizes.context + gathered)


def stages_memory(
    a: Architecture, config: RunConfig, world: int, microbatches: int
) -> list[StageMemory]:
    """Memory of a rank of every pipeline stage; `microbatches` of one optimizer step a replica."""
    return [
        _stage(a, config, world, microbatches, stage) for stage in range(config.parallel.pipeline)
    ]


def _stage(
    a: Architecture, config: RunConfig, world: int, microbatches: int, stage: int
) -> StageMemory:
    sizes, tokens, width = config.parallel, config.packing.tokens, WIDTH[config.model.dtype]
    held = stage_parameters(a, sizes, stage)
    parameters, gradients, state = state_bytes(held, config.model, config.optimizer)
    kept = sum(layer_activations(a, config, i) for i in stage_layers(a, sizes, stage))
    passes = in_flight(stage, sizes.pipeline, sizes.virtual_pipeline, microbatches)
    activations = kept / sizes.virtual_pipeline * passes * tokens
    if config.model.recompute == "full":  # one layer at a time is computed anew
        activations += _widest(a, config, stage) * tokens
    head = 0
    if stage == sizes.pipeline - 1:  # hidden rows, their gradient, and the tiles
        head = math.ceil(2 * width * tokens / sizes.context * a.hidden) + HEAD_TILE
    return StageMemory(
        stage, parameters, gradients, _cut(state, held, config, world), math.ceil(activations), head
    )


def _widest(a: Architecture, config: RunConfig, stage: int) -> float:
    from dataclasses import replace

    kept = replace(config, model=replace(config.model, recompute="none"))
    return max(layer_activations(a, kept, i) for i in stage_layers(a, config.parallel, stage))


def _cut(state: int, held: Held, config: RunConfig, world: int) -> int:
    """A rank's mean share of the optimizer state: dense over DP x CP, experts over what is left of
    a stage's ranks beside EP."""
    if not config.optimizer.distributed:
        return state
    sizes: ParallelConfig = config.parallel
    stage_ranks = world // sizes.pipeline
    dense = held.dense / (stage_ranks // sizes.tensor)
    expert = held.expert / (stage_ranks // sizes.expert)
    return math.ceil(state / held.total * (dense + expert))
