"""A config, a model and a GPU -> memory, bubble, traffic, step time, tokens/s and MFU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rest_mega.config import ParallelConfig, RunConfig, require
from rest_mega.planning.engine import Engine, engine, played_stages, rollout_seconds
from rest_mega.planning.gpus import BANDWIDTH_SHARE, GPUS, MATMUL_SHARE, MEMORY_SHARE, Gpu
from rest_mega.planning.memory import WIDTH, StageMemory, stages_memory
from rest_mega.planning.parameters import (
    active_in_layer,
    active_parameters,
    model_parameters,
    stage_layers,
    stage_parameters,
)
from rest_mega.planning.storage import Storage, storage
from rest_mega.trainer.model import Architecture


@dataclass(frozen=True)
class Batch:
    """A step's batch, every trajectory taken at its longest (rollout.max_tokens)."""

    trajectories: int
    replicas: int
    optimizer_steps: int
    microbatches: int
    """Per replica and optimizer step."""
    tokens: int
    """Of the whole step."""


@dataclass(frozen=True)
class Phase:
    """Whether one part of a step fits; bytes on the GPU where it is tightest."""

    name: str
    need: float
    room: float
    remedy: str


@dataclass(frozen=True)
class Plan:
    """What a run needs and how fast it goes, by the model that docs/planning.md tells."""

    config: RunConfig
    gpu: Gpu
    gpus: int
    parameters: int
    batch: Batch
    stages: tuple[StageMemory, ...]
    bubble: float
    """Share of the pipeline's time in which the slowest stage waits."""
    traffic: dict[str, float]
    """Bytes that a rank sends in one training step, by kind."""
    seconds: dict[str, float]
    """Of one step, by phase."""
    model_flops: float
    """Of forward and backward passes over the step's tokens, recomputation left out."""
    storage: Storage
    """What lies in run.dir."""
    engine: Engine

    @property
    def memory(self) -> StageMemory:
        """The fullest stage."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def room(self) -> float:
        """Bytes that a plan may fill on this GPU."""
        return self.gpu.memory * MEMORY_SHARE

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Training, and the rollout where there is an engine; the tightest first."""
        held = [
            m.total + self.engine.resting * (m.stage in self.engine.stages) for m in self.stages
        ]
        remedy = "raise parallel.tensor or parallel.pipeline, or set model.recompute=full"
        phases = [Phase("training", max(held), self.room, remedy)]
        if self.engine.placement != "none":
            used = self.room - self.engine.free
            phases.append(Phase("rollout", used + self.engine.least, self.room, self.engine.remedy))
        return tuple(sorted(phases, key=lambda phase: -phase.need))

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.phases[0].need <= self.room

    @property
    def step_seconds(self) -> float:
        """One step, rollout to publish."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the whole run trains on in a second of the training phase."""
        return self.batch.tokens / self.seconds["train"]

    @property
    def mfu(self) -> float:
        """Model FLOPs of the training phase over what the GPUs could do at their peak."""
        return self.model_flops / (self.seconds["train"] * self.gpus * self.gpu.flops)


def plan(
    config: RunConfig, architecture: Architecture, gpu: Gpu | str, gpus: int | None = None
) -> Plan:
    """The plan of `config` on `gpus` GPUs (default: the fewest it can run on); ConfigError
    where it cannot be cut so, or the GPU is unknown."""
    if isinstance(gpu, str):
        require(gpu in GPUS, f"--gpu {gpu} is not known; choose one of {', '.join(GPUS)}")
        gpu = GPUS[gpu]
    sizes = config.parallel
    world = smallest_world(sizes) if gpus is None else gpus
    architecture.check(sizes)
    config.check_world(world)
    batch = _batch(config, sizes.data_parallel(world))
    times = _Times(architecture, config, gpu, world)
    stages = [times.stage(p) for p in range(sizes.pipeline)]
    longest = max(f + b for f, b in stages)
    around = (sum(f + b for f, b in stages) - longest) / sizes.virtual_pipeline
    pipeline = batch.microbatches * longest + around
    traffic = times.traffic(batch)
    train = batch.optimizer_steps * (pipeline + times.sums(stages[0][1]))
    scored = batch.optimizer_steps * (batch.microbatches * max(f for f, _ in stages) + around / 3)
    memory = stages_memory(architecture, config, world, batch.microbatches)
    sampling = engine(architecture, config, gpu, world, memory)
    players = len(played_stages(config, world, gpu.per_node))
    seconds = {
        "rollout": rollout_seconds(architecture, config, gpu, sampling),
        "score": scored if config.loss.scoring else 0.0,
        "train": train,
        "publish": model_parameters(architecture) * 2 / (gpu.link * BANDWIDTH_SHARE),
    }
    return Plan(
        config,
        gpu,
        world,
        model_parameters(architecture),
        batch,
        tuple(memory),
        around / pipeline,
        traffic,
        seconds,
        batch.tokens * flops_per_token(architecture, config.rollout.max_tokens),
        storage(architecture, config, batch.replicas * players),
        sampling,
    )


def smallest_world(sizes: ParallelConfig) -> int:
    """The fewest ranks: whole replicas over which the experts of a stage can be spread."""
    return math.lcm(sizes.replica_size, sizes.pipeline * sizes.expert)


