"""What is kept of rollouts between steps: the bank, and groups that are carried over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed

QUICK = ("data.held_out=", "run.export=false", "rollout.prompts_per_step=4")
CARRY = (*QUICK, "rollout.oversample=0.5", "guard.mean=1e-3")


def train(run: Run, folder: Path, *words: str, ranks: int = 1, machines: int = 1) -> None:
    ended = start(ranks, "train", run.config, *words, f"run.dir={folder}", machines=machines)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err


def crashed(folder: Path, copy: Path, step: int) -> Path:
    """The run directory without the checkpoints after `step`."""
    shutil.copytree(folder, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return copy


def played(run: Run, folder: Path) -> list[tuple[int, str, int]]:
    return [(r["step"], r["prompt"], r["sibling"]) for r in run.rows("trajectories", folder)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    """A run whose bank was kept."""
    train(run, run.root / "whole", *QUICK, "rollout.record=true")
    return run.root / "whole"


def test_a_step_is_replayed_to_the_last_digit(run: Run, whole: Path, tmp_path: Path) -> None:
    copy, verdicts = crashed(whole, tmp_path / "copy", 1), run.verdicts
    (ended,) = start(1, "replay", copy, "--step", 3)  # two steps after the checkpoint
    assert ended.code == 0, ended.err
    assert "every metric is the same to the last digit" in ended.out
    assert [r["step"] for r in run.measured(copy / "replays" / "step_3")] == [2, 3]
    assert run.verdicts == verdicts
    (ended,) = start(1, "replay", copy, "--step", 3, "optimizer.lr=1e-4")
    assert ended.code == 1
    assert re.search("train/lr .* in the run, .* in the replay", ended.out)


@pytest.mark.parametrize(
    ("step", "message"),
    [(9, "step 9 of .* cannot be replayed: the checkpoint before it is of step 4"), (0, "from 1")],
)
def test_a_step_that_was_not_kept_is_refused(whole: Path, step: int, message: str) -> None:
    (ended,) = start(1, "replay", whole, "--step", step)
    assert ended.code == 2
    assert re.search(message, ended.err)


def test_a_run_goes_on_from_another_runs_checkpoint(run: Run, whole: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    train(run, fork, *QUICK, f"run.load={whole / 'checkpoints' / 'step_00000002'}")
    assert run.measured(fork) == run.measured(whole)[2:]
    (ended,) = start(
        1, "train", run.config, *QUICK, f"run.dir={tmp_path}/x", f"run.load={tmp_path}"
    )
    assert ended.code == 2
    assert "is neither a checkpoint nor a run directory with an intact one" in ended.err


def test_a_run_that_died_in_training_plays_no_episode_again(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    copy, verdicts = crashed(whole, tmp_path / "copy", 2), run.verdicts
    train(run, copy, *QUICK, "rollout.record=true")
    assert run.verdicts == verdicts
    assert run.measured(copy) == run.measured(whole)
    # Without the bank the same numbers come from playing anew.
    anew = crashed(whole, tmp_path / "anew", 2)
    train(run, anew, *QUICK, "rollout.bank=false")
    assert run.verdicts == verdicts + 2 * 4 * 2
    assert run.measured(anew) == run.measured(whole)
    assert not list((anew / "bank").iterdir())


def test_a_checkpoint_takes_the_place_of_the_bank(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path / "run", *QUICK, "run.save_every=3", "run.async_save=false")
    assert not list((tmp_path / "run" / "bank").iterdir())


@pytest.fixture(scope="module")
def carried(run: Run) -> Path:
    """A run of which every step carries groups into the next."""
    train(run, run.root / "carried", *CARRY)
    return run.root / "carried"


def test_groups_that_were_begun_beyond_need_are_trained_on_in_the_next_step(
    run: Run, carried: Path
) -> None:
    rows = run.measured(carried)
    assert [row["groups/carried"] for row in rows] == [2] * 4
    # The groups that come first were sampled by the policy before.
    assert rows[0]["rollout/stale_tokens"] == 0
    assert all(0.2 < row["rollout/stale_tokens"] < 0.8 for row in rows[1:])
    prompts = [prompt for _, prompt, sibling in played(run, carried) if sibling % 2 == 0]
    assert sorted(prompts[:6]) == [f"p{n}" for n in range(6)]  # none is lost, none comes twice
    # The guard looks at what the current policy sampled, and finds rounding alone.
    assert all(row["gap/max"] < 1e-4 for row in rows)
    assert all(row["policy/rollout_gap_max"] > 1e-3 for row in rows[1:])


@pytest.mark.parametrize("banked", [True, False])
def test_a_resumed_run_goes_on_with_the_carried_groups_bit_for_bit(
    run: Run, carried: Path, tmp_path: Path, banked: bool
) -> None:
    """From the checkpoint alone, or with step three, and what it carried, in the bank."""
    copy = tmp_path / "copy"
    if not banked:
        crashed(carried, copy, 2)
    else:
        train(run, copy, *CARRY, "run.until=3", "rollout.record=true")
        shutil.rmtree(copy / "checkpoints" / "step_00000003")
        verdicts = run.verdicts
        train(run, copy, *CARRY, "run.until=3", "rollout.record=true")
        assert run.verdicts == verdicts
    train(run, copy, *CARRY)
    assert run.measured(copy) == run.measured(carried)
    assert played(run, copy) == played(run, carried)


@pytest.mark.parametrize("pipeline", [1, 2], ids=["two replicas", "one on two machines"])
def test_carried_groups_are_dealt_to_however_many_players_there_are(
    pipeline: int, run: Run, carried: Path, tmp_path: Path
) -> None:
    folder = carried / "checkpoints" / "step_00000002"
    rows = [json.loads(line) for line in (folder / "episodes_0.jsonl").read_text().splitlines()]
    copy = crashed(carried, tmp_path / "copy", 2)
    words = (*CARRY, "run.until=3", f"parallel.pipeline={pipeline}")
    train(run, copy, *words, ranks=2, machines=pipeline)
    third = run.measured(copy)[-1]
    assert (third["step"], third["groups/carried"]) == (3, 2)
    first = next(prompt for step, prompt, _ in played(run, copy) if step == 3)
    assert first in {row["prompt"] for row in rows}
    want: Any = run.measured(carried)[2]
    assert third["reward/mean"] == pytest.approx(want["reward/mean"], abs=1e-6)
    assert third["train/loss"] == pytest.approx(want["train/loss"], rel=1e-4, abs=1e-6)


def test_what_is_not_carried_is_dropped(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path / "run", *CARRY, "rollout.unfinished=drop", "run.steps=2")
    rows = run.measured(tmp_path / "run")
    assert [row["groups/carried"] for row in rows] == [0, 0]
    assert [row["rollout/stale_tokens"] for row in rows] == [0, 0]
