"""A profiler records its window of steps and nothing else; the merged trace has one clock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, ProfileConfig
from rest_mega.telemetry.profiler import PIPELINE, PROFILE, Profiler, merge
from rest_mega.telemetry.rows import read_rows


def make(folder: Path, rank: int, steps: str = "2-3", **more: Any) -> Profiler:
    return Profiler(folder, ProfileConfig(steps=steps, phases=("train",)), rank, "PP 0", **more)


def piece(profiler: Profiler) -> None:
    timer = profiler("forward-compute", log_level=2)
    timer.start()
    time.sleep(0.01)
    profiler("forward-compute").stop()


def test_only_the_steps_of_the_window_are_recorded(tmp_path: Path) -> None:
    profiler = make(tmp_path, 0)
    for step in range(1, 5):
        piece(profiler)
        profiler.reached(step)
    rows = read_rows(tmp_path / PROFILE / "rank_0.jsonl")
    assert [(row["step"], row["name"]) for row in rows] == [
        (2, "forward-compute"),
        (3, "forward-compute"),
    ]
    assert all(0.01 <= row["seconds"] < 0.5 for row in rows)


def test_without_a_window_nothing_is_written(tmp_path: Path) -> None:
    profiler = make(tmp_path, 0, steps="")
    with profiler.phase("train"):
        piece(profiler)
    profiler.reached(1)
    assert not (tmp_path / PROFILE).exists()
    assert merge(tmp_path) is None


def test_torch_traces_the_phases_that_are_asked_for(tmp_path: Path) -> None:
    import torch

    profiler = make(tmp_path, 3, steps="1-1")
    for name in ("rollout", "train", "train"):
        with profiler.phase(name):
            torch.ones(3).cumsum(0)
    profiler.reached(1)
    found = sorted((tmp_path / PROFILE).glob("*.json"))
    assert [file.name for file in found] == [
        "rank_3.step_1.train.2.json",
        "rank_3.step_1.train.json",
    ]
    names = {event.get("name") for event in json.loads(found[0].read_text())["traceEvents"]}
    assert "aten::cumsum" in names


def test_the_merged_trace_is_by_the_first_rank_s_clock(tmp_path: Path) -> None:
    begin = time.time()
    for rank, offset in ((0, 0.0), (1, 50.0)):
        profiler = make(tmp_path, rank, steps="1-1", clock_offset=offset)
        piece(profiler)
        profiler.reached(1)
    path = merge(tmp_path)
    assert path == tmp_path / PROFILE / PIPELINE
    events = json.loads(path.read_text())["traceEvents"]
    first, second = (event for event in events if event["ph"] == "X")
    assert (first["pid"], second["pid"]) == (0, 1)
    assert first["ts"] == pytest.approx(1e6 * begin, abs=1e6)
    assert second["ts"] == pytest.approx(1e6 * (begin - 50), abs=1e6)
    assert first["dur"] >= 1e4
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0: PP 0",
        "rank 1: PP 0",
    }


def test_a_resumed_run_keeps_what_it_has_of_the_window(tmp_path: Path) -> None:
    first = make(tmp_path, 0)
    for step in (1, 2):
        piece(first)
        first.reached(step)
    again = make(tmp_path, 0, step=2)
    piece(again)
    again.reached(3)
    assert [r["step"] for r in read_rows(tmp_path / PROFILE / "rank_0.jsonl")] == [2, 3]
    make(tmp_path, 0)  # a new run
    assert read_rows(tmp_path / PROFILE / "rank_0.jsonl") == []


@pytest.mark.parametrize("steps", ["5", "7-5", "0-2", "five"])
def test_a_window_is_first_to_last(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"is no window of steps: write FIRST-LAST"):
        ProfileConfig(steps=steps)
