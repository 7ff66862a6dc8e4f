"""Samples travel from a replica's players to all its ranks as plain arrays, and rewards to all
ranks: nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rest_mega.records import Reals, Sample
from rest_mega.trainer.parallel import Parallel


def share_samples(parallel: Parallel, samples: Sequence[Sample]) -> tuple[list[Sample], slice]:
    """(the samples of a replica, player after player, on all its ranks; which of them this rank
    gave). A player gives its own, their groups numbered from 0; others' are not looked at."""
    whole: list[Sample] = []
    mine, groups = slice(0, 0), 0
    for source in parallel.players[parallel.data_rank :: parallel.data_size]:
        shared = parallel.share(_flatten(samples) if parallel.rank == source else None, source)
        found = _restore(shared, groups)
        if parallel.rank == source:
            mine = slice(len(whole), len(whole) + len(found))
        groups = max((sample.group + 1 for sample in found), default=groups)
        whole += found
    return whole, mine


def share_rewards(
    parallel: Parallel, rewards_PG: Reals | None, prompts: int, siblings: int, stop: bool
) -> npt.NDArray[np.float64] | None:
    """The rewards of all replicas' groups on every rank, in the order of the prompts, of which
    player k of n has played [k::n]; None on every rank when one asked to `stop` or a player passes
    None. Ranks that are no players pass None.

    Every place has one player that fills it, so the sum is exact and the same at any layout.
    """
    stop = stop or (parallel.is_player and rewards_PG is None)
    whole_PG = np.zeros((prompts, siblings))
    if parallel.is_player and rewards_PG is not None and len(rewards_PG):
        whole_PG[parallel.player :: len(parallel.players)] = rewards_PG
    summed = parallel.sum(np.concatenate([[float(stop)], whole_PG.ravel()]))
    return None if summed[0] > 0 else summed[1:].reshape(prompts, siblings)


def gather_rewards(parallel: Parallel, rewards_PG: Reals) -> npt.NDArray[np.float64]:
    """Rewards of a replica's groups (of any number; the same on all its ranks) -> of all replicas',
    on every rank, replica after replica."""
    text = json.dumps(np.asarray(rewards_PG, dtype=np.float64).tolist() if parallel.is_lead else [])
    rows = [row for part in parallel.gather_text(text) for row in json.loads(part)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 1)


def _flatten(samples: Sequence[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    if not samples:
        return {}
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


def _restore(arrays: dict[str, np.ndarray[Any, Any]], groups: int) -> list[Sample]:
    """The samples, their groups numbered from `groups`."""
    if not arrays:
        return []
    cuts = np.cumsum(arrays["lengths"])[:-1]
    tokens = (
        np.split(arrays[name], cuts) for name in ("ids", "mask", "regions", "logprobs", "versions")
    )
    numbers = (arrays[name].tolist() for name in ("advantages", "rewards"))
    groups_S = (groups + arrays["groups"]).tolist()
    return [Sample(*column) for column in zip(*tokens, *numbers, groups_S, strict=True)]
