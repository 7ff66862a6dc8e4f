"""Size of a report, seconds to write it and to open it in headless Chromium.

    python -m benchmarks.report [--trajectories 1000] [--tokens 600 2000]

Runs are made up: a third of a trajectory's tokens is sampled, every number of them is random, which
compresses worse than a run's. `open` is the page's own clock from navigation to a drawn first view,
`view` from there to drawn trajectories; medians of three. Targets: below 20 MB, open below 3 s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rest_mega.telemetry.report import write_report
from tests.support.browser import Browser
from tests.support.pages import synthetic_run

DRAW = """(async () => {
  const begin = performance.now();
  document.getElementById("tab-trajectories").click();
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - begin;
})()"""


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[600, 2000])
    given = parser.parse_args()
    print("tokens each   MB   write s   open s   view s")
    for tokens in given.tokens:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(Path(folder), given.trajectories, tokens))


def measure(folder: Path, trajectories: int, tokens: int) -> str:
    """One row."""
    run = synthetic_run(folder / "run", trajectories, tokens)
    begin = time.perf_counter()
    page = write_report(run)
    wrote, size = time.perf_counter() - begin, page.stat().st_size / 1e6
    with Browser(folder / "profile") as browser:
        opened, drawn = [], []
        for _ in range(3):
            opened.append(browser.open(page))
            drawn.append(browser.js(DRAW) / 1000)
    seconds = (wrote, statistics.median(opened), statistics.median(drawn))
    return f"{tokens:11} {size:4.1f}  " + "   ".join(f"{x:6.2f}" for x in seconds)


if __name__ == "__main__":
    main()
