"""A run through the command line: its files, and that it goes on as if it had never stopped."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rest_mega.telemetry.columns import unpack
from tests.support.pages import embedded
from tests.support.runs import Ended, Run, make_run, start

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
TP2, PP2 = "parallel.tensor=2", "parallel.pipeline=2"


def good(ended: list[Ended]) -> list[Ended]:
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err
    return ended


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of four steps at TP 2."""
    made = make_run(tmp_path_factory.mktemp("run"))
    good(start(2, "train", made.config, TP2, "run.export_every=2"))
    return made


def half(run: Run, folder: Path) -> Path:
    """The run directory as a crash after step two leaves it: later rows, no later checkpoint."""
    copy = Path(shutil.copytree(run.dir, folder / "run"))
    for later in range(HALF + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step_{later:08d}")
    shutil.rmtree(copy / "hf")
    (copy / "checkpoints" / "step_00000003.partial").mkdir()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "half a li')
    return copy


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def order(run: Run, folder: Path) -> list[tuple[int, str, int]]:
    return [(r["step"], r["prompt"], r["sibling"]) for r in run.rows("trajectories", folder)]


# ------------------------------------------------------------------ what a run leaves


def test_metrics_hold_every_step_and_evaluation_once(run: Run) -> None:
    rows = run.measured()
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "eval/greedy_success" in r] == [0, 2, 4]
    assert all(r["train/grad_norm"] > 0 for r in rows if "train/loss" in r)


def test_the_policy_is_exported_on_the_way(run: Run) -> None:
    assert [p.name for p in sorted(run.dir.glob("hf*"))] == ["hf", "hf_step_2"]
    early, late = (load_file(run.dir / n / "model.safetensors") for n in ("hf_step_2", "hf"))
    assert early.keys() == late.keys()
    assert any((early[name] != late[name]).any() for name in early)


def test_every_prompt_of_an_epoch_is_drawn_once(run: Run) -> None:
    prompts = [prompt for _, prompt, sibling in order(run, run.dir) if sibling == 0]
    assert sorted(prompts[:6]) == [f"p{n}" for n in range(6)]


def test_the_report_holds_metrics_timelines_and_every_token(run: Run) -> None:
    (shown,) = unpack(embedded(run.dir / "report.html"))["runs"]
    metrics, rows = shown["metrics"], run.rows()
    assert metrics["step"].tolist() == [row["step"] for row in rows]
    for name, column in metrics["columns"].items():
        want = [math.nan if row.get(name) is None else row[name] for row in rows]
        np.testing.assert_allclose(column, want, rtol=1e-6)
    assert shown["config"]["parallel"]["tensor"] == 2
    assert [timeline["rank"] for timeline in shown["timelines"]] == [0, 1]
    lead, other = shown["timelines"]
    assert {"rollout", "train", "publish"} <= set(lead["names"])
    waited = [timeline["wait_seconds"].sum() for timeline in (lead, other)]
    assert waited[1] > waited[0]  # the lead plays the episodes, the other rank waits for them
    tokens = shown["trajectories"]
    trained = run.rows("trajectories")
    assert len(tokens["id"]) == sum(len(row["text"]) for row in trained)
    for name in ("token_gap", "entropy", "token_advantage", "weight", "logprob"):
        assert np.isfinite(tokens[name]).any(), name
    assert np.nanmax(np.abs(tokens["token_gap"])) < 1e-4
    assert np.nanmin(tokens["entropy"]) > 0


def evaluated(printed: str) -> dict[str, float]:
    return {name: float(value) for name, value in map(str.split, printed.splitlines())}


def last_evaluation(run: Run) -> Any:
    last = [row for row in run.measured() if "eval/greedy_success" in row][-1]
    return pytest.approx({k: v for k, v in last.items() if k != "step"}, abs=1e-4)


def test_the_export_scores_on_the_held_out_prompts_as_the_run_did(run: Run, tmp_path: Path) -> None:
    hf = run.dir / "hf"
    words = (f"model.path={hf}", f"run.dir={tmp_path / 'none'}")
    printed = good(start(1, "eval", run.config, *words))[0].out
    assert evaluated(printed) == last_evaluation(run)
    assert not (tmp_path / "none").exists()


def test_transformers_loads_the_export_without_a_word(run: Run) -> None:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.dir / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    before = load_file(run.root / "model" / "model.safetensors")
    after = load_file(run.dir / "hf" / "model.safetensors")
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)
    assert sum(p.numel() for p in model.parameters()) == sum(v.size for v in after.values())


# ------------------------------------------------------------------ resuming


