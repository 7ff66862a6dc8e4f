"""What a reporter writes is what was reported, once per step, whatever the run went through."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import TelemetryConfig
from rest_mega.telemetry.report import outcome, summary_line
from rest_mega.telemetry.reporter import Reporter
from rest_mega.telemetry.rows import read_rows

PLAIN = TelemetryConfig(tensorboard=False, console="plain", trajectories=2)


def reporter(folder: Path, **more: Any) -> Reporter:
    return Reporter(
        folder, PLAIN, total_steps=4, region_names=["A", "B"], **({"active": True} | more)
    )


def trajectory(step: int, text: str = "hi") -> dict[str, Any]:
    return {
        "step": step, "prompt": "p", "kind": "k", "sibling": 0, "reward": 1.0,
        "parts": {"format": 1.0}, "advantage": 0.5, "success": True, "stop": "answered",
        "text": [text], "region": [1], "turn": [0], "turns": [],
        "sampled": {"logprob": [-0.1], "weight": [1.0]},
    }  # fmt: skip


def test_rows_hold_metrics_phases_and_no_nan(tmp_path: Path) -> None:
    r = reporter(tmp_path)
    with r.phase("train"):
        pass
    r.step(1, {"train/loss": 0.25, "bad": math.nan, "tokens/trained": 10.0})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["train/loss"], row["bad"]) == (1, 0.25, None)
    assert row["time/train"] >= 0
    assert row["tokens/s"] > 0


def test_an_inactive_reporter_writes_nothing(tmp_path: Path) -> None:
    r = reporter(tmp_path / "run", active=False)
    r.step(1, {"train/loss": 1.0}, [trajectory(1)])
    r.event("checkpoint", "saved")
    r.close()
    assert not (tmp_path / "run").exists()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = reporter(tmp_path)
    for step in (1, 2, 3):
        first.step(step, {"train/loss": float(step)}, [trajectory(step)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "half')
    again = reporter(tmp_path, resume_step=2)
    again.step(3, {"train/loss": 30.0}, [trajectory(3)])
    assert [(r["step"], r["train/loss"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert [r["step"] for r in read_rows(tmp_path / "trajectories.jsonl")] == [1, 2, 3]


def test_a_new_run_starts_with_empty_curves(tmp_path: Path) -> None:
    reporter(tmp_path).step(1, {"train/loss": 1.0})
    reporter(tmp_path)
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_at_most_so_many_trajectories_of_a_step_are_kept(tmp_path: Path) -> None:
    reporter(tmp_path).step(1, {}, [trajectory(1) for _ in range(5)])
    assert len(read_rows(tmp_path / "trajectories.jsonl")) == PLAIN.trajectories


def test_the_last_line_tells_success_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r = reporter(tmp_path)
    r.step(
        0,
        {
            "eval/sampled_success": 0.25,
            "eval/greedy_success": 0.5,
            "eval/sampled_success/book": 0.1,
        },
    )
    r.step(4, {"eval/sampled_success": 0.75, "eval/greedy_success": 0.875})
    assert outcome(tmp_path) == {"sampled": [0.25, 0.75], "greedy": [0.5, 0.875]}
    line = summary_line(tmp_path)
    changes = "sampled 25.0% -> 75.0%, greedy 50.0% -> 87.5%"
    assert line == f"held-out success: {changes}; report: {tmp_path / 'report.html'}"
    assert "held-out sampled success 75.0%, greedy success 87.5%" in capsys.readouterr().err


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    r = Reporter(tmp_path, TelemetryConfig(console="plain"), total_steps=2, active=True)
    r.step(1, {"train/loss": 0.5})
    r.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]


def test_a_new_run_in_an_old_directory_hides_the_old_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (1,)):  # the second run wrote no checkpoint that it could resume from
        r = Reporter(tmp_path, TelemetryConfig(console="plain"), total_steps=3, active=True)
        for step in steps:
            r.step(step, {"train/loss": float(len(steps))})
        r.close()
        time.sleep(1.1)  # event files are ordered by the second they were made in
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0)]
