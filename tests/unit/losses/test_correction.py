"""Corrections equal hand-written scalars, and their statistics do not depend on the cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import LossConfig
from rest_mega.losses.correction import CORRECTIONS, GAP_MAXIMA, GAP_SUMS, correct
from rest_mega.losses.policy import Sequences

RATIOS = [[1.0, 0.4, 2.5], [1.02, 0.99], [6.0], [0.5, 5.0]]
"""Trainer / engine of the rows of four sequences."""
BANDS = {"none": (None, None), "tis": (None, 2.0), "mis": (0.5, 5.0), "sequence-mask": (0.9, 1.1)}
BY_HAND = {
    "none": [[1.0, 1.0, 1.0], [1.0, 1.0], [1.0], [1.0, 1.0]],
    "tis": [[1.0, 0.4, 2.0], [1.02, 0.99], [2.0], [0.5, 2.0]],
    "mis": [[1.0, 0.0, 2.5], [1.02, 0.99], [0.0], [0.5, 5.0]],
    # geometric means: 1, 1.0049, 6, 1.58
    "sequence-mask": [[1.0, 1.0, 1.0], [1.0, 1.0], [0.0], [0.0, 0.0]],
}


def config(name: str, band: tuple[float | None, float | None]) -> LossConfig:
    return LossConfig(correction=name, correction_low=band[0], correction_high=band[1])


def rows() -> tuple[torch.Tensor, torch.Tensor, Sequences]:
    """(trainer, engine, sequences) of RATIOS; ends of a band are moved inside by a hair."""
    lengths = torch.tensor([len(r) for r in RATIOS])
    engine_R = torch.linspace(-3, -1, int(lengths.sum()), dtype=torch.float64)
    inside = {0.5: 0.5 + 1e-9, 5.0: 5.0 - 1e-9}
    ratio_R = [inside.get(k, k) for sequence in RATIOS for k in sequence]
    trainer_R = engine_R + torch.tensor(ratio_R, dtype=torch.float64).log()
    return trainer_R, engine_R, Sequences(torch.repeat_interleave(lengths), lengths)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_their_cases(name: str) -> None:
    trainer_R, engine_R, sequences = rows()
    factor_R, sums, maxima = correct(trainer_R, engine_R, config(name, BANDS[name]), sequences)
    want = list(itertools.chain(*BY_HAND[name]))
    assert factor_R.tolist() == pytest.approx(want, rel=1e-7)
    gaps = [abs(math.log(k)) for sequence in RATIOS for k in sequence]
    means = [float(sums[n][0] / sums[n][1]) for n in GAP_SUMS]
    masked = sum(w == 0 for w in want) / len(want)
    assert means == pytest.approx([np.mean(gaps), np.mean(want), masked], rel=1e-7)
    assert float(maxima[GAP_MAXIMA[0]]) == pytest.approx(max(gaps))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_where_trainer_and_engine_agree_nothing_is_corrected(name: str) -> None:
    trainer_R, _, sequences = rows()
    factor_R, sums, _ = correct(trainer_R, trainer_R, LossConfig(correction=name), sequences)
    assert factor_R.tolist() == [1.0] * len(factor_R)
    assert [float(sums[n][0]) for n in GAP_SUMS] == [0.0, len(factor_R), 0.0]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_factor_carries_no_gradient_and_is_finite(name: str) -> None:
    trainer_R = torch.tensor([-1e4, 0.0, -2.0], requires_grad=True)
    engine_R = torch.tensor([0.0, -1e4, -2.0])
    alone = Sequences(torch.arange(3), torch.ones(3, dtype=torch.int64))
    factor_R, sums, _ = correct(trainer_R, engine_R, LossConfig(correction=name), alone)
    assert not factor_R.requires_grad
    assert bool(factor_R.isfinite().all())
    assert all(bool(pair.isfinite().all()) for pair in sums.values())


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    name=st.sampled_from(sorted(CORRECTIONS)),
)
def test_factors_and_statistics_do_not_depend_on_the_cut(
    lengths: list[int], cut: int, name: str
) -> None:
    rng, own = np.random.default_rng(len(lengths)), config(name, BANDS[name])
    engine_R = torch.from_numpy(rng.normal(-2, 1, sum(lengths)))
    trainer_R = engine_R + torch.from_numpy(rng.normal(0, 0.3, sum(lengths)))
    tokens_S = torch.tensor(lengths)
    index_R = torch.repeat_interleave(tokens_S)
    want, sums, maxima = correct(trainer_R, engine_R, own, Sequences(index_R, tokens_S))
    middle = min(cut, len(lengths))
    parts = []
    for a, b in ((0, middle), (middle, len(lengths))):
        here = (index_R >= a) & (index_R < b)
        sequences = Sequences(index_R[here] - a, tokens_S[a:b])
        parts.append(correct(trainer_R[here], engine_R[here], own, sequences))
    assert torch.equal(torch.cat([part[0] for part in parts]), want)
    for n in GAP_SUMS:
        torch.testing.assert_close(parts[0][1][n] + parts[1][1][n], sums[n])
    assert max(float(v) for part in parts for v in part[2].values()) == float(maxima[GAP_MAXIMA[0]])
