"""One step on one rank or two: the rows at the head, independence, short replicas, precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rest_mega.config import OptimizerConfig
from tests.support.bench import Bench, parameters, small_case
from tests.support.models import VOCAB, random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


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


def _short_of_samples(case: Any, mine: list[list[int]]) -> Any:
    bench = Bench(case)
    trainer, samples = bench.trainer(tokens=64), random_samples()
    chosen = [samples[i] for i in mine[bench.place.data_rank]]
    parts = trainer.pack(chosen)
    sums = trainer.rows.region_sums(parts, trainer.score(parts), 4)
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
    seeing = [n for n in megatron if getattr(sys.modules[n], "torch", None) is torch]
    # 0.19 loads its multimodal models on the way; nothing of them runs.
    return [name for name in seeing if not name.startswith("megatron.core.models.mimo")]


def test_no_module_of_megatron_that_a_step_needs_sees_the_true_torch(case: Any) -> None:
    assert run_ranks(_modules_with_the_true_torch, 2, case) == [[], []]


def _without_signal(case: Any, sizes: dict[str, int]) -> Any:
    bench = Bench(case, **sizes)
    trainer = bench.trainer(OptimizerConfig(lr=0.1, distributed=False))
    bench.step(trainer, random_samples())  # from here on Adam's moments would move on their own
    before, (batches,) = parameters(trainer), trainer.pack([])
    (scores,) = trainer.score([batches])
    result = trainer.step(batches, scores, [np.zeros(len(b.ids_T), np.float32) for b in batches])
    same = all((before[n] == p).all() for n, p in parameters(trainer).items())
    return same, result.skipped, result.loss, trainer.optimizer_steps


@pytest.mark.parametrize("sizes", [{}, {"pipeline": 2}, {"tensor": 2}])
def test_a_batch_without_signal_moves_nothing_but_the_schedule(
    case: Any, sizes: dict[str, int]
) -> None:
    world = 2 if sizes else 1
    assert run_ranks(_without_signal, world, case, sizes) == [(True, True, 0.0, 2)] * world
