"""What the plan says of a point, on a GPU of its table or on the device as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from points import MEASURED, Point, Sweep

from rest_mega.planning import GPUS, Gpu, plan
from rest_mega.trainer.model import read_architecture

NO_LINK = 1e18
"""Bytes/s of a link that one rank does not use."""


def device(sweep: Sweep, measured: Mapping[str, Any] | None) -> Gpu:
    """The row that the plan is given. A measured one is of all ranks at the same time: ranks that
    share a core have its FLOP/s divided among them."""
    if sweep.gpu != MEASURED:
        return GPUS[sweep.gpu]
    assert measured is not None, "gpu=measured, and nothing was measured"
    speed = measured["speed"]
    link = speed["link"] or NO_LINK
    return Gpu(
        name=f"measured at {measured['run']['ranks']} ranks",
        memory=speed["memory"],
        flops=speed["flops"],
        bandwidth=speed["bandwidth"],
        link=link,
        network=link,
        per_node=sweep.ranks_per_node,
    )


def predict(point: Point, gpu: Gpu, dtype: str) -> dict[str, Any]:
    """The plan's figures for training, by the names that train_step.py gives the measured ones.
    ConfigError where the model cannot be cut so."""
    made = plan(point.config(dtype), read_architecture(point.model), gpu, point.ranks)
    seconds = made.seconds["train"]
    return {
        "tokens_per_second": made.tokens_per_second,
        "tflops_per_rank": made.model_flops / seconds / point.ranks / 1e12,
        "mfu": made.mfu,
        "bubble": made.bubble,
        "memory": made.memory.total,
        "train": seconds,
        "score": made.seconds["score"],
        "microbatches": made.batch.microbatches,
        "fits": made.fits,
    }