def _batch(config: RunConfig, replicas: int) -> Batch:
    rollout, packing = config.rollout, config.packing
    trajectories = rollout.prompts_per_step * rollout.samples_per_prompt
    steps = config.loss.optimizer_steps
    together = packing.tokens // rollout.max_tokens
    each = -(-trajectories // (replicas * steps))
    count = -(-each // together)
    if config.parallel.virtual_pipeline > 1:  # the interleaved schedule goes in groups of PP
        count = -(-count // config.parallel.pipeline) * config.parallel.pipeline
    return Batch(trajectories, replicas, steps, count, trajectories * rollout.max_tokens)


def flops_per_token(a: Architecture, length: int) -> float:
    """Model FLOPs of one token's forward and backward pass in a sequence of `length`: six per
    weight, and causal attention's two products (Narayanan et al. 2021, appendix, halved by the
    mask as in PaLM's MFU with causality)."""
    return 6.0 * active_parameters(a) + 6.0 * a.layers * length * a.heads * a.head_dim


class _Times:
    """Seconds of a rank's passes; every exchange inside a layer is taken as not overlapped."""

    def __init__(self, a: Architecture, config: RunConfig, gpu: Gpu, world: int) -> None:
        self.a, self.config, self.gpu, self.world = a, config, gpu, world
        self.sizes, self.width = config.parallel, WIDTH[config.model.dtype]
        self.rows = config.packing.tokens / self.sizes.context
        """Tokens of a micro-batch on a tensor group."""

    def link(self, ranks: int) -> float:
        """Bytes/s among neighbours `ranks` apart at most."""
        inside = ranks <= self.gpu.per_node
        return (self.gpu.link if inside else self.gpu.network) * BANDWIDTH_SHARE

    def stage(self, stage: int) -> tuple[float, float]:
        """(forward, backward) of one micro-batch through a stage, all of its chunks."""
        a, sizes, mode = self.a, self.sizes, self.config.model.recompute
        layers = stage_layers(a, sizes, stage)
        core = 2.0 * self.config.rollout.max_tokens * a.heads * a.head_dim * len(layers)
        products = 2.0 * sum(active_in_layer(a, i) for i in layers)
        speed = sizes.tensor * self.gpu.flops * MATMUL_SHARE
        moved = self.exchange(stage)
        forward = self.rows * (products + core) / speed + moved
        again = {
            "none": 0.0,
            "selective": self.rows * core / speed,
            "full": forward,
        }[mode]
        backward = 2 * self.rows * (products + core) / speed + moved + again
        if stage == sizes.pipeline - 1:  # backward walks the logits once more: they are not stored
            head = 2.0 * self.rows * a.hidden * a.padded_vocab(sizes.tensor) / speed
            forward, backward = forward + head, backward + 3 * head
        hop = self.hop() * sizes.virtual_pipeline
        return forward + hop, backward + hop

    def hop(self) -> float:
        """One activation between pipeline neighbours."""
        if self.sizes.pipeline == 1:
            return 0.0
        cut = self.sizes.tensor if self.sizes.sequence else 1
        # Megatron's rank order puts pipeline neighbours world / PP ranks apart.
        far = self.link(self.world // self.sizes.pipeline + 1)
        return self.rows * self.a.hidden * self.width / cut / far

    def exchange(self, stage: int) -> float:
        """Seconds of one direction's exchanges inside the layers of a stage."""
        per_link = self.inside(stage)
        return (
            per_link["tensor"] / self.link(self.sizes.tensor)
            + per_link["context"] / self.link(self.sizes.tensor * self.sizes.context)
            + per_link["expert"] / self.link(self.sizes.expert)
        )

    def inside(self, stage: int) -> dict[str, float]:
        """Bytes that a rank sends inside a stage's layers, one micro-batch, one direction."""
        a, sizes = self.a, self.sizes
        layers = stage_layers(a, sizes, stage)
        tp, cp, ep = sizes.tensor, sizes.context, sizes.expert
        whole = self.rows * a.hidden * self.width
        # Two all-reduces a layer, or as many bytes in all-gathers and reduce-scatters.
        tensor = len(layers) * 4 * whole * (tp - 1) / tp
        keys = 2 * a.kv_heads * a.head_dim / min(tp, a.kv_heads)
        context = len(layers) * self.rows * keys * self.width * (cp - 1)
        expert = 0.0
        if a.experts is not None:
            mixtures = sum(a.is_mixture(i) for i in layers)
            expert = mixtures * 2 * whole / tp * a.experts.per_token * (ep - 1) / ep
        return {"tensor": tensor, "context": context, "expert": expert}

    def sums(self, last_backward: float) -> float:
        """Seconds beside the pipeline of an optimizer step: gradient sums as far as the last
        micro-batch's backward does not hide them, Adam, parameters gathered."""
        sizes = self.sizes
        held = stage_parameters(self.a, sizes, 0)
        data = self.world // (sizes.tensor * sizes.pipeline)
        link = self.link(sizes.tensor * data)
        gradients = 4 * held.total * (data - 1) / data / link
        gathered = self.width * held.total * (data - 1) / data / link
        shard = held.total / (data if self.config.optimizer.distributed else 1)
        adam = 30 * shard / (self.gpu.bandwidth * BANDWIDTH_SHARE)
        return max(0.0, gradients - last_backward) + gathered + adam

    def traffic(self, batch: Batch) -> dict[str, float]:
        """Bytes that a rank of the first stage sends in one training step."""
        passes = batch.optimizer_steps * batch.microbatches
        times = 3 if self.config.model.recompute == "full" else 2
        held, sizes = stage_parameters(self.a, self.sizes, 0), self.sizes
        data = self.world // (sizes.tensor * sizes.pipeline)
        cut = sizes.tensor if sizes.sequence else 1
        pipeline = self.rows * self.a.hidden * self.width / cut * sizes.virtual_pipeline
        found = {name: passes * times * size for name, size in self.inside(0).items()}
        found["pipeline"] = passes * pipeline * (sizes.pipeline > 1)
        found["data"] = batch.optimizer_steps * (4 + self.width) * held.total * (data - 1) / data
        found["publish"] = 2.0 * model_parameters(self.a) / self.world
        return found
