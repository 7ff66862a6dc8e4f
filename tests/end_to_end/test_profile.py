"""A profiled step of a pipeline of two stages: torch's traces, and both stages on one clock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed
CLOCK_US = 5e3
"""As well as two processes of one machine agree on the time."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = make_run(tmp_path_factory.mktemp("profile"))
    words = ("parallel.pipeline=2", "run.steps=3", "packing.tokens=400", "data.held_out=")
    for rank in start(2, "train", made.config, *words, "--profile", "steps=2-2"):
        assert rank.code == 0, rank.err
    return made


@pytest.fixture(scope="module")
def events(run: Run) -> list[Any]:
    whole = json.loads((run.dir / "profile" / "pipeline.json").read_text())["traceEvents"]
    return [event for event in whole if event["ph"] == "X"]


def of(events: list[Any], rank: int, name: str) -> list[tuple[float, float]]:
    """(begin, end) in microseconds."""
    return [(e["ts"], e["ts"] + e["dur"]) for e in events if e["pid"] == rank and e["name"] == name]


def test_torch_has_traced_the_phases_of_that_step_on_every_rank(run: Run) -> None:
    files = {file.name: file for file in (run.dir / "profile").glob("rank_*.json")}
    assert set(files) == {
        f"rank_{rank}.step_2.{phase}.json" for rank in (0, 1) for phase in ("score", "train")
    }
    for name, file in files.items():
        names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
        assert "aten::mm" in names, name


def test_the_pipeline_s_stages_stand_in_order_on_one_clock(events: list[Any]) -> None:
    assert {event["args"]["step"] for event in events} == {2}
    forward = [of(events, rank, "forward-compute") for rank in (0, 1)]
    backward = [of(events, rank, "backward-compute") for rank in (0, 1)]
    assert len(forward[0]) == len(forward[1]) > len(backward[0]) > 0  # scoring goes forward only
    assert len(backward[0]) == len(backward[1])
    for (_, done), (begun, _) in zip(forward[0], forward[1], strict=True):
        assert begun > done - CLOCK_US  # the second stage works on what the first has sent
    for (begun, _), (_, done) in zip(backward[0], backward[1], strict=True):
        assert begun > done - CLOCK_US
    assert of(events, 1, "forward-recv")  # where it waits


def test_every_piece_lies_in_its_phase(events: list[Any]) -> None:
    for rank in (0, 1):
        phases = [*of(events, rank, "score"), *of(events, rank, "train")]
        for begin, end in of(events, rank, "forward-compute"):
            assert any(a <= begin and end <= b for a, b in phases)
