"""The benchmark of the rollout client runs: real engine, collector and tools, simulated server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_it_plays_all_turns_and_prints_both_comparisons() -> None:
    words = [
        "--requests",
        "40",
        "--repeats",
        "1",
        "--episodes",
        "6",
        "--turns",
        "3",
        "--decode",
        "0.05",
        "--tool",
        "0.02",
    ]
    script = ROOT / "benchmarks" / "rollout_client.py"
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "httpx over ours" in done.stdout
    assert "6 episodes of 3 turns at once" in done.stdout
