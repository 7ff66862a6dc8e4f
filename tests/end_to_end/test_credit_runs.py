"""Runs with credit of single tokens, and without a scoring pass, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Ended, Run, make_run, start

pytestmark = pytest.mark.distributed

QUICK = ("evaluation.greedy=false", "evaluation.every=0", "evaluation.prompts=1", "run.steps=3")
UNIFORM = ("credit.preset=uniform", "loss.scoring=false")


def good(ended: list[Ended]) -> None:
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run without a scoring pass, its weights all one."""
    made = make_run(tmp_path_factory.mktemp("run"))
    good(start(1, "train", made.config, *QUICK, *UNIFORM))
    return made


def steps(run: Run, folder: Path) -> list[dict[str, Any]]:
    return [row for row in run.measured(folder) if "train/loss" in row]


def test_with_weights_that_know_no_entropy_the_scoring_pass_changes_nothing(
    run: Run, tmp_path: Path
) -> None:
    words = (*UNIFORM, "loss.scoring=true", f"run.dir={tmp_path / 'run'}")
    good(start(1, "train", run.config, *QUICK, *words))
    pairs = zip(steps(run, run.dir), steps(run, tmp_path / "run"), strict=True)
    for got, want in pairs:
        # It is the bound at the entropies that the step's weights knew; and the guard sees nothing.
        apart = ("credit/variance_bound_ratio", "gap/", "drift/")
        known = {name for name in want if not name.startswith(apart)}
        assert not [name for name in got if name.startswith(("gap/", "drift/"))]
        assert {name: got[name] for name in known} == pytest.approx(
            {name: want[name] for name in known}, rel=1e-5, abs=1e-6
        )


def test_without_a_scoring_pass_a_resumed_run_is_the_same(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "run"))
    for later in (2, 3):
        shutil.rmtree(copy / "checkpoints" / f"step_{later:08d}")
    good(start(1, "train", run.config, *QUICK, *UNIFORM, f"run.dir={copy}"))
    assert run.measured(copy) == run.measured()


def test_high_entropy_trains_on_its_share_of_the_tokens(run: Run, tmp_path: Path) -> None:
    words = ("credit.tokens=high-entropy", f"run.dir={tmp_path / 'run'}", "run.steps=2")
    good(start(2, "train", run.config, *QUICK, *words, "parallel.tensor=2"))
    for row in steps(run, tmp_path / "run"):
        kept = round(0.2 * row["tokens/trained"])
        # No two entropies of a random model are equal.
        assert row["credit/tokens_with_gradient"] * row["tokens/trained"] == pytest.approx(kept)
        shares = [value for name, value in row.items() if name.startswith("gradient/")]
        assert sum(shares) == pytest.approx(1)


def test_with_resampling_a_run_that_was_stopped_is_the_same_as_one_that_was_not(
    run: Run, tmp_path: Path
) -> None:
    words = ("credit.equal_groups=resample", "credit.advantage=reinforce++-baseline")
    words += ("rewards.parts={success: 1}", "run.steps=2", "data.held_out=")
    good(start(1, "train", run.config, *words, f"run.dir={tmp_path / 'whole'}"))
    whole = run.measured(tmp_path / "whole")
    assert sum(row["groups/resampled"] for row in whole) > 0
    run.interrupt_once()
    where = f"run.dir={tmp_path / 'stopped'}"
    assert start(1, "train", run.config, *words, where)[0].code == 130
    good(start(1, "train", run.config, *words, where))
    assert run.measured(tmp_path / "stopped") == whole
