"""Layouts of a model on a number of GPUs, best first, and what limits each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from rest_mega.config import ConfigError, ParallelConfig, RunConfig
from rest_mega.planning.engine import with_servers
from rest_mega.planning.estimate import Plan, plan
from rest_mega.planning.gpus import Gpu
from rest_mega.trainer.model import Architecture

CONTEXT_TOKENS = 4096
"""Context parallelism is proposed for trajectories that are at least twice as long as this."""


def propose(
    config: RunConfig, a: Architecture, gpu: Gpu, gpus: int, count: int = 5
) -> tuple[list[Plan], str]:
    """The `count` fastest layouts that fit (the smallest ones where none does), one per TP x PP x
    CP x EP; and why the others were refused, counted. Micro-batches are the config's, or one
    trajectory each."""
    found: dict[tuple[int, int, int, int], Plan] = {}
    refused: dict[str, int] = {}
    longest = config.rollout.max_tokens
    sizes_of = dict.fromkeys((config.packing.tokens, longest))
    modes = itertools.product(sizes_of, ("none", "selective", "full"))
    for sizes, (tokens, recompute) in itertools.product(
        _candidates(a, gpu, gpus, longest), list(modes)
    ):
        one = dataclasses.replace(
            config,
            parallel=sizes,
            model=dataclasses.replace(config.model, recompute=recompute),
            packing=dataclasses.replace(config.packing, tokens=tokens),
        )
        try:
            made = plan(with_servers(one, a, gpu, gpus), a, gpu, gpus)
        except ConfigError as error:
            key = str(error).split("=")[0].split(" ")[0]
            refused[key] = refused.get(key, 0) + 1
            continue
        place = (sizes.tensor, sizes.pipeline, sizes.context, sizes.expert)
        if place not in found or _rank(made) < _rank(found[place]):
            found[place] = made
    best = sorted(found.values(), key=_rank)[:count]
    return best, ", ".join(f"{number} by {key}" for key, number in refused.items())


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
