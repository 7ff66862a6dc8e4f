"""Runs with every penalty switched on, and with another reference, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Ended, Run, make_run, start

pytestmark = pytest.mark.distributed

QUICK = ("evaluation.greedy=false", "evaluation.every=0", "evaluation.prompts=1", "run.steps=2")
EVERY = (
    "loss.kl=0.1", "loss.kl_estimator=k2", "loss.entropy_bonus=0.01", "loss.optimizer_steps=2",
    "credit.kl_reward=0.05", "credit.tokens=kl-cov", "credit.kl_cov_share=0.2",
)  # fmt: skip


def good(ended: list[Ended]) -> None:
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err


def steps(run: Run, folder: Path) -> list[dict[str, Any]]:
    return [row for row in run.measured(folder) if "train/loss" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with every penalty."""
    made = make_run(tmp_path_factory.mktemp("run"))
    good(start(1, "train", made.config, *QUICK, *EVERY))
    return made


def test_the_reference_is_the_start_from_which_the_policy_moves_away(run: Run) -> None:
    first, second = steps(run, run.dir)
    assert first["reward/kl"] == 0  # the same pass over the same weights
    assert second["reward/kl"] != 0
    assert second["policy/reference_kl"] > 0


def test_a_resumed_run_compares_with_the_same_reference(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "step_00000002")
    good(start(1, "train", run.config, *QUICK, *EVERY, f"run.dir={copy}"))
    assert run.measured(copy) == run.measured()


def test_another_reference_is_read_and_measured_without_a_penalty(run: Run, tmp_path: Path) -> None:
    words = ("telemetry.reference_kl=true", f"model.reference={run.dir / 'hf'}", "run.steps=1")
    layout = ("parallel.pipeline=2", f"run.dir={tmp_path / 'run'}")
    good(start(2, "train", run.config, *QUICK, *words, *layout))
    (row,) = steps(run, tmp_path / "run")
    assert row["policy/reference_kl"] > 0
    assert "reward/kl" not in row
