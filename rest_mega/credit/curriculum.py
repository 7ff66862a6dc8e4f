"""Region and progress -> prior weight kappa: pure schedules, by the name of the preset.

Source: ResT (arXiv 2509.21826), curriculum: a constant for names, a falling line for the format,
rising lines for arguments and reasoning. The paper's coefficients are not known; those of
`rest-code` are the constants of the authors' code, the others are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rest_mega.config import one_of
from rest_mega.dialects import Region
from rest_mega.records import Floats

STRUCTURE = (Region.FORMAT, Region.TOOL_NAME, Region.SCAFFOLD)
ARGUMENTS = (Region.ARG_KEY, Region.ARG_VALUE, Region.ARG_SCAFFOLD)


@dataclass(frozen=True)
class Line:
    """`start + slope * x`, at most `limit`."""

    start: float
    slope: float = 0.0
    limit: float = math.inf

    def at(self, x: float) -> float:
        """The value at `x`."""
        return min(self.start + self.slope * x, self.limit)


@dataclass(frozen=True)
class Curriculum:
    """A line for each named region, and one for all others."""

    lines: Mapping[Region, Line] = field(default_factory=dict)
    others: Line = Line(1.0)
    in_steps: bool = False
    """x is the step, counted from 1; otherwise x is nu, the progress in [0, 1]."""


def _shift(rising: tuple[Region, ...], falling: tuple[Region, ...]) -> dict[Region, Line]:
    """From 0.8 to 1.2 over the run, and the other way round."""
    return {r: Line(0.8, 0.4) for r in rising} | {r: Line(1.2, -0.4) for r in falling}


CURRICULA: dict[str, Curriculum] = {
    # First learn the form of a call, then what to put into it. END_OF_TURN and MALFORMED stay
    # at 1.
    "rest": Curriculum(
        _shift(
            rising=(Region.REASONING, Region.ANSWER, Region.ARG_KEY, Region.ARG_VALUE),
            falling=(*STRUCTURE, Region.ARG_SCAFFOLD),
        )
    ),
    # The paper's form; all regions equal at nu = 0, where the weights are Eq. 9 alone.
    "rest-paper": Curriculum(
        {
            Region.FORMAT: Line(1.0, -0.5),
            **dict.fromkeys((*ARGUMENTS, Region.REASONING), Line(1.0, 0.5)),
        }
    ),
    "rest-code": Curriculum(
        {
            Region.FORMAT: Line(1.0),
            Region.TOOL_NAME: Line(1.2),
            Region.REASONING: Line(0.6, 0.002, 1.0),
            **dict.fromkeys(ARGUMENTS, Line(0.6, 0.002, 1.2)),
        },
        others=Line(0.0),
        in_steps=True,
    ),
    "uniform": Curriculum(),
}


def prior(preset: str, progress: float, step: int) -> Floats:
    """kappa_K of every region at `progress` = nu in [0, 1] and `step` counted from 1; 0 for
    OBSERVATION.

    Raises ConfigError on an unknown preset.
    """
    one_of("credit.preset", preset, CURRICULA)
    curriculum = CURRICULA[preset]
    x = float(step) if curriculum.in_steps else progress
    kappa_K = np.array(
        [curriculum.lines.get(region, curriculum.others).at(x) for region in Region],
        dtype=np.float32,
    )
    kappa_K[Region.OBSERVATION] = 0.0
    return kappa_K
