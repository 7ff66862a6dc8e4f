"""The gap of trainer and engine, and what leads get to know of single tokens, are the same at every
layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.bench import Bench, small_case
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


def _gap(case: Any, sizes: dict[str, int]) -> Any:
    from rest_mega.guard import check_ids, measure

    bench = Bench(case, **sizes)
    trainer, place = bench.trainer(tokens=64), bench.place
    samples = random_samples()[place.data_rank :: place.data_size]
    parts = trainer.pack(samples, 2)
    check_ids(samples, parts)
    scores = trainer.score(parts)
    told = trainer.rows.traces(parts, scores, [len(s.ids_T) for s in samples])
    gap = measure(place, trainer.rows, trainer.rows.scored(parts, scores))
    return gap, told, place.data_rank


@pytest.fixture(scope="module")
def alone(case: Any) -> Any:
    return run_ranks(_gap, 1, case, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gap_and_every_token_s_trace_are_those_of_one_rank(
    layout: str, case: Any, alone: Any
) -> None:
    want, told, _ = alone
    for gap, mine, data_rank in run_ranks(_gap, 2, case, LAYOUTS[layout]):
        assert gap.metrics() == pytest.approx(want.metrics(), rel=1e-5)
        size = 2 if layout == "dp2" else 1
        for got, expected in zip(mine, told[data_rank::size], strict=True):
            for name in ("trainer_T", "entropy_T", "advantage_T"):
                np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-5)


def test_a_trace_has_the_advantage_of_its_sample_and_an_entropy_that_vocabulary_allows(
    alone: Any,
) -> None:
    for trace, sample in zip(alone[1], random_samples(), strict=True):
        trained_T = np.isfinite(trace.trainer_T)
        np.testing.assert_allclose(trace.advantage_T[trained_T], sample.advantage, rtol=1e-6)
        assert (trace.entropy_T[trained_T] > 0).all()
        assert np.isnan(trace.entropy_T[~trained_T]).all()


def test_the_gap_is_that_of_the_tokens_themselves(alone: Any) -> None:
    gap, told, _ = alone
    samples = random_samples()
    masks = [s.mask_T & (np.arange(len(s.mask_T)) > 0) for s in samples]
    for got, mask_T in zip(told, masks, strict=True):
        np.testing.assert_array_equal(np.isfinite(got.trainer_T), mask_T)
    gaps, regions = (
        np.concatenate([column[mask_T] for column, mask_T in zip(columns, masks, strict=True)])
        for columns in (
            [abs(got.trainer_T - s.logprobs_T) for got, s in zip(told, samples, strict=True)],
            [s.regions_T for s in samples],
        )
    )
    assert gap.mean == pytest.approx(gaps.mean(), rel=1e-5)
    assert gap.max == pytest.approx(gaps.max())
    assert gap.p99 == pytest.approx(np.quantile(gaps, 0.99, method="inverted_cdf"))
    means = [gaps[regions == region].mean() for region in np.unique(regions)]
    assert list(gap.regions.values()) == pytest.approx(means, rel=1e-5)
