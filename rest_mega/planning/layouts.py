"""Layouts of a model on a number of GPUs, best first, and what limits each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rest_mega.config import ConfigError, ParallelConfig, RunConfig
from rest_mega.planning.engine import with_servers
from rest_mega.planning.estimate import Plan, plan
from rest_mega.planning.gpus import Gpu
from rest_mega.trainer.model import Architecture

CONTEXT_TOKENS = 4096
"""Context parallelism is proposed for trajectories that are at least twice as long as this."""
FASTER = 0.98
"""Smaller micro-batches are taken where they bring a step's time below this share: what matrix
products lose by them is not in the plan."""


def propose(
    config: RunConfig, a: Architecture, gpu: Gpu, gpus: int, count: int = 5
) -> tuple[list[Plan], str]:
    """The `count` fastest layouts that fit (the smallest ones where none does), one per TP x PP x
    CP x EP; and why the others were refused, counted. `packing.tokens` is the config's or less."""
    found: dict[tuple[int, int, int, int], Plan] = {}
    refused: dict[str, int] = {}
    for sizes in _candidates(a, gpu, gpus, config.rollout.max_tokens):
        try:
            made = _best(dataclasses.replace(config, parallel=sizes), a, gpu, gpus)
        except ConfigError as error:
            key = str(error).split("=")[0].split(" ")[0]
            refused[key] = refused.get(key, 0) + 1
            continue
        place = (sizes.tensor, sizes.pipeline, sizes.context, sizes.expert)
        if place not in found or _rank(made) < _rank(found[place]):
            found[place] = made
    best = sorted(found.values(), key=_rank)[:count]
    return best, ", ".join(f"{number} by {key}" for key, number in refused.items())


def _best(config: RunConfig, a: Architecture, gpu: Gpu, gpus: int) -> Plan:
    """The layout of `config` with its best recomputation and micro-batches, and with servers that
    fit: each mode of recomputation is slower and smaller than the one before."""
    a.check(config.parallel)
    config.check_world(gpus)
    config = with_servers(config, a, gpu, gpus)
    most = config.packing.tokens
    sizes = [most >> n for n in range(8) if most >> n >= config.rollout.max_tokens]
    tried: list[Plan] = []
    for recompute in ("none", "selective", "full"):
        model = dataclasses.replace(config.model, recompute=recompute)
        best: Plan | None = None
        for tokens in sizes:
            packing = dataclasses.replace(config.packing, tokens=tokens)
            made = plan(dataclasses.replace(config, model=model, packing=packing), a, gpu, gpus)
            tried.append(made)
            if not made.fits:
                continue
            if best is None or made.step_seconds < FASTER * best.step_seconds:
                best = made
        if best is not None:
            return best
    return min(tried, key=_rank)


def limit(made: Plan) -> str:
    """What holds this layout back most."""
    sizes, tightest = made.config.parallel, made.phases[0]
    if not made.fits:
        return f"memory: {tightest.name} needs {tightest.need / made.room:.2f} x the room"
    if sizes.tensor > made.gpu.per_node:
        return "TP across nodes"
    if made.bubble > 0.15:
        return f"bubble: {made.batch.microbatches} micro-batches for {sizes.pipeline} stages"
    if made.seconds["rollout"] > made.step_seconds / 2:
        sampling = made.engine.servers * made.engine.gpus
        if made.engine.placement == "colocated" and sampling < made.gpus:
            return f"rollout: {sampling} of {made.gpus} GPUs sample"
        return "rollout: decoding reads weights and KV cache"
    if made.config.model.recompute == "full":
        return "memory: activations are recomputed"
    return "compute"


def _rank(made: Plan) -> tuple[bool, float]:
    return not made.fits, made.step_seconds if made.fits else made.phases[0].need


def _candidates(a: Architecture, gpu: Gpu, gpus: int, longest: int) -> Iterator[ParallelConfig]:
    experts = a.experts.count if a.experts else 1
    for tensor in _divisors(a.heads, 2 * gpu.per_node):
        for pipeline in _divisors(a.layers, gpus // tensor):
            chunks = (1, 2, 4) if pipeline > 1 else (1,)
            for virtual in (v for v in chunks if a.layers % (pipeline * v) == 0):
                for context in _contexts(longest, gpus // (tensor * pipeline)):
                    for expert in _divisors(experts, min(64, gpus // pipeline)):
                        yield ParallelConfig(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=virtual,
                            context=context,
                            expert=expert,
                            sequence=tensor > 1,
                        )


def _contexts(longest: int, most: int) -> list[int]:
    """CP sizes that leave a rank at least CONTEXT_TOKENS of the longest trajectory."""
    return [c for c in (1, 2, 4, 8, 16) if c == 1 or (longest >= c * CONTEXT_TOKENS and c <= most)]


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
