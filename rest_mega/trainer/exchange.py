"""Samples travel from a replica's lead to its other ranks as plain arrays: nothing is unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_mega.records import Sample
from rest_mega.trainer.parallel import Parallel


def share_samples(parallel: Parallel, samples: Sequence[Sample] | None) -> list[Sample] | None:
    """The lead's samples on every rank of its replica; None from the lead (a stop) arrives as
    None."""
    arrays = None
    if parallel.is_lead:
        arrays = {"stop": np.array([samples is None])} | (_flatten(samples) if samples else {})
    shared = parallel.share(arrays)
    if shared["stop"][0]:
        return None
    return _restore(shared) if "ids" in shared else []


def _flatten(samples: Sequence[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "lengths": np.array([len(s.ids_T) for s in samples], dtype=np.int64),
        "ids": np.concatenate([s.ids_T for s in samples]),
        "mask": np.concatenate([s.mask_T for s in samples]),
        "regions": np.concatenate([s.regions_T for s in samples]),
        "logprobs": np.concatenate([s.logprobs_T for s in samples]),
        "advantages": np.array([s.advantage for s in samples], dtype=np.float64),
        "rewards": np.array([s.reward for s in samples], dtype=np.float64),
        "groups": np.array([s.group for s in samples], dtype=np.int64),
    }


def _restore(arrays: dict[str, np.ndarray[Any, Any]]) -> list[Sample]:
    cuts = np.cumsum(arrays["lengths"])[:-1]
    ids, mask, regions, logprobs = (
        np.split(arrays[name], cuts) for name in ("ids", "mask", "regions", "logprobs")
    )
    numbers = (arrays[name].tolist() for name in ("advantages", "rewards", "groups"))
    return [Sample(*column) for column in zip(ids, mask, regions, logprobs, *numbers, strict=True)]
