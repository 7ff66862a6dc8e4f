"""Time and quality of packing trajectories into micro-batches, beside first-fit in arrival order.

    python benchmarks/packing.py [--repeats 5]

Lengths are lognormal(7.6, 0.9) clipped to [64, 16384], the cap is 16384 tokens. CPU time of this
process, median of the repeats. Targets: 8,192 trajectories in at most 50 ms, at most 1 % more bins
than the least possible, none over its cap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from rest_mega.trainer.packing import plan

CAP = 16_384
COUNTS = (512, 2048, 8192)


def lengths(count: int) -> list[int]:
    """Made-up lengths of trajectories, the same ones every time."""
    drawn = np.random.default_rng(count).lognormal(7.6, 0.9, count)
    return np.clip(drawn, 64, CAP).astype(int).tolist()


def first_fit(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """The usual way: every trajectory into the first bin that has room."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i, size in enumerate(sizes):
        b = next((b for b, room in enumerate(free) if room >= size), len(bins))
        if b == len(bins):
            bins.append([])
            free.append(cap)
        bins[b].append(i)
        free[b] -= size
    return bins


Way = Callable[[Sequence[int], int], list[list[int]]]
WAYS: dict[str, Way] = {"best-fit decreasing": plan, "first-fit": first_fit}


def milliseconds(way: Way, sizes: Sequence[int], repeats: int) -> float:
    """Median CPU time of a packing."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        way(sizes, CAP)
        taken.append(1e3 * (time.process_time() - start))
    return statistics.median(taken)


def main() -> None:
    """Print one row per count and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(
        f"{'n':>6}  {'way':<20}{'ms':>9}{'x best-fit':>12}{'bins':>7}{'least':>7}{'over cap':>10}"
    )
    for count in COUNTS:
        sizes = lengths(count)
        times = {name: milliseconds(way, sizes, repeats) for name, way in WAYS.items()}
        for name, way in WAYS.items():
            bins = way(sizes, CAP)
            over = sum(sum(sizes[i] for i in b) > CAP for b in bins)
            ratio = times[name] / times["best-fit decreasing"]
            least = -(-sum(sizes) // CAP)
            print(
                f"{count:>6}  {name:<20}{times[name]:>9.2f}{ratio:>12.1f}"
                f"{len(bins):>7}{least:>7}{over:>10}"
            )


if __name__ == "__main__":
    main()
