"""A sweep as a user runs it: a point, one that fails, gone on with, and plotted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rest_mega.telemetry.rows import read_rows

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
SWEEP = f"""
gpu: measured
ranks_per_node: 2
minutes: 5
models: {{tiny: {ROOT}/examples/scaling/models/tiny}}
settings: {{model: tiny, length: 64, tokens: 128, steps: 1, ranks: 2}}
series:
  pipeline: {{scaling: strong, trajectories: 8, points: [{{pipeline: 2}}]}}
  replicas: {{scaling: weak, trajectories: 2, points: [{{layers: te}}]}}
"""


def sweep(*words: str | Path) -> tuple[int, str]:
    script = ROOT / "examples" / "scaling" / "sweep.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def good(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(out / "results.jsonl") if row["ok"]]


def test_a_sweep_runs_goes_on_after_a_failed_point_and_is_plotted(tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(SWEEP)
    code, told = sweep("run", file, out)
    rows = read_rows(out / "results.jsonl")
    assert (code, [row["ok"] for row in rows]) == (1, [True, False]), told
    assert any("model.layers=te needs a CUDA device" in line for line in rows[1]["errors"])
    assert "1 of 2 points" in told
    measured, predicted = rows[0]["measured"], rows[0]["predicted"]
    assert measured["microbatches"] == predicted["microbatches"] == 4
    assert len(measured["rank_memory"]) == len(measured["rank_bubble"]) == 2
    assert measured["tokens"] == rows[0]["point"]["trajectories"] * 64
    assert all(0 < one < 4e9 for one in measured["rank_memory"])
    waits = zip(measured["rank_bubble"], measured["rank_idle"], strict=True)
    assert all(0 <= bubble <= idle <= 1 for bubble, idle in waits)
    assert rows[0]["gpu"]["flops"] > 1e8
    assert measured["bubble"] > 0

    # The mended file: what is there is not run again.
    file.write_text(SWEEP.replace("{layers: te}", "{layers: local}"))
    before = good(out)
    with (out / "results.jsonl").open("a") as results:
        results.write('{"point": {"series": "cut sh')
    code, told = sweep("run", file, out)
    assert (code, good(out)[:1], len(good(out))) == (0, before, 2), told
    assert "2 of 2 points" in told

    code, told = sweep("plot", out)
    assert code == 0, told
    assert "| pipeline | 2 | tiny | PP2 |" in told
    assert (out / "strong.svg").read_text().startswith("<svg")
    assert "replicas" in (out / "weak.svg").read_text()
