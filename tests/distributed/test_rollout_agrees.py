"""What the engine samples with published weights, the trainer scores with the same log-probs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rest_mega.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from rest_mega.records import Sample
from tests.support.models import VOCAB, save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TEMPERATURE = 0.7


def _sampled(engine: Any, seed: int) -> list[Sample]:
    """A handful of completions as samples, with alternating advantages."""
    from rest_mega.rollout.engine import Request, Sampling

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 15)).astype(np.int32) for _ in range(8)]
    requests = [Request(ids, 12, seed * 100 + n) for n, ids in enumerate(prompts)]
    samples = []
    for n, done in enumerate(engine.generate(requests, Sampling(TEMPERATURE))):
        ids = np.concatenate([prompts[n], done.ids_T])
        sampled = np.arange(len(ids)) >= len(prompts[n])
        logprobs = np.zeros(len(ids), np.float32)
        logprobs[sampled] = done.logprobs_T
        regions = np.zeros(len(ids), np.int8)
        samples.append(Sample(ids, sampled, regions, logprobs, (-1.0) ** n))
    return samples


def _gaps(path: str, architecture: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """Two rounds of publish, sample, score, step."""
    from rest_mega.rollout.embedded_engine import EmbeddedEngine
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
    exporter, engine = Exporter(trainer.chunks, architecture, place), None
    if place.is_lead:
        engine = EmbeddedEngine(
            path, end_of_turn_ids=(3,), pad_id=0, batch_size=3, dtype="fp32", device=place.device
        )
    first: list[Sample] = []
    gaps, versions, moved = [], [], 0.0
    for version in range(2):
        publish(exporter, engine, version)
        samples = share_samples(place, _sampled(engine, version) if engine else None)
        assert samples is not None
        parts = trainer.pack(samples)
        scores = trainer.score(parts)
        weights = [np.ones(len(b.ids_T), np.float32) for b in parts[0]]
        result = trainer.step(parts[0], scores[0], weights)
        gaps.append(result.metrics["rollout_gap_max"])
        versions.append(engine.version if engine else version)
        if not version:
            first = samples
            before = np.concatenate([s.logprob_R for s in scores[0]])
        else:  # the step between changed what the first samples are scored with
            again = trainer.score(trainer.pack(first))[0]
            moved = float(
                np.abs(np.concatenate([s.logprob_R for s in again]) - before).max(initial=0)
            )
    return {"gaps": gaps, "versions": versions, "moved": moved, "last": place.is_last_stage}


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)],
    ids=["tp2", "pp2"],
)
def test_engine_and_trainer_agree_before_and_after_a_step(
    parallel: ParallelConfig, tmp_path: Any
) -> None:
    from rest_mega.trainer.model import read_architecture

    path = str(save_model(tmp_path, "qwen3", num_hidden_layers=2))
    for answer in run_ranks(_gaps, 2, path, read_architecture(path), parallel):
        assert answer["versions"] == [0, 1]
        assert max(answer["gaps"]) < 2e-5
        assert answer["moved"] > 0.01 or not answer["last"]
