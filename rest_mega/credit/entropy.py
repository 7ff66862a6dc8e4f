"""Entropy of every region: a running mean over steps that checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_mega.config import require
from rest_mega.dialects import Region
from rest_mega.records import Floats

UNKNOWN_ENTROPY = 1.0
"""Nats that every region counts as before any was seen: equal entropies give equal weights."""


class EntropyTracker:
    """Running mean of each region's entropy in nats, K = len(Region).

    `mean <- momentum * mean + (1 - momentum) * mean of this step`, from the first step that has the
    region's tokens; a step without them leaves it. A region not seen yet counts as the average of
    those seen, so that the entropy rule neither favours nor starves it.
    """

    def __init__(self, momentum: float) -> None:
        """`momentum`: share of the old value kept at each step, in [0, 1)."""
        require(0 <= momentum < 1, f"momentum={momentum} must be in [0, 1)")
        self._momentum = momentum
        self._means_K = np.full(len(Region), np.nan)

    def update(self, sum_K: Floats, count_K: Floats) -> None:
        """Add a step: the sum of the entropies and the number of its trained tokens, by region,
        over all ranks.

        Sums that are not finite (a step that blew up) are left out.
        """
        sum_K, count_K = np.asarray(sum_K, dtype=np.float64), np.asarray(count_K, dtype=np.float64)
        seen_K = (count_K > 0) & np.isfinite(sum_K)
        new_K = np.maximum(sum_K[seen_K] / count_K[seen_K], 0.0)
        old_K = self._means_K[seen_K]
        kept_K = np.where(np.isnan(old_K), new_K, old_K)
        self._means_K[seen_K] = self._momentum * kept_K + (1 - self._momentum) * new_K

    @property
    def means_K(self) -> Floats:
        """Entropy of every region in nats, never NaN."""
        seen_K = ~np.isnan(self._means_K)
        default = self._means_K[seen_K].mean() if seen_K.any() else UNKNOWN_ENTROPY
        return np.where(seen_K, self._means_K, default).astype(np.float32)

    def state(self) -> dict[str, list[float | None]]:
        """What a checkpoint keeps; None for regions not seen yet."""
        return {"means": [None if np.isnan(mean) else float(mean) for mean in self._means_K]}

    def load(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Go on from a `state()`; ConfigError when it was made with other regions."""
        means = state["means"]
        require(
            len(means) == len(Region),
            f"the checkpoint has entropies of {len(means)} regions, this version {len(Region)}: "
            "resume it with the version that wrote it, or start anew",
        )
        self._means_K = np.array(
            [np.nan if mean is None else mean for mean in means], dtype=np.float64
        )
