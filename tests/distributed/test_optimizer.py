"""The optimizer in a trainer: clipping, skipped steps, weight decay, muon's two rates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from rest_mega.config import OptimizerConfig
from tests.support.bench import SGD, Bench, moved, parameters, small_case
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


def _clipped(case: Any) -> Any:
    bench, answer = Bench(case), []
    for clip in (0.0, 1e-3, 1e3):
        trainer = bench.trainer(dataclasses.replace(SGD, clip_grad=clip))
        before = parameters(trainer)
        result = bench.step(trainer, random_samples())
        answer.append((result.grad_norm, result.skipped, moved(before, parameters(trainer))))
    return answer


def test_clipping_scales_the_gradient_to_the_norm_and_leaves_smaller_ones(case: Any) -> None:
    (norm, skipped, free), (same, _, tight), (_, _, loose) = run_ranks(_clipped, 1, case)[0]
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
    skipped, unmoved, once, twice, start = run_ranks(_poisoned, 1, case, optimizer)[0]
    assert skipped.skipped
    assert not math.isfinite(skipped.grad_norm)
    assert not unmoved.any()
    assert moved(start, once).any()
    for name, values in once.items():
        np.testing.assert_array_equal(twice[name], values, err_msg=name)


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
    for name, step in run_ranks(_muon, 1, case)[0].items():
        if step.ndim == 2 and "embedding" not in name:
            values = np.linalg.svd(step / max(1, step.shape[0] / step.shape[1]) ** 0.5)[1]
            assert 0.0065 < np.median(values) < 0.0115, name
        else:  # Adam's first step is the sign of the gradient
            assert np.abs(step).max() == pytest.approx(1e-4, rel=2e-3), name


def _decayed(case: Any, optimizer: OptimizerConfig) -> Any:
    bench = Bench(case)
    trainer = bench.trainer(optimizer)
    before = parameters(trainer)
    nothing = [dataclasses.replace(s, advantage=0.0) for s in random_samples()]
    assert bench.step(trainer, nothing).grad_norm == 0
    return before, parameters(trainer)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_weight_decay_shrinks_matrices_at_their_rate_and_leaves_norms(case: Any, name: str) -> None:
    optimizer = OptimizerConfig(
        name=name, lr=0.01, muon_lr=0.05, weight_decay=0.1, distributed=name == "adam"
    )
    ((before, after),) = run_ranks(_decayed, 1, case, optimizer)
    for parameter, values in before.items():
        hidden = values.ndim == 2 and "embedding" not in parameter
        rate = 0.05 if name == "muon" and hidden else 0.01
        factor = 1 - rate * 0.1 if values.ndim == 2 else 1.0
        np.testing.assert_allclose(after[parameter], values * factor, rtol=1e-6, err_msg=parameter)


def _everywhere(case: Any, optimizers: list[OptimizerConfig], sizes: dict[str, Any]) -> Any:
    """Per optimizer: the gradient norm, and on the lead the parameters after the step."""
    from rest_mega.sync.export import Exporter

    bench, answer = Bench(case, **sizes), []
    mine = random_samples()[bench.place.data_rank :: bench.place.data_size]
    for optimizer in optimizers:
        trainer = bench.trainer(optimizer)
        norm = bench.step(trainer, mine).grad_norm
        exporter = Exporter(trainer.modules, bench.architecture, bench.place)
        answer.append((norm, {n: t.numpy() for n, t in exporter.stream()}))
    return answer


CLIPPED = dataclasses.replace(SGD, clip_grad=0.1)
EVERYWHERE = [
    CLIPPED,
    OptimizerConfig(lr=1e3, eps=1e3, clip_grad=0.1, weight_decay=0.0),  # so large an eps: sgd
    OptimizerConfig(name="muon", distributed=False),
]


@pytest.fixture(scope="module")
def one_rank(case: Any) -> Any:
    return run_ranks(_everywhere, 1, case, EVERYWHERE, {})[0]


@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {}],
    ids=["tp2 sp", "pp2", "dp2"],
)
def test_norm_and_clipped_step_are_one_ranks_at_every_layout(
    case: Any, one_rank: Any, sizes: dict[str, Any]
) -> None:
    _as_on_one_rank(case, one_rank, sizes)


def test_norm_and_clipped_step_are_one_ranks_with_experts_spread(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    case = small_case(tmp_path_factory.mktemp("mixture"), "mixtral")
    one_rank = run_ranks(_everywhere, 1, case, EVERYWHERE, {})[0]
    for sizes in ({"expert": 2}, {"expert": 2, "tensor": 2, "sequence": True}):
        _as_on_one_rank(case, one_rank, sizes)


def _as_on_one_rank(case: Any, one_rank: Any, sizes: dict[str, Any]) -> None:
    leads = {0} if sizes.keys() - {"expert"} else {0, 1}
    for rank, got in enumerate(run_ranks(_everywhere, 2, case, EVERYWHERE, sizes)):
        for optimizer, (norm, after), (want, parameters_) in zip(
            EVERYWHERE, got, one_rank, strict=True
        ):
            assert norm == pytest.approx(want, rel=1e-5), optimizer.name
            assert norm > 2 * CLIPPED.clip_grad
            assert bool(after) == (rank in leads)
            if optimizer.name != "muon":  # which turns each rank's shard as one block
                for name, values in after.items():
                    np.testing.assert_allclose(values, parameters_[name], atol=1e-6, err_msg=name)
