"""The gap of trainer and engine, and the log-probs that leads get, are the same at every layout."""

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
    from rest_mega.dump import trainer_logprobs
    from rest_mega.guard import check_ids, measure

    bench = Bench(case, **sizes)
    trainer, place = bench.trainer(tokens=64), bench.place
    samples = random_samples()[place.data_rank :: place.data_size]
    parts = trainer.pack(samples, 2)
    check_ids(samples, parts, None)
    scored = trainer.rows.scored(parts, trainer.score(parts))
    told = trainer_logprobs(place, samples, scored)
    return measure(place, trainer.rows, scored), told, place.data_rank


@pytest.fixture(scope="module")
def alone(case: Any) -> Any:
    return run_ranks(_gap, 1, case, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gap_and_every_token_s_log_prob_are_those_of_one_rank(
    layout: str, case: Any, alone: Any
) -> None:
    want, told, _ = alone
    for gap, mine, data_rank in run_ranks(_gap, 2, case, LAYOUTS[layout]):
        assert gap.metrics() == pytest.approx(want.metrics(), rel=1e-5)
        size = 2 if layout == "dp2" else 1
        for got, expected in zip(mine, told[data_rank::size], strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_gap_is_that_of_the_tokens_themselves(alone: Any) -> None:
    gap, told, _ = alone
    samples = random_samples()
    masks = [s.mask_T & (np.arange(len(s.mask_T)) > 0) for s in samples]
    for got, mask_T in zip(told, masks, strict=True):
        np.testing.assert_array_equal(np.isfinite(got), mask_T)
    gaps, regions = (
        np.concatenate([column[mask_T] for column, mask_T in zip(columns, masks, strict=True)])
        for columns in (
            [abs(got - s.logprobs_T) for got, s in zip(told, samples, strict=True)],
            [s.regions_T for s in samples],
        )
    )
    assert gap.mean == pytest.approx(gaps.mean(), rel=1e-5)
    assert gap.max == pytest.approx(gaps.max())
    assert gap.p99 == pytest.approx(np.quantile(gaps, 0.99, method="inverted_cdf"))
    means = [gaps[regions == region].mean() for region in np.unique(regions)]
    assert list(gap.regions.values()) == pytest.approx(means, rel=1e-5)
