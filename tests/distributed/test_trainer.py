"""One step on one rank or two: the rows at the head, clipping, skipped steps, independence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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
from tests.support.models import VOCAB, random_samples, save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SGD = OptimizerConfig(
    name="sgd", lr=1.0, weight_decay=0.0, beta1=0.0, clip_grad=0.0, distributed=False
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(path, architecture) of a small model; ranks need not import transformers."""
    from rest_mega.trainer.model import read_architecture

    path = str(save_model(tmp_path_factory.mktemp("qwen3"), "qwen3", num_hidden_layers=2))
    return path, read_architecture(path)


class Bench:
    """A run on this rank that makes fresh trainers with the checkpoint's parameters."""

    def __init__(self, case: tuple[str, Any], **sizes: int) -> None:
        from rest_mega.trainer import parallel as places

        self.path, self.architecture = case
        self.place = places.start(ParallelConfig(**sizes), "cpu")

    def trainer(
        self, optimizer: OptimizerConfig = SGD, dtype: str = "fp32", tokens: int = 4096
    ) -> Any:
        from rest_mega.sync.load import load, open_source
        from rest_mega.trainer.trainer import Trainer

        trainer = Trainer(
            self.architecture,
            self.place,
            model=ModelConfig(path=self.path, dtype=dtype),
            optimizer=optimizer,
            loss=LossConfig(),
            packing=PackingConfig(tokens=tokens),
            temperature=0.8,
            total_steps=4,
        )
        source = open_source(self.path, "load", self.architecture, 0)
        load(trainer.modules, source, self.architecture, self.place)
        trainer.prepare()
        return trainer

    def step(self, trainer: Any, samples: list[Sample]) -> Any:
        (batches,) = trainer.pack(samples)
        (scores,) = trainer.score([batches])
        return trainer.step(batches, scores, [np.ones(len(b.ids_T), np.float32) for b in batches])


def parameters(trainer: Any) -> dict[str, np.ndarray]:
    return {n: p.detach().float().numpy().copy() for n, p in trainer.modules[0].named_parameters()}


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([(after[n].astype(np.float64) - before[n]).ravel() for n in before])


def on_one_rank(work: Callable[..., Any], *args: Any) -> Any:
    return run_ranks(work, 1, *args)[0]


def _rows_at_the_head(case: Any) -> Any:
    from rest_mega.trainer import forward

    bench = Bench(case)
    trainer, seen = bench.trainer(tokens=100), []
    head = forward.linear_logprob_entropy

    def watched(hidden: Any, weight: Any, targets: Any, **more: Any) -> Any:
        seen.append((len(hidden), targets.tolist()))
        return head(hidden, weight, targets, **more)

    forward.linear_logprob_entropy = watched
    (batches,) = trainer.pack(random_samples())
    trainer.score([batches])
    scored, seen[:] = list(seen), []
    trainer.supervised_step(batches)
    return scored, seen, [(int(b.mask_T.sum()), b.targets_T[b.mask_T].tolist()) for b in batches]


def test_only_trained_rows_reach_the_head(case: Any) -> None:
    scored, trained, want = on_one_rank(_rows_at_the_head, case)
    assert len(want) > 1
    assert scored == trained == want


def _clipped(case: Any) -> Any:
    bench, answer = Bench(case), []
    for clip in (0.0, 1e-3, 1e3):
        trainer = bench.trainer(dataclasses.replace(SGD, clip_grad=clip))
        before = parameters(trainer)
        result = bench.step(trainer, random_samples())
        answer.append((result.grad_norm, result.skipped, moved(before, parameters(trainer))))
    return answer


def test_clipping_scales_the_gradient_to_the_norm_and_leaves_smaller_ones(case: Any) -> None:
    (norm, skipped, free), (same, _, tight), (_, _, loose) = on_one_rank(_clipped, case)
    assert not skipped
    assert same == norm > 1e-3  # what is reported is the norm before clipping
    # lr=1: the step is the gradient, up to the parameters' own fp32 rounding.
    assert np.linalg.norm(free) == pytest.approx(norm, rel=1e-5)
    assert np.linalg.norm(tight) == pytest.approx(1e-3, rel=1e-3)
    np.testing.assert_allclose(tight, free * (1e-3 / norm), atol=2e-7)
    np.testing.assert_array_equal(loose, free)


def _poisoned(case: Any, optimizer: OptimizerConfig) -> Any:
    bench, good = Bench(case), random_samples()
    bad = [dataclasses.replace(s, advantage=math.nan) if n == 3 else s for n, s in enumerate(good)]
    once, twice = bench.trainer(optimizer), bench.trainer(optimizer)
    start = parameters(twice)
    skipped = bench.step(twice, bad)
    unmoved = moved(start, parameters(twice))
    results = [bench.step(trainer, good) for trainer in (once, twice)]
    assert not any(result.skipped for result in results)
    return skipped, unmoved, parameters(once), parameters(twice), start


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(lr=1e-3),
        OptimizerConfig(lr=1e-3, distributed=False, clip_grad=0.0),
        SGD,
        OptimizerConfig(name="muon", lr=1e-3, distributed=False),
    ],
    ids=["distributed adam", "adam", "sgd", "muon"],
)
def test_gradients_that_are_not_finite_are_skipped_as_if_they_had_never_been(
    case: Any, optimizer: OptimizerConfig
) -> None:
    skipped, unmoved, once, twice, start = on_one_rank(_poisoned, case, optimizer)
    assert skipped.skipped
    assert not math.isfinite(skipped.grad_norm)
    assert not unmoved.any()
    assert moved(start, once).any()
    for name, values in once.items():
        np.testing.assert_array_equal(twice[name], values, err_msg=name)


