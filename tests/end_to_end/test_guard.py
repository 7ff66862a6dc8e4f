"""A run whose engine's log-probs are wrong ends before the step, and its dump is that very step."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from rest_mega.dialects import Region
from rest_mega.nonfinite import NONFINITE
from rest_mega.records import Prompt, Trajectory
from rest_mega.rollout.bank import ReadOnlyBank, write_rows
from rest_mega.rollout.episode import Row, row_of, trajectory_of
from tests.support.runs import Ended, Run, make_run, start

pytestmark = pytest.mark.distributed

QUICK = ("data.held_out=", "run.steps=4", "run.until=2", "loss.correction=tis")
"""Under tis the engine's log-probs change the parameters."""
OFF = ("guard.mean=null", "guard.p99=null", "guard.max=null")
WRONG = 3.0
"""Nats by which every third token of step two is wrong."""


def good(ended: list[Ended]) -> None:
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err


def weights(folder: Path) -> bytes:
    return (folder / "hf" / "model.safetensors").read_bytes()


def banked(folder: Path, step: int) -> list[Trajectory]:
    """The trajectories that were kept for a step, in an order of their own."""
    rows = ReadOnlyBank(folder).shelf(step).rows
    return [trajectory_of(rows[key], Prompt(rows[key]["prompt"], ())) for key in sorted(rows)]


