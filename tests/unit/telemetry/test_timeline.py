"""A timeline tells when phases were and when a rank waited in them, by rank 0's clock."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import TelemetryConfig
from rest_mega.telemetry.reporter import Reporter
from rest_mega.telemetry.timeline import Timeline, kept, read_timelines

QUIET = TelemetryConfig(tensorboard=False, console="plain")


class Waited:
    """What a rank's collectives say."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def __call__(self) -> list[tuple[float, float]]:
        taken, self.found = self.found, []
        return taken


def make(folder: Path, rank: int, waits: Any, **more: Any) -> tuple[Reporter, Timeline]:
    timeline = Timeline(folder, rank, f"DP {rank}", waits=waits, **more)
    resumed = {"resume_step": more.get("resume_step")}
    made = Reporter(folder, QUIET, total_steps=9, active=rank == 0, timeline=timeline, **resumed)
    return made, timeline


def test_phases_and_waits_stand_where_they_were_by_the_first_rank_s_clock(tmp_path: Path) -> None:
    waits = Waited()
    reporter, _ = make(tmp_path, 1, waits, clock_offset=100.0)
    waits.found = [(0.0, 50.0)]  # before any phase: of none
    with reporter.phase("rollout"):
        begin = time.time()
        waits.found = [(begin + 1, begin + 3), (begin, begin + 1e-5)]
    reporter.step(1, {"train/loss": 0.0})
    ((who, (phase,)),) = read_timelines(tmp_path)
    assert (who["rank"], who["place"]) == (1, "DP 1")
    assert (phase["step"], phase["phase"]) == (1, "rollout")
    assert phase["start"] == pytest.approx(begin - 100.0, abs=0.05)
    assert phase["waits"] == [[pytest.approx(1.0, abs=0.05), pytest.approx(2.0, abs=1e-3)]]


def test_a_resumed_run_drops_what_its_checkpoint_has_not_seen(tmp_path: Path) -> None:
    first, _ = make(tmp_path, 0, Waited())
    for step in (1, 2, 3):
        with first.phase("train"):
            pass
        first.step(step, {})
    again, _ = make(tmp_path, 0, Waited(), resume_step=2)
    with again.phase("publish"):
        pass
    again.close()  # interrupted: what happened belongs to the last step
    ((_, phases),) = read_timelines(tmp_path)
    found = [(phase["step"], phase["phase"]) for phase in phases]
    assert found == [(1, "train"), (2, "train"), (2, "publish")]
    lines = (tmp_path / "phases" / "rank_0.jsonl").read_text().splitlines()
    assert sum("rank" in json.loads(line) for line in lines) == 2  # each process says who it is


@pytest.mark.parametrize(("world", "most"), [(1, 1), (4, 64), (64, 64), (100, 7), (1024, 64)])
def test_ranks_that_keep_one_are_evenly_spread(world: int, most: int) -> None:
    ranks = [rank for rank in range(world) if kept(rank, world, most)]
    assert ranks[0] == 0
    assert len(ranks) == min(world, most)
    gaps = [b - a for a, b in itertools.pairwise(ranks)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_none_keeps_one_where_none_is_asked_for() -> None:
    assert not any(kept(rank, 8, 0) for rank in range(8))
