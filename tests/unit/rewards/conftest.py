"""Trajectories written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from rest_mega.records import Prompt, ToolCall, Trajectory, Turn


def make_trajectory(
    *texts: str,
    task: Mapping[str, Any] | None = None,
    calls: Sequence[Sequence[ToolCall]] = (),
    well_formed: Sequence[bool] = (),
    result: Mapping[str, Any] | None = None,
    id: str = "p",
    sibling: int = 0,
) -> Trajectory:
    """One turn per text, of one token each; `calls[n]` and `well_formed[n]` belong to turn n."""
    turns = tuple(
        Turn(
            n,
            n + 1,
            text,
            (*well_formed, *(True for _ in texts))[n],
            calls=tuple((*calls, *(() for _ in texts))[n]),
        )
        for n, text in enumerate(texts)
    )
    count = len(texts)
    return Trajectory(
        prompt=Prompt(id, ({"role": "user", "content": "?"},), task=task or {}),
        sibling=sibling,
        ids_T=np.zeros(count, np.int32),
        logprobs_T=np.zeros(count, np.float32),
        mask_T=np.ones(count, np.bool_),
        turn_T=np.arange(count, dtype=np.int32),
        version_T=np.zeros(count, np.int32),
        turns=turns,
        stop="answered",
        result=result or {},
    )


@pytest.fixture
def trajectory() -> Any:
    """The builder `make_trajectory`."""
    return make_trajectory