def same(ones: list[Trajectory], others: list[Trajectory]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert (one.prompt, one.sibling, one.turns) == (other.prompt, other.sibling, other.turns)
        for name in ("ids_T", "logprobs_T", "turn_T", "version_T"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps whose bank was kept, and a copy of the bank with wrong log-probs in step two."""
    made = make_run(tmp_path_factory.mktemp("run"))
    good(start(1, "train", made.config, *QUICK, "rollout.record=true"))
    wrong = made.root / "wrong"
    shutil.copytree(made.dir / "bank", wrong)
    rows = ReadOnlyBank(wrong).shelf(2).rows
    write_rows(wrong, 2, 0, [mistaken(row) for row in rows.values()])
    return made


def mistaken(row: Row) -> Row:
    """Every third sampled token's log-prob is wrong."""
    t = trajectory_of(row, Prompt(row["prompt"], ()))
    t.logprobs_T[np.flatnonzero(t.mask_T)[::3]] -= np.float32(WRONG)
    return row_of(t, row["seed"])


def replay(run: Run, folder: Path, *more: str, ranks: int = 1, machines: int = 1) -> list[Ended]:
    words = ("rollout.engine=replay", f"rollout.replay={run.root / 'wrong'}", f"run.dir={folder}")
    return start(ranks, "train", run.config, *QUICK, *words, *more, machines=machines)


@pytest.fixture(scope="module")
def stopped(run: Run) -> Ended:
    return replay(run, run.root / "stopped")[0]


def test_a_healthy_run_has_a_gap_of_rounding_alone(run: Run) -> None:
    steps = run.measured()
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert 0 <= row["gap/mean"] <= row["gap/p99"] <= row["gap/max"] < 1e-4
        assert row["gap/mean"] == pytest.approx(row["policy/rollout_gap"], rel=1e-4)
        assert row["gap/max"] == pytest.approx(row["policy/rollout_gap_max"], rel=1e-4)
        shares = {r.name: row.get(f"share/{r.name}", 0.0) for r in Region}
        parts = sum(shares[name] * row[f"gap/{name}"] for name in shares if shares[name])
        assert parts == pytest.approx(row["gap/mean"], rel=1e-4)
        assert 0 <= row["drift/turns"] <= 1


def test_the_guard_ends_the_run_before_the_step_and_says_why(run: Run, stopped: Ended) -> None:
    folder = run.root / "stopped"
    assert stopped.code == 3, stopped.err
    assert [row["step"] for row in run.measured(folder)] == [1]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000001"]
    about = json.loads((folder / "dumps" / "step_2" / "gap.json").read_text())
    assert about["gap"]["mean"] == pytest.approx(WRONG / 3, rel=0.3)
    assert (about["gap"]["p99"], about["gap"]["max"]) == pytest.approx((WRONG, WRONG), abs=1e-3)
    worst = about["worst"]
    assert worst["trainer"] - worst["engine"] == pytest.approx(WRONG, abs=1e-3)
    for told in (
        "step 2 was not taken: the mean |trainer - engine| log-prob is",
        "guard.mean=0.1 allows 0.1; the 99th percentile of |trainer - engine| log-prob is 3 nats",
        f"(id {worst['id']}, {worst['region']}) of prompt '{worst['prompt']}'",
        "the newest checkpoint is of step 1",
    ):
        assert told in stopped.err
    assert not (folder / "hf").exists()


def test_the_dump_holds_every_token_with_both_log_probs(run: Run, stopped: Ended) -> None:
    dump = run.root / "stopped" / "dumps" / "step_2"
    about = json.loads((dump / "trajectories_0.json").read_text())
    with np.load(dump / "tokens_0.npz", allow_pickle=False) as arrays:
        a = dict(arrays)
    trained = [t for t in about if t["trained"]]
    assert a["rewards_S"].tolist() == [t["reward"] for t in trained]
    assert a["advantages_S"].tolist() == [t["advantage"] for t in trained]
    assert a["lengths_S"].sum() == len(a["ids_T"]) == len(a["regions_T"])
    for name in ("engine_T", "trainer_T"):
        np.testing.assert_array_equal(np.isfinite(a[name]), a["mask_T"])
    gap_T = (a["trainer_T"] - a["engine_T"])[a["mask_T"]]
    np.testing.assert_allclose(np.where(gap_T > 1, gap_T - WRONG, gap_T), 0, atol=1e-4)
    gap = json.loads((dump / "gap.json").read_text())["gap"]
    regions_R = a["regions_T"][a["mask_T"]]
    for name, mean in gap["regions"].items():
        assert mean == pytest.approx(np.abs(gap_T[regions_R == Region[name]]).mean(), rel=1e-4)
    same(banked(dump / "bank", 2), banked(run.root / "wrong", 2))


def test_the_command_of_the_message_takes_the_step_that_would_have_been_taken(
    run: Run, stopped: Ended, tmp_path: Path
) -> None:
    good(replay(run, tmp_path / "taken", *OFF))
    command = stopped.err.split("to play the step again: rest-mega ")[1].splitlines()[0]
    copy = Path(shutil.copytree(run.root / "stopped", tmp_path / "stopped"))
    again = start(1, *shlex.split(command), *OFF, f"run.dir={copy}")
    good(again)
    assert weights(copy) == weights(tmp_path / "taken")
    assert weights(copy) != weights(run.dir)
    assert run.measured(copy) == run.measured(tmp_path / "taken")


def test_two_replicas_dump_their_shares_of_the_same_batch(
    run: Run, stopped: Ended, tmp_path: Path
) -> None:
    ended = replay(run, tmp_path / "two", ranks=2)
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    assert sum("to play the step again: torchrun" in rank.err for rank in ended) == 1
    one, two = (d / "dumps" / "step_2" for d in (run.root / "stopped", tmp_path / "two"))
    same(banked(two / "bank", 2), banked(one / "bank", 2))
    gaps = [json.loads((dump / "gap.json").read_text()) for dump in (one, two)]
    assert gaps[1]["gap"]["mean"] == pytest.approx(gaps[0]["gap"]["mean"], rel=1e-4)
    shares = [json.loads((two / f"trajectories_{r}.json").read_text()) for r in (0, 1)]
    assert len({t["prompt"] for t in shares[0]} & {t["prompt"] for t in shares[1]}) == 0


def test_the_players_of_a_replica_dump_their_shares(run: Run, tmp_path: Path) -> None:
    words = ("parallel.pipeline=2", "guard.max=1e-12", f"run.dir={tmp_path / 'run'}")
    ended = start(2, "train", run.config, *QUICK, *words, machines=2)
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    dump = tmp_path / "run" / "dumps" / "step_1"
    about = json.loads((dump / "gap.json").read_text())
    shares = [json.loads((dump / f"trajectories_{k}.json").read_text()) for k in (0, 1)]
    assert len({t["prompt"] for t in shares[0]} & {t["prompt"] for t in shares[1]}) == 0
    gaps = []
    for share, k in zip(shares, (0, 1), strict=True):
        with np.load(dump / f"tokens_{k}.npz", allow_pickle=False) as arrays:
            a = dict(arrays)
        assert a["rewards_S"].tolist() == [t["reward"] for t in share if t["trained"]]
        gaps += (a["trainer_T"] - a["engine_T"])[a["mask_T"]].tolist()
    assert np.abs(gaps).max() == pytest.approx(about["gap"]["max"])
    one = ReadOnlyBank(run.dir / "bank").shelf(1).rows
    assert sorted(ReadOnlyBank(dump / "bank").shelf(1).rows) == sorted(one)


# ------------------------------------------------------------------ losses that are not finite


def blown_up(run: Run, folder: Path, *more: str) -> Ended:
    """Step one takes the parameters out of range; step two is replayed on them."""
    words = ("optimizer.lr=1e30", f"rollout.replay={run.dir / 'bank'}", *OFF, *more)
    return replay(run, folder, *words)[0]


def test_a_step_that_is_not_finite_is_left_out_and_kept(run: Run, tmp_path: Path) -> None:
    ended = blown_up(run, tmp_path / "run", "run.export=false")
    assert ended.code == 0, ended.err
    last = run.measured(tmp_path / "run")[-1]
    assert (last["step"], last["train/skipped"], last["train/grad_norm"]) == (2, 1.0, None)
    assert "step 2: loss " in ended.err
    assert "gradient norm nan" in ended.err
    dump = tmp_path / "run" / "dumps" / "step_2"
    assert str(dump) in ended.err
    assert np.isnan(np.load(dump / "tokens_0.npz")["trainer_T"]).any()


def test_too_many_such_steps_in_a_row_end_the_run(run: Run, tmp_path: Path) -> None:
    ended = blown_up(run, tmp_path / "run", "run.max_nonfinite=0")
    assert ended.code == NONFINITE, ended.err
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "run" / "hf").exists()
