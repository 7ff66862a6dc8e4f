"""Samples -> micro-batches: whole samples packed by tokens, the same number of micro-batches on
every replica.

- no micro-batch holds more than its cap, no sample is cut, every sample is in exactly one;
- a sample of L ids gives L - 1 predictions: inputs are ids[:-1], targets ids[1:];
- replicas that are short split their largest micro-batches, then add fillers that train nothing.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_mega.config import ParallelConfig
from rest_mega.records import Microbatch, Sample


def bounds(count: int, parts: int) -> list[int]:
    """Where `count` samples are cut into `parts` optimizer steps: part i is [bounds[i],
    bounds[i + 1])."""
    return [count * i // parts for i in range(parts + 1)]


def plan(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `tokens`: best-fit decreasing, O(n log n) (Johnson,
    1974).

    Raises ValueError when one length exceeds the cap.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > tokens:
        raise ValueError(
            f"a sample needs {lengths[order[0]]} tokens, packing.tokens is {tokens}: raise "
            "packing.tokens "
            "or lower rollout.max_tokens"
        )
    bins: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for i in order:
        at = bisect.bisect_left(gaps, (lengths[i], -1))
        free, b = gaps.pop(at) if at < len(gaps) else (tokens, len(bins))
        if b == len(bins):
            bins.append([])
        bins[b].append(i)
        bisect.insort(gaps, (free - lengths[i], b))
    return bins


def spread(bins: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """At least as many bins as `count`: the fullest bin with several samples is halved, then empty
    bins are added."""
    heap = [(-sum(lengths[i] for i in b), n, b) for n, b in enumerate(bins)]
    heapq.heapify(heap)
    done: list[list[int]] = []
    while heap and len(heap) + len(done) < count:
        _, n, fullest = heapq.heappop(heap)
        if len(fullest) == 1:
            done.append(fullest)
            continue
        for k, half in enumerate((fullest[0::2], fullest[1::2])):
            heapq.heappush(heap, (-sum(lengths[i] for i in half), n * 2 + k, half))
    done += [b for _, _, b in sorted(heap)]
    return done + [[] for _ in range(count - len(done))]


def pad_multiple(sizes: ParallelConfig) -> int:
    """What the tokens of a micro-batch must be a multiple of (with context parallelism every
    sequence is padded by itself, in `forward.local_part`)."""
    return sizes.tensor if sizes.sequence and sizes.context == 1 else 1


def pack(
    samples: Sequence[Sample], tokens: int, *, pad_multiple: int = 1, count: int | None = None
) -> list[Microbatch]:
    """Micro-batches of at most `tokens` (before padding to `pad_multiple`), `count` of them when
    given.

    Raises ValueError when a sample exceeds the cap or `count` is smaller than the bins needed.
    """
    lengths = [len(s.ids_T) - 1 for s in samples]
    bins = plan(lengths, tokens)
    if count is not None:
        if count < len(bins):
            raise ValueError(f"{len(bins)} micro-batches are needed, count={count} were agreed on")
        bins = spread(bins, lengths, count)
    return [_microbatch(samples, members, pad_multiple) for members in bins]


def _microbatch(samples: Sequence[Sample], members: Sequence[int], multiple: int) -> Microbatch:
    lengths = [len(samples[i].ids_T) - 1 for i in members]
    total = sum(lengths)
    padding = -total % multiple if total else multiple

    def joined(parts: list[Any], fill: float, dtype: Any) -> Any:
        return np.concatenate([*parts, np.full(padding, fill)]).astype(dtype)

    chosen = [samples[i] for i in members]
    return Microbatch(
        ids_T=joined([s.ids_T[:-1] for s in chosen], 0, np.int32),
        targets_T=joined([s.ids_T[1:] for s in chosen], 0, np.int32),
        positions_T=joined([np.arange(n) for n in lengths], 0, np.int32),
        lengths_S=np.array(lengths + [padding] * (padding > 0), dtype=np.int32),
        sample_T=joined(
            [np.full(n, i) for i, n in zip(members, lengths, strict=True)], -1, np.int32
        ),
        mask_T=joined([s.mask_T[1:] for s in chosen], 0, np.bool_),
        regions_T=joined([s.regions_T[1:] for s in chosen], 0, np.int8),
        advantages_T=joined(
            [np.full(n, s.advantage) for s, n in zip(chosen, lengths, strict=True)], 0, np.float32
        ),
        drift_T=joined([np.zeros(n) for n in lengths], 0, np.float32),
        logprobs_T=joined([s.logprobs_T[1:] for s in chosen], 0, np.float32),
    )
