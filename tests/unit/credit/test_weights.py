"""Weights of regions and tokens against the formulas written out, and reference vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError, CreditConfig
from rest_mega.credit.curriculum import CURRICULA, prior
from rest_mega.credit.regions import tag
from rest_mega.credit.weights import (
    PRESETS,
    RULES,
    Preset,
    informed,
    normalise,
    region_weights,
    settle,
    variance_bound_ratio,
)
from rest_mega.dialects import Region
from tests.unit.credit.test_regions import tokens_of

FEW = settings(max_examples=40, deadline=None)
VECTORS = json.loads(
    (Path(__file__).parents[2] / "data" / "weight_vectors.json").read_text(encoding="utf-8")
)
ENTROPIES = VECTORS["entropies"]
NAMES = {
    "format": Region.FORMAT,
    "name": Region.TOOL_NAME,
    "args": Region.ARG_VALUE,
    "think": Region.REASONING,
}
K = len(Region)
ENTROPY_K = st.lists(st.floats(0, 12), min_size=K, max_size=K).map(np.array)
PRESET = st.sampled_from(sorted(PRESETS))
PROGRESS = st.floats(0, 1)
STEP = st.integers(1, 1000)


def vector_entropy(default: float = 1.0) -> np.ndarray:
    """The vectors' entropies by region, `default` in those they do not name."""
    entropy_K = np.full(K, default, np.float32)
    for name, region in NAMES.items():
        entropy_K[region] = ENTROPIES["entropy"][name]
    return entropy_K


def vector_tokens() -> np.ndarray:
    """Regions of the vectors' tokens."""
    regions = [NAMES[name] for name in ENTROPIES["tokens"]]
    return np.repeat(np.array(regions, np.int8), list(ENTROPIES["tokens"].values()))


def one_sequence(raw_K: Any, regions_T: Any, **options: bool) -> np.ndarray:
    """The weights of a single sequence, all of it trained."""
    regions_T = np.asarray(regions_T, np.int8)
    everything = np.ones(len(regions_T), np.bool_)
    sample_T = np.zeros(len(regions_T), np.int32)
    return normalise(np.asarray(raw_K, np.float32), regions_T, everything, sample_T, **options)


# Reference vectors.


