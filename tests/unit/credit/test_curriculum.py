"""Prior weights of regions by progress and step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.credit.curriculum import ARGUMENTS, CURRICULA, STRUCTURE, Line, prior
from rest_mega.dialects import Region

FEW = settings(max_examples=40, deadline=None)
SCHEDULE = json.loads(
    (Path(__file__).parents[2] / "data" / "weight_vectors.json").read_text(encoding="utf-8")
)["curriculum"]
TRAINED = [region for region in Region if region != Region.OBSERVATION]
CONTENT = [Region.REASONING, Region.ANSWER, Region.ARG_KEY, Region.ARG_VALUE]
PROGRESS = st.floats(0, 1)
STEP = st.integers(1, 10_000)


@pytest.mark.parametrize("row", SCHEDULE, ids=lambda row: f"step {row['step']}")
def test_the_authors_constants_by_step(row: dict[str, float]) -> None:
    kappa_K = prior("rest-code", 0.5, int(row["step"]))
    expected = dict.fromkeys(Region, row["outside"])
    expected |= {Region.FORMAT: row["format"], Region.TOOL_NAME: row["name"]}
    expected |= {Region.REASONING: row["think"], **dict.fromkeys(ARGUMENTS, row["args"])}
    assert kappa_K == pytest.approx([expected[region] for region in Region], abs=1e-6)


@FEW
@given(step=st.integers(1, 2000), progress=PROGRESS)
def test_rest_code_is_the_authors_formula_of_the_step_alone(step: int, progress: float) -> None:
    kappa_K = prior("rest-code", progress, step)
    assert kappa_K[Region.ARG_VALUE] == pytest.approx(min(0.6 + 0.002 * step, 1.2))
    assert kappa_K[Region.REASONING] == pytest.approx(min(0.6 + 0.002 * step, 1.0))
    assert kappa_K.tolist() == prior("rest-code", 0.0, step).tolist()


@FEW
@given(progress=PROGRESS, step=STEP, other=STEP)
def test_rest_moves_weight_from_form_to_content(progress: float, step: int, other: int) -> None:
    kappa_K = prior("rest", progress, step)
    assert kappa_K[CONTENT] == pytest.approx(0.8 + 0.4 * progress)
    assert kappa_K[[*STRUCTURE, Region.ARG_SCAFFOLD]] == pytest.approx(1.2 - 0.4 * progress)
    assert kappa_K[[Region.END_OF_TURN, Region.MALFORMED]].tolist() == [1, 1]
    assert kappa_K.tolist() == prior("rest", progress, other).tolist()


@FEW
@given(progress=PROGRESS)
def test_rest_read_backwards_swaps_form_and_content(progress: float) -> None:
    forward, backward = prior("rest", progress, 1), prior("rest", 1 - progress, 1)
    assert forward[CONTENT] == pytest.approx(backward[Region.FORMAT], rel=1e-6)
    assert forward[Region.FORMAT] == pytest.approx(backward[CONTENT], rel=1e-6)


@FEW
@given(progress=PROGRESS, step=STEP)
def test_rest_paper_lets_the_format_fall_and_arguments_and_reasoning_rise(
    progress: float, step: int
) -> None:
    kappa_K = prior("rest-paper", progress, step)
    assert kappa_K[Region.FORMAT] == pytest.approx(1 - progress / 2)
    assert kappa_K[[*ARGUMENTS, Region.REASONING]] == pytest.approx(1 + progress / 2)
    # The paper's constant for names; regions that the paper does not name are constant, too.
    rest = [Region.TOOL_NAME, Region.SCAFFOLD, Region.ANSWER, Region.END_OF_TURN, Region.MALFORMED]
    assert kappa_K[rest].tolist() == [1] * 5


@FEW
@given(progress=PROGRESS, step=STEP)
def test_uniform_is_one_everywhere(progress: float, step: int) -> None:
    assert prior("uniform", progress, step)[TRAINED].tolist() == [1] * len(TRAINED)


@pytest.mark.parametrize("preset", CURRICULA)
@FEW
@given(progress=PROGRESS, step=STEP)
def test_observations_have_no_weight_and_no_weight_is_negative(
    preset: str, progress: float, step: int
) -> None:
    kappa_K = prior(preset, progress, step)
    assert len(kappa_K) == len(Region)
    assert kappa_K[Region.OBSERVATION] == 0
    assert (kappa_K >= 0).all()
    # The authors' code alone leaves regions out.
    assert preset == "rest-code" or (kappa_K[TRAINED] > 0).all()


@FEW
@given(start=st.floats(-9, 9), slope=st.floats(-9, 9), x=st.floats(-9, 9), limit=st.floats(-9, 9))
def test_a_line_is_straight_up_to_its_limit(
    start: float, slope: float, x: float, limit: float
) -> None:
    assert Line(start, slope).at(x) == start + slope * x
    assert Line(start, slope, limit).at(x) == min(Line(start, slope).at(x), limit)
    assert Line(start).at(x) == start


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"credit\.preset='rest_code' .* nearest: rest-code"):
        prior("rest_code", 0.0, 1)
