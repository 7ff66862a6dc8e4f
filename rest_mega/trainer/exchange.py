"""Samples travel from a replica's lead to its other ranks as plain arrays, and rewards to all
ranks: nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rest_mega.records import Reals, Sample
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


def share_rewards(
    parallel: Parallel, rewards_PG: Reals | None, prompts: int, siblings: int, stop: bool
) -> npt.NDArray[np.float64] | None:
    """The rewards of all replicas' groups on every rank, in the order of the prompts, of which
    replica r of n has played [r::n]; None on every rank when one asked to `stop` or a lead passes
    None. Ranks that are no leads pass None.

    Every place has one lead that fills it, so the sum is exact and the same at any layout.
    """
    stop = stop or (parallel.is_lead and rewards_PG is None)
    whole_PG = np.zeros((prompts, siblings))
    if parallel.is_lead and rewards_PG is not None and len(rewards_PG):
        whole_PG[parallel.data_rank :: parallel.data_size] = rewards_PG
    summed = parallel.sum(np.concatenate([[float(stop)], whole_PG.ravel()]))
    return None if summed[0] > 0 else summed[1:].reshape(prompts, siblings)


def gather_rewards(parallel: Parallel, rewards_PG: Reals) -> npt.NDArray[np.float64]:
    """Rewards of a replica's groups (of any number; the same on all its ranks) -> of all replicas',
    on every rank, replica after replica."""
    text = json.dumps(np.asarray(rewards_PG, dtype=np.float64).tolist() if parallel.is_lead else [])
    rows = [row for part in parallel.gather_text(text) for row in json.loads(part)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 1)


def _flatten(samples: Sequence[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "lengths": np.array([len(s.ids_T) for s in samples], dtype=np.int64),
        "ids": np.concatenate([s.ids_T for s in samples]),
        "mask": np.concatenate([s.mask_T for s in samples]),
        "regions": np.concatenate([s.regions_T for s in samples]),
        "logprobs": np.concatenate([s.logprobs_T for s in samples]),
        "versions": np.concatenate([s.version_T for s in samples]),
        "advantages": np.array([s.advantage for s in samples], dtype=np.float64),
        "rewards": np.array([s.reward for s in samples], dtype=np.float64),
        "groups": np.array([s.group for s in samples], dtype=np.int64),
    }


def _restore(arrays: dict[str, np.ndarray[Any, Any]]) -> list[Sample]:
    cuts = np.cumsum(arrays["lengths"])[:-1]
    tokens = (
        np.split(arrays[name], cuts) for name in ("ids", "mask", "regions", "logprobs", "versions")
    )
    numbers = (arrays[name].tolist() for name in ("advantages", "rewards", "groups"))
    return [Sample(*column) for column in zip(*tokens, *numbers, strict=True)]
