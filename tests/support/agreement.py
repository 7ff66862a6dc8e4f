"""Two rounds of publish, sample, score, step on every rank of a layout: what the engine samples
with published weights, the trainer must score with the same log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rest_mega.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from rest_mega.records import Sample
from rest_mega.rollout.engine import Engine, Request, Sampling

TEMPERATURE = 0.7


def _sampled(engine: Engine, seed: int, vocab_size: int) -> list[Sample]:
    """A handful of completions as samples, with alternating advantages."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, rng.integers(1, 15)).astype(np.int32) for _ in range(8)]
    requests = [Request(ids, 12, seed * 100 + n) for n, ids in enumerate(prompts)]
    samples = []
    for n, done in enumerate(engine.generate(requests, Sampling(TEMPERATURE))):
        ids = np.concatenate([prompts[n], done.ids_T])
        sampled = np.arange(len(ids)) >= len(prompts[n])
        logprobs = np.zeros(len(ids), np.float32)
        logprobs[sampled] = done.logprobs_T
        regions, versions = np.zeros(len(ids), np.int8), np.full(len(ids), -1, np.int32)
        versions[sampled] = done.version_T
        samples.append(Sample(ids, sampled, regions, logprobs, versions, (-1.0) ** n))
    return samples


def gaps(
    path: str,
    architecture: Any,
    parallel: ParallelConfig,
    make_engine: Callable[[str, Any], Engine],
) -> dict[str, Any]:
    """The largest gap of each round, the versions served, and how far the step between moved the
    scores of the first samples; to be run on every rank. `make_engine(path, device)`: the lead's.
    """
    from rest_mega.sync.export import Exporter
    from rest_mega.sync.load import load, open_source
    from rest_mega.sync.publish import publish
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.exchange import share_samples
    from rest_mega.trainer.trainer import Trainer

    place = places.start(parallel, "cpu")
    trainer = Trainer(
        architecture,
        place,
        model=ModelConfig(path=path),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
        loss=LossConfig(),
        packing=PackingConfig(tokens=64),
        temperature=TEMPERATURE,
        total_steps=2,
    )
    load(trainer.modules, open_source(path, "load", architecture, 0), architecture, place)
    trainer.prepare()
    exporter = Exporter(trainer.chunks, architecture, place)
    engine = make_engine(path, place.device) if place.is_lead else None
    first: list[Sample] = []
    found, versions, moved = [], [], 0.0
    for version in range(2):
        publish(exporter, engine, version)
        samples, _ = share_samples(
            place, _sampled(engine, version, architecture.vocab_size) if engine else []
        )
        parts = trainer.pack(samples)
        scores = trainer.score(parts)
        weights = [np.ones(len(b.ids_T), np.float32) for b in parts[0]]
        result = trainer.step(parts[0], scores[0], weights)
        found.append(result.metrics["rollout_gap_max"])
        versions.append(engine.version if engine else version)
        if not version:
            first = samples
            before = np.concatenate([s.logprob_R for s in scores[0]])
        else:  # the step between changed what the first samples are scored with
            again = trainer.score(trainer.pack(first))[0]
            moved = float(
                np.abs(np.concatenate([s.logprob_R for s in again]) - before).max(initial=0)
            )
    if engine:
        engine.close()
    return {"gaps": found, "versions": versions, "moved": moved, "last": place.is_last_stage}