def test_at_the_same_layout_a_resumed_run_is_the_same_bit_for_bit(run: Run, tmp_path: Path) -> None:
    copy = half(run, tmp_path)
    good(start(2, "train", run.config, TP2, f"run.dir={copy}"))
    assert run.measured(copy) == run.measured()
    assert order(run, copy) == order(run, run.dir)
    weights = Path("hf") / "model.safetensors"
    assert (copy / weights).read_bytes() == (run.dir / weights).read_bytes()
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == [f"step_{n:08d}" for n in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("world", "words"), [(2, [PP2]), (2, []), (1, [])], ids=["pp2", "dp2", "one process"]
)
def test_at_another_layout_the_next_step_is_the_same(
    run: Run, tmp_path: Path, world: int, words: list[str]
) -> None:
    copy = half(run, tmp_path)
    good(start(world, "train", run.config, *words, f"run.dir={copy}"))
    got, want = (
        next(row for row in run.measured(folder) if row["step"] == HALF + 1)
        for folder in (copy, run.dir)
    )
    gap = {"policy/rollout_gap", "policy/rollout_gap_max", "policy/approx_kl"}
    for name in set(want) - gap:  # differences of nearly equal numbers
        assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    assert max(abs(got[name]) for name in gap) < 1e-4


def test_a_finished_run_that_is_started_again_changes_no_row(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "run"))
    good(start(1, "train", run.config, f"run.dir={copy}"))
    assert run.rows(folder=copy) == run.rows()


def test_an_evaluation_that_was_cut_off_is_done_by_the_run_that_resumes(
    run: Run, tmp_path: Path
) -> None:
    where = f"run.dir={tmp_path / 'run'}"
    run.interrupt_once()
    first = start(2, "train", run.config, TP2, where)
    assert [rank.code for rank in first] == [130, 130], first[0].err
    assert "interrupted after step 0" in first[0].err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    good(start(2, "train", run.config, TP2, where))
    assert run.measured(tmp_path / "run") == run.measured()


# ------------------------------------------------------------------ what must not be touched


def test_eval_at_another_layout_agrees_and_leaves_the_run_as_it_is(run: Run) -> None:
    before = files(run.dir)
    words = ["run.fresh=true", "rollout.record=true"]
    words += ["optimizer.name=sgd", "optimizer.distributed=false", "data.train="]
    printed = good(start(2, "eval", run.config, PP2, *words))[0].out
    assert evaluated(printed) == last_evaluation(run)
    assert files(run.dir) == before
    assert not run.dir.with_name("run.1").exists()


def test_a_fresh_run_moves_the_old_one_aside(run: Run, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run.dir, tmp_path / "run"))
    before = files(old)
    words = (f"run.dir={old}", "run.fresh=true", "run.steps=1", "data.held_out=")
    good(start(1, "sft", run.config, *words))
    assert files(tmp_path / "run.1") == before
    assert [row["step"] for row in run.rows(folder=old)] == [1]


# ------------------------------------------------------------------ faults that need a started run


def one_message(ended: list[Ended]) -> str:
    assert [rank.code for rank in ended] == [2] * len(ended)
    told = [line for rank in ended for line in rank.err.splitlines() if "rest-mega" in line]
    assert len(told) == 1, told
    assert not any("Traceback" in rank.err for rank in ended)
    return told[0]


def test_the_checkpoint_before_a_truncated_one_is_used(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "run"))
    newest = copy / "checkpoints" / "step_00000004"
    data = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    ended = good(start(2, "train", run.config, TP2, f"run.dir={copy}"))
    assert f"left out a damaged checkpoint: {data} has 1000 bytes" in ended[0].err
    assert run.measured(copy) == run.measured()


def test_when_no_checkpoint_is_intact_nothing_is_begun_anew(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.dir, tmp_path / "run"))
    for folder in (copy / "checkpoints").iterdir():
        data = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
        data.write_bytes(data.read_bytes()[:-1] + b"x")
    message = one_message(start(2, "train", run.config, TP2, f"run.dir={copy}"))
    assert "none of the checkpoints" in message
    assert "run.fresh=true" in message


def test_what_one_lead_alone_finds_ends_all_ranks(run: Run, tmp_path: Path) -> None:
    words = ("rollout.engine=replay", f"rollout.replay={tmp_path}", f"run.dir={tmp_path / 'run'}")
    message = one_message(start(2, "train", run.config, TP2, *words))
    assert "holds no step_*.jsonl" in message


# ------------------------------------------------------------------ sft


def test_sft_learns_resumes_and_evaluates(run: Run, tmp_path: Path) -> None:
    words: tuple[Any, ...] = ("sft", run.config, PP2, "evaluation.every=0")
    good(start(2, *words, f"run.dir={tmp_path / 'run'}"))
    rows = run.measured(tmp_path / "run")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert [row["step"] for row in rows if "eval/greedy_success" in row] == [STEPS]
    whole = Run(tmp_path)
    copy = half(whole, tmp_path / "half")
    good(start(2, *words, f"run.dir={copy}"))
    assert whole.measured(copy) == whole.measured()
    weights = Path("hf") / "model.safetensors"
    assert (copy / weights).read_bytes() == (whole.dir / weights).read_bytes()