def _neighbours(case: Any) -> Any:
    bench = Bench(case)
    trainer = bench.trainer()
    samples = random_samples()
    other = dataclasses.replace(samples[2], ids_T=(samples[2].ids_T + 1) % VOCAB)
    answer = []
    for chosen in (samples, [*samples[:2], other, *samples[3:]]):
        ((batch,),) = parts = trainer.pack(chosen)
        ((scores,),) = trainer.score(parts)
        owner = batch.sample_T[batch.mask_T]
        answer.append(
            [(scores.logprob_R[owner == i], scores.entropy_R[owner == i]) for i in range(8)]
        )
    return answer


def test_a_packed_trajectory_does_not_feel_its_neighbours_by_one_bit(case: Any) -> None:
    before, after = on_one_rank(_neighbours, case)
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        for values, others in zip(one, other, strict=True):
            assert len(values) > 0
            assert np.array_equal(values, others) == (i != 2)


def _supervised(case: Any) -> Any:
    bench = Bench(case)
    trainer = bench.trainer(
        OptimizerConfig(lr=1e-2, warmup_steps=2, min_lr_ratio=0.0, decay="linear"), tokens=90
    )
    (batches,) = trainer.pack(random_samples())
    answer = []
    for _ in range(3):
        (scores,) = trainer.score([batches])
        result = trainer.supervised_step(batches)
        answer.append(
            (-np.concatenate([s.logprob_R for s in scores]).mean(), result.loss, result.lr)
        )
    return answer


def test_supervised_steps_report_the_mean_negative_log_prob_and_lower_it(case: Any) -> None:
    answer = on_one_rank(_supervised, case)
    for scored, loss, _ in answer:
        assert loss == pytest.approx(scored, rel=1e-5)
    losses = [loss for _, loss, _ in answer]
    assert losses == sorted(losses, reverse=True)
    assert [lr for _, _, lr in answer] == pytest.approx([0.5e-2, 1e-2, 1e-2])


def _muon(case: Any) -> Any:
    bench = Bench(case)
    config = OptimizerConfig(
        name="muon", lr=1e-4, muon_lr=0.01, distributed=False, weight_decay=0.0, clip_grad=0.0
    )
    trainer = bench.trainer(config)
    before = parameters(trainer)
    bench.step(trainer, random_samples())
    after = parameters(trainer)
    return {name: after[name] - before[name] for name in before}


def test_muon_turns_hidden_matrices_and_adam_the_rest_each_at_its_own_rate(case: Any) -> None:
    for name, step in on_one_rank(_muon, case).items():
        if step.ndim == 2 and "embedding" not in name:
            values = np.linalg.svd(step / max(1, step.shape[0] / step.shape[1]) ** 0.5)[1]
            assert 0.0065 < np.median(values) < 0.0115, name
        else:  # Adam's first step is the sign of the gradient
            assert np.abs(step).max() == pytest.approx(1e-4, rel=2e-3), name


def _short_of_samples(case: Any, mine: list[list[int]]) -> Any:
    bench = Bench(case)
    trainer, samples = bench.trainer(tokens=64), random_samples()
    chosen = [samples[i] for i in mine[bench.place.data_rank]]
    parts = trainer.pack(chosen)
    sums = trainer.region_sums(parts, trainer.score(parts), 4)
    result = bench.step(trainer, chosen)
    return len(parts[0]), sums, dataclasses.asdict(result), parameters(trainer)


def test_a_replica_without_samples_takes_part_and_changes_nothing(case: Any) -> None:
    (want,) = run_ranks(_short_of_samples, 1, case, [list(range(8))])
    for got in run_ranks(_short_of_samples, 2, case, [list(range(8)), []]):
        assert got[0] == want[0] > 1
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
        for key in ("loss", "grad_norm", "lr"):
            assert got[2][key] == pytest.approx(want[2][key], rel=1e-6)
        assert got[2]["metrics"] == pytest.approx(want[2]["metrics"], rel=1e-6)
        for name, values in want[3].items():
            np.testing.assert_allclose(got[3][name], values, atol=1e-6, err_msg=name)


def _in_bf16(case: Any) -> Any:
    bench = Bench(case)
    trainers = [bench.trainer(OptimizerConfig(lr=1e-3), dtype) for dtype in ("fp32", "bf16")]
    return [dataclasses.asdict(bench.step(trainer, random_samples())) for trainer in trainers]


def test_bf16_measures_what_fp32_measures_to_its_own_precision(case: Any) -> None:
    fp32, bf16 = on_one_rank(_in_bf16, case)
    assert bf16["metrics"]["entropy"] == pytest.approx(fp32["metrics"]["entropy"], rel=0.01)
    assert bf16["grad_norm"] == pytest.approx(fp32["grad_norm"], rel=0.05)
    assert bf16["loss"] == pytest.approx(fp32["loss"], abs=0.02)


def _modules_with_the_true_torch(case: Any) -> list[str]:
    import sys

    import torch

    bench = Bench(case, pipeline=2)
    for optimizer in (OptimizerConfig(), OptimizerConfig(name="muon", distributed=False)):
        bench.step(bench.trainer(optimizer), random_samples())
    megatron = [name for name in sys.modules if name.startswith("megatron.core")]
    assert len(megatron) > 100
    return [n for n in megatron if getattr(sys.modules[n], "torch", None) is torch]


def test_no_module_of_megatron_that_a_step_needs_sees_the_true_torch(case: Any) -> None:
    assert run_ranks(_modules_with_the_true_torch, 2, case) == [[], []]