@pytest.mark.parametrize("vector", VECTORS["replies"], ids=lambda v: v["id"])
def test_weights_of_the_authors_constants(vector: dict[str, Any]) -> None:
    tokens = tokens_of(vector)
    regions_T = tag(tokens, "toolrl", end_of_turn=tokens[-1] == b"<|im_end|>")
    config = CreditConfig(preset="rest-code")
    raw_K = region_weights(config, np.ones(K, np.float32), progress=0.5, step=vector["step"])
    assert raw_K[regions_T] == pytest.approx(vector["raw_weight"], abs=1e-6)
    over_positive = one_sequence(raw_K, regions_T)
    assert over_positive == pytest.approx(vector["weight_mean_one_over_positive"], abs=2e-6)
    over_all = one_sequence(raw_K, regions_T, over_zeros=True)
    assert over_all == pytest.approx(vector["weight_mean_one_over_all"], abs=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_paper_s_rules_on_the_reference_entropies(rule: str) -> None:
    raw_K = informed(vector_entropy(), Preset(rule=rule, tau=1.0, entropy_floor=1e-9))
    expected = ENTROPIES[f"raw_{rule}"]
    assert [raw_K[NAMES[n]] for n in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    regions_T = vector_tokens()
    weights_T = one_sequence(raw_K, regions_T)
    for name, weight in ENTROPIES[f"normalised_{rule}"].items():
        assert weights_T[regions_T == NAMES[name]] == pytest.approx(weight, abs=2e-6)


def test_rest_paper_at_the_start_is_the_clipped_rule_on_the_reference_entropies() -> None:
    raw_K = region_weights(CreditConfig("rest-paper"), vector_entropy(), progress=0.0, step=1)
    regions_T = vector_tokens()
    weights_T = one_sequence(raw_K, regions_T)
    for name, weight in ENTROPIES["clipped_to_0.001_8_normalised"].items():
        assert weights_T[regions_T == NAMES[name]] == pytest.approx(weight, abs=2e-6)


def test_the_reference_variance_bound() -> None:
    share_K = np.bincount(vector_tokens(), minlength=K)
    expected = ENTROPIES["variance_bound_ratio"]
    assert variance_bound_ratio(vector_entropy(), share_K) == pytest.approx(expected, abs=1e-6)


# Raw weights of regions.


@FEW
@given(entropy_K=ENTROPY_K, preset=PRESET, progress=PROGRESS, step=STEP)
def test_raw_weights_are_the_formula_of_the_preset(
    entropy_K: np.ndarray, preset: str, progress: float, step: int
) -> None:
    p, kappa_K = PRESETS[preset], prior(preset, progress, step)
    raw_K = region_weights(CreditConfig(preset), entropy_K, progress=progress, step=step)
    for region in Region:
        h = max(float(entropy_K[region]), p.entropy_floor)
        factor = (1 - math.exp(-h)) ** -p.tau
        expected = min(max(float(kappa_K[region]) * factor, p.w_min), p.w_max)
        expected = 0.0 if region == Region.OBSERVATION else expected
        assert raw_K[region] == pytest.approx(expected, rel=1e-5)


@FEW
@given(
    entropy_K=ENTROPY_K,
    preset=PRESET,
    tau=st.floats(0, 2),
    floor=st.floats(1e-3, 1),
    low=st.floats(0, 0.9),
    high=st.floats(1, 5),
)
def test_what_the_config_sets_stands_in_for_the_preset(
    entropy_K: np.ndarray, preset: str, tau: float, floor: float, low: float, high: float
) -> None:
    config = CreditConfig(preset, tau=tau, entropy_floor=floor, w_min=low, w_max=high)
    raw_K = region_weights(config, entropy_K, progress=0.25, step=7)
    kappa_K = prior(preset, 0.25, 7).astype(np.float64)
    factor_K = (1 - np.exp(-np.maximum(entropy_K, floor))) ** -tau
    expected_K = np.minimum(np.maximum(kappa_K * factor_K, low), high)
    expected_K[Region.OBSERVATION] = 0
    assert raw_K == pytest.approx(expected_K, rel=1e-5)
    assert ((raw_K >= np.float32(low)) & (raw_K <= np.float32(high)))[expected_K > 0].all()


@FEW
@given(entropy_K=ENTROPY_K, other_K=ENTROPY_K, preset=PRESET)
def test_without_tempering_the_entropies_change_nothing(
    entropy_K: np.ndarray, other_K: np.ndarray, preset: str
) -> None:
    config = CreditConfig(preset, tau=0.0, w_min=0.0, w_max=math.inf)
    raw_K = region_weights(config, entropy_K, progress=0.5, step=9)
    assert raw_K.tolist() == region_weights(config, other_K, progress=0.5, step=9).tolist()
    assert raw_K.tolist() == prior(preset, 0.5, 9).tolist()


@FEW
@given(entropy_K=ENTROPY_K, tau=st.floats(0.1, 1))
def test_lower_entropies_never_weigh_less(entropy_K: np.ndarray, tau: float) -> None:
    config = CreditConfig("uniform", tau=tau)
    raw_K = region_weights(config, entropy_K, progress=0.5, step=1)
    order = [k for k in np.argsort(entropy_K, kind="stable") if k != Region.OBSERVATION]
    assert (np.diff(raw_K[order]) <= 0).all()


@FEW
@given(entropy_K=ENTROPY_K, progress=PROGRESS, step=STEP)
def test_every_region_that_the_policy_writes_is_trained_by_rest(
    entropy_K: np.ndarray, progress: float, step: int
) -> None:
    for preset in ("rest", "rest-paper", "uniform"):
        raw_K = region_weights(CreditConfig(preset), entropy_K, progress=progress, step=step)
        assert (raw_K > 0).tolist() == [region != Region.OBSERVATION for region in Region]


@FEW
@given(entropy_K=ENTROPY_K, progress=PROGRESS, step=STEP)
def test_uniform_weighs_all_alike_whatever_the_entropies(
    entropy_K: np.ndarray, progress: float, step: int
) -> None:
    raw_K = region_weights(CreditConfig("uniform"), entropy_K, progress=progress, step=step)
    assert raw_K.tolist() == [float(region != Region.OBSERVATION) for region in Region]


@FEW
@given(entropy_K=ENTROPY_K, tau=st.floats(0.1, 1), preset=PRESET, floor=st.floats(0.01, 1))
def test_the_rule_entropy_divides_by_the_entropy_itself(
    entropy_K: np.ndarray, tau: float, preset: str, floor: float
) -> None:
    config = CreditConfig(preset, rule="entropy", tau=tau, entropy_floor=floor)
    raw_K = region_weights(config, entropy_K, progress=0.5, step=3)
    p, kappa_K = PRESETS[preset], prior(preset, 0.5, 3).astype(np.float64)
    expected_K = np.clip(kappa_K / np.maximum(entropy_K, floor) ** tau, p.w_min, p.w_max)
    expected_K[Region.OBSERVATION] = 0
    assert raw_K == pytest.approx(expected_K, rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_values_of_its_own_the_config_is_the_preset(preset: str) -> None:
    assert settle(CreditConfig(preset)) == PRESETS[preset]


def test_presets_and_curricula_have_the_same_names() -> None:
    assert list(PRESETS) == list(CURRICULA)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": -0.5}, r"credit\.tau=-0\.5 must not be negative"),
        ({"tau": 0.5, "entropy_floor": 0.0}, r"credit\.entropy_floor=0\.0 must be positive"),
        ({"w_min": -1.0}, r"0 <= w_min <= w_max"),
        ({"w_min": 2.0, "w_max": 1.0}, r"credit\.w_min=2\.0 and credit\.w_max=1\.0"),
        # Each value is possible, but not together with what the preset has for the other.
        ({"w_min": 5.0}, r"credit\.w_min=5\.0 and credit\.w_max=4\.0"),
        ({"w_max": 0.1}, r"credit\.w_min=0\.25 and credit\.w_max=0\.1"),
        ({"w_min": 0.0, "w_max": 0.0}, r"credit\.w_max=0\.0 must be positive"),
        ({"tau": 2.0, "entropy_floor": 1e-30}, r"credit\.entropy_floor=1e-30 with .*infinite"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        region_weights(CreditConfig(**values), np.ones(K), progress=0.0, step=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        settle(CreditConfig(**values))  # type: ignore[arg-type]


def test_a_floor_of_zero_is_allowed_where_the_rule_is_off() -> None:
    config = CreditConfig("rest-code", entropy_floor=0.0)
    assert np.isfinite(region_weights(config, np.zeros(K), progress=0.0, step=1)).all()


# Weights of tokens.


@st.composite
def packed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """raw_K with zeros in it, regions_T, mask_T and sample_T of a few sequences and padding."""
    raw_K = np.array(draw(st.lists(st.just(0.0) | st.floats(0.01, 8), min_size=K, max_size=K)))
    lengths = draw(st.lists(st.integers(0, 8), max_size=4))
    sample_T = np.repeat(np.arange(len(lengths)), lengths)
    sample_T = np.concatenate([sample_T, [-1] * draw(st.integers(0, 4))]).astype(np.int32)
    count = len(sample_T)
    regions = draw(st.lists(st.integers(0, K - 1), min_size=count, max_size=count))
    mask = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return (
        raw_K.astype(np.float32),
        np.array(regions, np.int8),
        np.array(mask, np.bool_) & (sample_T >= 0),
        sample_T,
    )


@FEW
@given(packed=packed(), over_zeros=st.booleans())
def test_weights_have_mean_one_over_the_trained_tokens_of_each_sequence(
    packed: tuple[np.ndarray, ...], over_zeros: bool
) -> None:
    raw_K, regions_T, mask_T, sample_T = packed
    weights_T = normalise(raw_K, regions_T, mask_T, sample_T, over_zeros=over_zeros)
    assert (weights_T[~mask_T] == 0).all()
    for sample in set(sample_T.tolist()):
        trained = [t for t in range(len(sample_T)) if sample_T[t] == sample and mask_T[t]]
        raw = [float(raw_K[regions_T[t]]) for t in trained]
        counted = len(raw) if over_zeros else sum(value > 0 for value in raw)
        expected = [value * counted / sum(raw) if sum(raw) else 0.0 for value in raw]
        assert weights_T[trained] == pytest.approx(expected, rel=1e-5)
        assert sum(weights_T[trained]) == pytest.approx(counted if sum(raw) else 0, rel=1e-5)


@FEW
@given(packed=packed(), order=st.randoms(use_true_random=False), scale=st.floats(0.1, 10))
def test_weights_depend_neither_on_the_order_of_tokens_nor_on_the_scale_of_raw_weights(
    packed: tuple[np.ndarray, ...], order: Any, scale: float
) -> None:
    raw_K, regions_T, mask_T, sample_T = packed
    shuffled = list(range(len(sample_T)))
    order.shuffle(shuffled)
    weights_T = normalise(raw_K, regions_T, mask_T, sample_T)
    again_T = normalise(
        raw_K * np.float32(scale), regions_T[shuffled], mask_T[shuffled], sample_T[shuffled]
    )
    assert again_T == pytest.approx(weights_T[shuffled], rel=1e-5)


def test_a_sequence_alone_weighs_what_it_weighs_in_a_pack() -> None:
    rng = np.random.default_rng(0)
    raw_K = rng.uniform(0.1, 2, K).astype(np.float32)
    sample_T = np.repeat([0, 1, 2, -1], [5, 9, 1, 4]).astype(np.int32)
    regions_T = rng.integers(0, K, len(sample_T)).astype(np.int8)
    mask_T = (rng.random(len(sample_T)) < 0.7) & (sample_T >= 0)
    weights_T = normalise(raw_K, regions_T, mask_T, sample_T)
    for sample in range(3):
        own = sample_T == sample
        alone = normalise(raw_K, regions_T[own], mask_T[own], np.zeros(own.sum(), np.int32))
        assert weights_T[own].tolist() == alone.tolist()


def test_observations_weigh_nothing_even_where_a_mask_says_otherwise() -> None:
    regions = [Region.OBSERVATION, Region.ANSWER, Region.OBSERVATION, Region.FORMAT]
    for preset in PRESETS:
        raw_K = region_weights(CreditConfig(preset), np.ones(K), progress=0.3, step=3)
        assert one_sequence(raw_K, regions)[[0, 2]].tolist() == [0, 0]


# The variance bound.


@FEW
@given(
    entropy_K=st.lists(st.floats(1e-4, 12), min_size=K, max_size=K).map(np.array),
    count_K=st.lists(st.integers(0, 30), min_size=K, max_size=K).map(np.array),
)
def test_the_bound_s_ratio_is_that_of_optimal_over_uniform_weights(
    entropy_K: np.ndarray, count_K: np.ndarray
) -> None:
    ratio = variance_bound_ratio(entropy_K, count_K)
    assert 0 <= ratio <= 1
    beta_T = np.repeat(1 - np.exp(-entropy_K), count_K)
    if len(beta_T) == 0:
        assert ratio == 1
        return
    optimal_T = len(beta_T) / beta_T / (1 / beta_T).sum()  # sums to T
    bound_optimal, bound_uniform = (beta_T * optimal_T**2).sum(), beta_T.sum()
    assert ratio == pytest.approx(bound_optimal / bound_uniform, rel=1e-6)
    # No weights that sum to T have a lower bound.
    others_T = np.random.default_rng(0).uniform(0.5, 1.5, (20, len(beta_T))) * optimal_T
    others_T *= len(beta_T) / others_T.sum(axis=1, keepdims=True)
    assert ((beta_T * others_T**2).sum(axis=1) >= bound_optimal * (1 - 1e-9)).all()
    assert variance_bound_ratio(entropy_K, count_K / 7) == pytest.approx(ratio)


def test_the_bound_s_ratio_at_its_limits() -> None:
    share_K = np.arange(K)
    assert variance_bound_ratio(np.zeros(K), share_K) == 1
    assert variance_bound_ratio(np.ones(K), np.zeros(K)) == 1
    assert variance_bound_ratio(np.full(K, 0.7), share_K) == pytest.approx(1)
    assert variance_bound_ratio(np.arange(K) > 3, share_K) == 0
    # A region without tokens counts for nothing.
    assert variance_bound_ratio(np.arange(K), (np.arange(K) == 5) * 2.0) == pytest.approx(1)
