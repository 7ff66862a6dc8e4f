"""On a GPU: a whole run saves, resumes where it was, and says the numbers of an undisturbed one.

    python -m pytest -m gpu tests/gpu/test_run.py

What tests/end_to_end/test_runs.py shows bit for bit on a CPU; here to the rounding of sums whose
order the GPU chooses.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import Run, make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ROOT = Path(__file__).parents[2]


def _train(run: Run, *words: str) -> str:
    command = [sys.executable, "-m", "rest_mega", "train", str(run.config), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _steps(run: Run, folder: Path | None = None) -> list[dict[str, float]]:
    """The rows of training steps (evaluations have rows of their own)."""
    return [row for row in run.rows(folder=folder) if "train/loss" in row]


def test_a_resumed_run_says_the_numbers_of_an_undisturbed_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _train(run, f"run.dir={tmp_path / 'whole'}")
    _train(run, "run.until=2")
    assert [row["step"] for row in _steps(run)] == [1, 2]
    _train(run)
    ours, whole = _steps(run), _steps(run, tmp_path / "whole")
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for name in ("train/grad_norm", "policy/entropy", "reward/mean"):
        values = [[row[name] for row in rows] for rows in (ours, whole)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=name)
