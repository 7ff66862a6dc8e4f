"""The rollout engine, beside the trainer or apart from it: its weights, its cache, its time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rest_mega.config import SERVER_SIZES, RunConfig, require
from rest_mega.planning.gpus import BANDWIDTH_SHARE, MATMUL_SHARE, MEMORY_SHARE, Gpu
from rest_mega.planning.memory import WIDTH, StageMemory, stages_memory
from rest_mega.planning.parameters import active_parameters, model_parameters
from rest_mega.trainer.model import Architecture
from rest_mega.trainer.parallel import find_players

STATIC_SHARE = 0.85
"""mem_fraction_static where the config has none. An assumption: SGLang derives its own from the
GPU's memory (arg_groups/memory_hook.py of 0.5.23)."""
MOST_SHARE = 0.8
"""The highest that is proposed: a server's activations and graphs take of the rest."""
RESTING = 2e9
"""Bytes on a GPU that a server keeps while the trainer trains: its CUDA context, NCCL and CUDA
graphs, which `rest` does not release. An assumption."""


@dataclass(frozen=True)
class Engine:
    """The engine of a run; bytes are those on one of its GPUs."""

    placement: str
    """colocated (on the trainer's GPUs), apart, embedded (in the players' processes) or none."""
    servers: int
    """Of all replicas."""
    gpus: int
    """Of each."""
    stages: frozenset[int]
    """The pipeline stages that have an engine on their GPUs."""
    free: float
    """What the trainer and the GPU leave it."""
    share: float
    """Of that, for weights and cache."""
    weights: float
    token: float
    """Of one token's keys and values."""
    length: int
    """Tokens of the longest sequence."""
    most: int
    """Sequences that a server plays at once, whatever its memory."""
    tokens: float
    """Tokens that a server may cache, whatever its memory."""

    @property
    def sequence(self) -> float:
        """Bytes of the longest sequence's cache."""
        return self.token * self.length

    @property
    def cache(self) -> float:
        """Bytes of the cache."""
        left = max(0.0, self.free * self.share - self.weights)
        return min(left, self.tokens * self.token)

    @property
    def sequences(self) -> int:
        """How many sequences run at once at their longest."""
        return 0 if self.placement == "none" else min(self.most, int(self.cache // self.sequence))

    @property
    def least(self) -> float:
        """Bytes that must be free for it to play one sequence (embedded: a batch of them)."""
        together = self.most if self.placement == "embedded" else 1
        return (self.weights + together * self.sequence) / self.share

    @property
    def resting(self) -> float:
        """Bytes that stay while the trainer trains."""
        return {"colocated": RESTING, "embedded": self.weights}.get(self.placement, 0.0)

    @property
    def remedy(self) -> str:
        """What to do where it does not fit."""
        if self.placement == "embedded":
            return "set rollout.engine=sglang, or lower rollout.batch_size"
        share = math.ceil(100 * self.least * self.share / max(self.free, 1.0)) / 100
        if self.share < share <= MOST_SHARE:
            return f"set rollout.sglang.mem_fraction_static={share:.2f} or more"
        if self.placement == "apart":
            return "raise rollout.sglang.tp_size"
        return (
            "raise rollout.sglang.tp_size, keep less beside it (parallel.tensor, "
            "parallel.pipeline, more replicas), or give the engine GPUs of its own"
        )


def engine(
    a: Architecture, config: RunConfig, gpu: Gpu, world: int, stages: Sequence[StageMemory]
) -> Engine:
    """The engine of `config` on `world` ranks, whose trainer holds `stages`; ConfigError where its
    servers need more GPUs than it is given.

    SGLang's pool of weights and cache is mem_fraction_static of what is free when the server starts
    (0.5.23: distributed/bootstrap.py, mem_cache/kv_cache_configurator.py), and it starts when the
    trainer holds parameters, gradients and optimizer already.
    """
    rollout, sglang = config.rollout, config.rollout.sglang
    replicas = config.parallel.data_parallel(world)
    room = gpu.memory * MEMORY_SHARE
    if rollout.engine == "replay":
        return Engine(
            placement="none",
            servers=0,
            gpus=0,
            stages=frozenset(),
            free=room,
            share=1.0,
            weights=0.0,
            token=0.0,
            length=rollout.max_tokens,
            most=0,
            tokens=0.0,
        )
    width = WIDTH[config.model.dtype]
    whole = float(model_parameters(a) * width)
    played = played_stages(config, world, gpu.per_node)
    if rollout.engine == "embedded":
        hosts = frozenset(here[0] for here in played)
        return Engine(
            placement="embedded",
            servers=replicas * len(played),
            gpus=1,
            stages=hosts,
            free=room - max(stages[stage].state for stage in hosts),
            share=1.0,
            weights=whole,
            token=cache_bytes(a, 1, 1, width),
            length=rollout.max_tokens,
            most=rollout.batch_size,
            tokens=math.inf,
        )
    gpus = sglang.gpus_per_server
    given = sglang.arguments
    parts = [int(str(given.get(name, 1))) for name in SERVER_SIZES]
    token = cache_bytes(a, parts[0] * parts[1], parts[2] * parts[3], _cache_width(config))
    hosts = frozenset()
    if sglang.colocate:
        need = sglang.servers * gpus
        require(
            need <= len(played[0]),
            f"rollout.sglang.colocate=true with servers={sglang.servers} of {gpus} GPUs needs "
            f"{need}, but a replica has {len(played[0])} on a machine: lower servers or tp_size",
        )
        hosts = frozenset(stage for here in played for stage in here[:need])
    return Engine(
        placement="colocated" if sglang.colocate else "apart",
        servers=len(sglang.urls) or replicas * len(played) * sglang.servers,
        gpus=gpus,
        stages=hosts,
        free=room - max((stages[stage].state for stage in hosts), default=0),
        share=float(str(given.get("mem_fraction_static", STATIC_SHARE))),
        weights=whole / gpus,
        token=token,
        length=rollout.max_tokens,
        most=min(sglang.in_flight, int(str(given.get("max_running_requests") or sglang.in_flight))),
        tokens=float(str(given.get("max_total_tokens") or math.inf)),
    )


def cache_bytes(a: Architecture, tensor: int, pipeline: int, width: int) -> float:
    """Bytes of one token's keys and values on a GPU of a server; a key-value head that does not
    divide among the tensor ranks is held by several."""
    heads = max(1.0, a.kv_heads / tensor)
    return 2 * a.layers / pipeline * heads * a.head_dim * width


def _cache_width(config: RunConfig) -> int:
    kind = str(config.rollout.sglang.arguments.get("kv_cache_dtype", "auto"))
    return 1 if kind.startswith("fp8") else WIDTH[config.model.dtype]


def played_stages(config: RunConfig, world: int, per_node: int) -> list[list[int]]:
    """For each player of a replica, the pipeline stages of the replica's ranks on its machine.
    Megatron's rank order: TP x CP next to each other, pipeline stages world / PP ranks apart."""
    sizes, rollout = config.parallel, config.rollout
    block, apart = sizes.tensor * sizes.context, world // sizes.pipeline
    if rollout.starts_engines and not rollout.sglang.colocate:
        per_node -= len(rollout.sglang.gpus)
    replicas = [  # further ones are cut by machines as one of these
        [stage * apart + r * block + n for stage in range(sizes.pipeline) for n in range(block)]
        for r in range(max(1, min(apart // block, per_node)))
    ]
    machines = {rank: str(rank // per_node) for ranks in replicas for rank in ranks}
    players = find_players(replicas, machines)[:: len(replicas)]
    if not rollout.starts_engines:
        players = players[:1]
    return [
        [rank // apart for rank in replicas[0] if machines[rank] == machines[player]]
        for player in players
    ]


def with_servers(config: RunConfig, a: Architecture, gpu: Gpu, world: int) -> RunConfig:
    """`config` with the servers that sample fastest on a replica's GPUs of a machine, as wide as
    or wider than its own where there is room; as it is where the engine is apart."""
    sglang = config.rollout.sglang
    if config.rollout.engine != "sglang" or not sglang.colocate:
        return config
    here = len(played_stages(config, world, gpu.per_node)[0])
    widths = [n for n in range(1, here + 1) if a.heads % n == 0 and here % n == 0]
    wide = [n for n in widths if n >= sglang.gpus_per_server] or widths[-1:]
    stages = stages_memory(a, config, world, 1)

    def seconds(one: RunConfig) -> tuple[bool, float]:
        made = engine(a, one, gpu, world, stages)
        return made.sequences == 0, rollout_seconds(a, one, gpu, made)

    return min((_of_width(config, n, here // n) for n in wide), key=seconds)


def _of_width(config: RunConfig, width: int, servers: int) -> RunConfig:
    sglang = config.rollout.sglang
    if width != sglang.gpus_per_server:
        others = {k: v for k, v in sglang.arguments.items() if k not in SERVER_SIZES}
        sglang = dataclasses.replace(sglang, arguments=others | {"tp_size": width})
    sglang = dataclasses.replace(sglang, servers=servers)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, sglang=sglang))


def rollout_seconds(a: Architecture, config: RunConfig, gpu: Gpu, made: Engine) -> float:
    """Seconds of a step's generation: each decoding step reads the weights once and the caches of
    the sequences that run together."""
    if made.placement == "none":
        return 0.0
    rollout = config.rollout
    trajectories = rollout.prompts_per_step * rollout.samples_per_prompt
    each = -(-trajectories // made.servers)
    together = max(1, min(each, made.sequences))
    new = min(made.length, rollout.max_new_tokens * rollout.max_turns)
    reading = made.weights + together * made.token * (made.length - new / 2)
    speed = made.gpus * gpu.flops * MATMUL_SHARE
    products = 2.0 * active_parameters(a) * together / speed
    token = max(reading / (gpu.bandwidth * BANDWIDTH_SHARE), products)
    prefill = 2.0 * active_parameters(a) * (made.length - new) * each
    return -(-each // together) * new * token + prefill / speed
