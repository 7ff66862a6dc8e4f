"""Schedules of the rubric: name, step -> a factor for the coefficient of each part it speaks of.

`rest` is ResT's dynamic reward (arXiv 2509.21826, constants of the authors' code): at 1-based step
s the format is worth F_max - F_min and the calls C_max - C_min, with

    F_max = max(1, 2 - s/150)        F_min = min(-1, -2 + 2s/150)
    C_max = min(3, 2 + s/150)        C_min = max(-3, -2 - s/150)

from 4 : 4 at the start to 2 : 6 from step 150 on. Their offsets are the same for all siblings of a
prompt and cancel in the advantage, so they are left out. Evaluation does not depend on the step: it
uses the last values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

Schedule = Callable[[float], Mapping[str, float]]

LAST = math.inf
"""The step of an evaluation: every schedule has reached its end."""


def _none(step: float) -> Mapping[str, float]:
    return {}


def _rest(step: float) -> Mapping[str, float]:
    form = max(1.0, 2.0 - step / 150) - min(-1.0, -2.0 + 2.0 * step / 150)
    calls = min(3.0, 2.0 + step / 150) - max(-3.0, -2.0 - step / 150)
    return {"format": form, "tool_calls": calls}


SCHEDULES: Mapping[str, Schedule] = MappingProxyType({"none": _none, "rest": _rest})
"""Name -> function of the step; a part that it does not name keeps its coefficient."""
