"""Credit metrics of a step against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from rest_mega.credit.weights import variance_bound_ratio
from rest_mega.dialects import Region
from rest_mega.step_metrics import credit_metrics

K = len(Region)


def test_credit_metrics_are_the_formulas_over_the_regions_that_were_seen() -> None:
    rng = np.random.default_rng(0)
    count_K = np.array([0, 3, *rng.integers(1, 50, K - 2)], np.float64)
    sum_K, pull_K = count_K * rng.random(K), count_K * rng.random(K)
    raw_K, running_K = rng.random(K).astype(np.float32), rng.random(K).astype(np.float32)
    pulling_K = np.floor(count_K / 2)
    metrics = credit_metrics(sum_K, count_K, pull_K, pulling_K, raw_K, running_K)
    total, mean_weight = count_K.sum(), (count_K * raw_K).sum() / count_K.sum()
    for k, region in enumerate(Region):
        if count_K[k] == 0:
            assert not [name for name in metrics if name.endswith(f"/{region.name}")]
            continue
        assert metrics[f"share/{region.name}"] == pytest.approx(count_K[k] / total)
        assert metrics[f"entropy/{region.name}"] == pytest.approx(sum_K[k] / count_K[k])
        assert metrics[f"weight/{region.name}"] == pytest.approx(raw_K[k] / mean_weight, rel=1e-5)
        assert metrics[f"gradient/{region.name}"] == pytest.approx(pull_K[k] / pull_K.sum())
    assert metrics["tokens/trained"] == total
    assert metrics["entropy/policy"] == pytest.approx(sum_K.sum() / total)
    assert metrics["credit/tokens_with_gradient"] == pytest.approx(pulling_K.sum() / total)
    bound = variance_bound_ratio(running_K, count_K)
    assert metrics["credit/variance_bound_ratio"] == pytest.approx(bound)


def test_a_step_without_tokens_has_metrics_without_regions() -> None:
    zero_K, one_K = np.zeros(K), np.ones(K, np.float32)
    metrics = credit_metrics(zero_K, zero_K, zero_K, zero_K, one_K, one_K)
    assert set(metrics.values()) == {0.0}
    assert not [name for name in metrics if name.split("/")[1] in Region.__members__]
