"""Sampled ids -> one region per token, from the bytes of the tokens as they were sampled, in linear
time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rest_mega.dialects import Region, parse
from rest_mega.records import SmallInts, Trajectory

PRIORITY = (
    Region.TOOL_NAME,
    Region.FORMAT,
    Region.ARG_VALUE,
    Region.ARG_KEY,
    Region.ARG_SCAFFOLD,
    Region.REASONING,
    Region.ANSWER,
    Region.SCAFFOLD,
    Region.MALFORMED,
    Region.END_OF_TURN,
    Region.OBSERVATION,
)
"""A token that overlaps several regions takes the first of them here. Weights change from step to
step and are unknown when tokens are tagged; this is the order of the authors' constants (up to
their step
200)."""

_REGION_OF_RANK = np.array(PRIORITY[::-1], dtype=np.int8)
_RANK_OF_REGION = np.argsort(_REGION_OF_RANK).astype(np.int8)


def tag(token_bytes: Sequence[bytes], dialect: str, *, end_of_turn: bool = False) -> SmallInts:
    """Regions of the tokens of one reply -> regions_T.

    `token_bytes`: the bytes of every sampled token, in order; characters may be split over tokens.
    `end_of_turn`: the last token is the end-of-turn token, and no part of the reply's text.
    A token without bytes takes the region of the byte that follows it. Raises ConfigError on an
    unknown dialect.
    """
    text = token_bytes[:-1] if end_of_turn else token_bytes
    regions_T = np.full(len(token_bytes), Region.END_OF_TURN, dtype=np.int8)
    regions_T[: len(text)] = _strongest(parse(b"".join(text), dialect).regions_B, text)
    return regions_T


def tag_trajectory(
    trajectory: Trajectory, dialect: str, token_bytes: Callable[[int], bytes]
) -> SmallInts:
    """Regions of all tokens of an episode -> regions_T; OBSERVATION wherever the policy did not
    sample.

    A turn's last token is its end-of-turn token, unless a limit cut the turn off.
    """
    regions_T = np.full(len(trajectory.ids_T), Region.OBSERVATION, dtype=np.int8)
    for turn in trajectory.turns:
        tokens = [token_bytes(i) for i in trajectory.ids_T[turn.start : turn.end].tolist()]
        regions_T[turn.start : turn.end] = tag(tokens, dialect, end_of_turn=turn.ended)
    regions_T[~trajectory.mask_T] = Region.OBSERVATION
    return regions_T


def _strongest(regions_B: SmallInts, tokens: Sequence[bytes]) -> SmallInts:
    """The region of highest priority among each token's bytes."""
    if not tokens:
        return np.zeros(0, dtype=np.int8)
    starts_T = np.zeros(len(tokens), dtype=np.int64)
    np.cumsum(
        np.fromiter(map(len, tokens[:-1]), dtype=np.int64, count=len(tokens) - 1), out=starts_T[1:]
    )
    # One byte more, for tokens without bytes at the very end.
    last = regions_B[-1:] if len(regions_B) else np.array([Region.ANSWER], dtype=np.int8)
    ranks_B = _RANK_OF_REGION.take(np.concatenate([regions_B, last]))
    return _REGION_OF_RANK.take(np.maximum.reduceat(ranks_B, starts_T))


__all__ = ["PRIORITY", "Region", "tag", "tag_trajectory"]
