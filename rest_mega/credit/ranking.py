"""The k-th largest of values that many ranks hold: exact, and no value travels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rest_mega.records import Floats, Total

Keys = npt.NDArray[np.uint32]


def kth_largest(keys_R: Keys, k: int, total: Total) -> int:
    """The k-th largest (k >= 1) of the keys of all ranks, by their bytes from the top (radix
    select); 0 when there are fewer than k. Every rank calls it together: four sums of 256
    counts."""
    found, held_R = 0, keys_R
    for shift in (24, 16, 8, 0):
        bytes_R = (held_R >> np.uint32(shift)) & np.uint32(255)
        counts = total(np.bincount(bytes_R, minlength=256).astype(np.float64))
        from_top = np.cumsum(counts[::-1])
        at = min(int(np.searchsorted(from_top, k)), 255)
        k -= int(from_top[at - 1]) if at else 0
        held_R = held_R[bytes_R == 255 - at]
        found = found << 8 | (255 - at)
    return found


def ordered(values_R: Floats) -> Keys:
    """Keys in the order of the values: their bits, negative numbers turned round."""
    bits_R = (np.asarray(values_R, dtype=np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    return np.asarray(np.where(bits_R >> 31, ~bits_R, bits_R | np.uint32(1 << 31)))


def quantile(values_R: Floats, percent: int, total: Total) -> float:
    """The smallest value >= 0 that `percent` of the values of all ranks do not exceed (nearest
    rank); 0 where there is none. Values must not be negative or NaN."""
    count = int(total(np.array([len(values_R)], dtype=np.float64))[0])
    keys_R = ordered(values_R)
    # Rank from the bottom: ceil(percent * count / 100), in whole numbers.
    key = kth_largest(keys_R, max(1, count + 1 - -(-percent * count // 100)), total)
    return float(np.array([key & 0x7FFFFFFF], dtype=np.uint32).view(np.float32)[0])
