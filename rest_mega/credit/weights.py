"""Regions, entropies and curriculum -> a weight per token: tempered, clipped, mean one over trained
tokens.

Source: ResT (arXiv 2509.21826), Eq. 9 and its variance bound: with beta_t = 1 - exp(-H_t) bounding
the squared score, Var(g) <= E[A^2] sum_t beta_t w_t^2, which weights proportional to 1 / beta_t
minimise. Floor, tempering and clipping are ours: untempered, regions of low entropy take nearly all
the gradient. Weighted gradients are no unbiased estimate of the policy gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from rest_mega.config import CreditConfig, one_of, require
from rest_mega.credit.curriculum import CURRICULA, Curriculum, prior
from rest_mega.dialects import Region
from rest_mega.records import Bools, Floats, Ints, SmallInts

RULES: Mapping[str, Callable[[Floats], Floats]] = MappingProxyType(
    {
        "one_minus_exp": lambda entropy_K: -np.expm1(-entropy_K),
        "entropy": lambda entropy_K: entropy_K,
    }
)
"""What a raw weight divides by (to the power tau): the bound 1 - exp(-H), or Eq. 9's second form, H
itself."""


@dataclass(frozen=True)
class Preset:
    """The entropy rule of one way of weighting; its curriculum has the same name."""

    rule: str = "one_minus_exp"
    tau: float = 0.0
    """0: the curriculum alone; 1: Eq. 9."""
    entropy_floor: float = 0.05
    """h0: entropies below count as this many nats."""
    w_min: float = 0.0
    w_max: float = math.inf


PRESETS: dict[str, Preset] = {
    "rest": Preset(tau=0.25, entropy_floor=0.05, w_min=0.25, w_max=4.0),
    "rest-paper": Preset(tau=1.0, entropy_floor=1e-4, w_min=1e-3, w_max=8.0),
    "rest-code": Preset(),
    "uniform": Preset(),
}
"""rest: every region trained, the entropies tempered. rest-paper: Eq. 9 as it stands. rest-code:
the constants of the authors' code, zero outside their regions. uniform: plain GRPO."""


def add_preset(name: str, preset: Preset, curriculum: Curriculum) -> None:
    """Make `name` known to `credit.preset`; ConfigError where the name is taken."""
    free = name not in PRESETS
    require(free, f"the preset {name!r} is registered already; choose another name")
    PRESETS[name], CURRICULA[name] = preset, curriculum


def settle(config: CreditConfig) -> Preset:
    """The preset with the values that the config sets; ConfigError where they do not fit each
    other.

    Whoever starts a run calls it before the ranks meet.
    """
    one_of("credit.preset", config.preset, PRESETS)
    own = {
        name: getattr(config, name) for name in ("rule", "tau", "entropy_floor", "w_min", "w_max")
    }
    settled = replace(
        PRESETS[config.preset], **{name: value for name, value in own.items() if value is not None}
    )
    one_of("credit.rule", settled.rule, RULES)
    require(
        settled.tau >= 0,
        f"credit.tau={settled.tau} must not be negative; 0 switches the entropy rule off",
    )
    require(
        settled.tau == 0 or settled.entropy_floor > 0,
        f"credit.entropy_floor={settled.entropy_floor} must be positive where "
        f"credit.tau={settled.tau} is: "
        "a region without entropy would get an infinite weight; try 0.05",
    )
    require(
        0 <= settled.w_min <= settled.w_max,
        f"credit.w_min={settled.w_min} and credit.w_max={settled.w_max} must satisfy 0 <= w_min "
        "<= w_max",
    )
    require(settled.w_max > 0, "credit.w_max=0.0 must be positive: no token would be trained")
    with np.errstate(over="ignore", divide="ignore"):
        heaviest = float(informed(np.zeros(1, dtype=np.float32), settled)[0])
    require(
        math.isfinite(heaviest),
        f"credit.entropy_floor={settled.entropy_floor} with credit.tau={settled.tau} gives a "
        "region without entropy an infinite weight; try 0.05",
    )
    return settled


def region_weights(
    config: CreditConfig, entropy_K: Floats, *, progress: float, step: int
) -> Floats:
    """raw_K = clip(kappa_K(nu) * d(max(H_K, h0)) ** -tau, w_min, w_max), d by the preset's rule; 0
    for OBSERVATION.

    `entropy_K` in nats; `progress` = nu in [0, 1]; `step` counts from 1. What `config` sets stands
    in for the preset's own value. Raises ConfigError as `settle` does.
    """
    preset = settle(config)
    kappa_K = prior(config.preset, progress, step)
    raw_K: Floats = np.clip(
        kappa_K * informed(entropy_K, preset), preset.w_min, preset.w_max
    ).astype(np.float32)
    raw_K[Region.OBSERVATION] = 0.0
    return raw_K


def informed(entropy_K: Floats, preset: Preset) -> Floats:
    """The entropy factor d(max(H_K, h0)) ** -tau before curriculum and clip."""
    if preset.tau == 0.0:
        return np.ones(len(entropy_K), dtype=np.float32)
    floored_K = np.maximum(np.asarray(entropy_K, dtype=np.float64), preset.entropy_floor)
    return np.asarray(RULES[preset.rule](floored_K) ** -preset.tau, dtype=np.float32)


def normalise(
    raw_K: Floats, regions_T: SmallInts, mask_T: Bools, sample_T: Ints, *, over_zeros: bool = False
) -> Floats:
    """weights_T of packed tokens: the raw weight of each token's region, mean one in every
    sequence; 0 off the mask.

    `sample_T`: the sequence of every token, -1 for padding. The mean is over the trained tokens
    (mask True) of positive raw weight, which are all of them in every preset but `rest-code`; with
    `over_zeros` it is over all trained tokens, as in the paper's formula. A sequence whose trained
    tokens all have raw weight 0 keeps weight 0.
    """
    weights_T = np.where(mask_T, raw_K[regions_T], 0.0).astype(np.float64)
    counted_T = mask_T if over_zeros else weights_T > 0
    row_T = np.asarray(sample_T, dtype=np.int64) + 1
    sums_S = np.bincount(row_T, weights=weights_T)
    counts_S = np.bincount(row_T, weights=counted_T)
    scale_S = np.divide(counts_S, sums_S, out=np.zeros(len(sums_S)), where=sums_S > 0)
    return (weights_T * scale_S[row_T]).astype(np.float32)


def variance_bound_ratio(entropy_K: Floats, share_K: Floats) -> float:
    """Variance bound at the optimal weights over the bound at uniform ones: HM(beta) / AM(beta), in
    [0, 1].

    beta = 1 - exp(-H); `share_K` weighs the regions, in any unit (token counts will do). 1 when
    there is nothing to gain: no tokens, or no entropy anywhere.
    """
    present_K = np.asarray(share_K) > 0
    part_K = np.asarray(share_K, dtype=np.float64)[present_K]
    part_K = part_K / part_K.sum()
    beta_K = -np.expm1(-np.asarray(entropy_K, dtype=np.float64)[present_K])
    if not (beta_K > 0).any():
        return 1.0
    if not (beta_K > 0).all():
        return 0.0
    ratio = float(1.0 / ((part_K / beta_K).sum() * (part_K * beta_K).sum()))
    return min(ratio, 1.0)  # equal entropies may round to a hair more
