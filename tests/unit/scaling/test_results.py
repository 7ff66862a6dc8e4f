"""Results: kept through a crash, merged over repeats, drawn; and the bubble as it is counted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import charts
import host_load
import psutil
import pytest
import sweep
from pass_times import PassTimes, waiting
from plots import efficiency, table
from points import Point
from results import RESULTS, keep, rows_of, seen, shared

from rest_mega.launch import free_port

POINT = Point("DP", "strong", "models/tiny", 1, 8)


def row(point: Point, rate: float, bubble: float = 0.1) -> dict[str, Any]:
    """A measurement at which every rank reaches `rate` TFLOP/s; the plan said 2 for all of them."""
    figures = {"bubble": bubble, "memory": 2.0**30, "train": 1.0, "mfu": rate / 4}
    figures |= {"tokens_per_second": 1000 * rate * point.ranks, "tflops_per_rank": rate}
    said = {**figures, "tokens_per_second": 2000.0 * point.ranks, "tflops_per_rank": 2.0}
    key = dataclasses.asdict(point)
    return {"point": key, "ok": True, "measured": figures, "predicted": {**said, "mfu": 0.5}}


def failed(point: Point) -> dict[str, Any]:
    return {"point": dataclasses.asdict(point), "ok": False, "code": 1, "errors": ["ValueError: x"]}


def at(ranks: int, **more: Any) -> Point:
    return dataclasses.replace(POINT, ranks=ranks, **more)


def test_a_line_that_a_crash_cut_short_spoils_no_other(tmp_path: Path) -> None:
    keep(tmp_path, row(at(1), 1.0))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"point": {"ser')
    keep(tmp_path, row(at(2), 1.0))
    keep(tmp_path, failed(at(4)))
    assert [len(rows_of(tmp_path, at(ranks))) for ranks in (1, 2, 4)] == [1, 1, 0]


def test_a_point_with_another_setting_is_another_point(tmp_path: Path) -> None:
    keep(tmp_path, row(at(1), 1.0))
    assert rows_of(tmp_path, at(1, tokens=512)) == []


def test_series_that_begin_alike_share_a_measurement(tmp_path: Path) -> None:
    keep(tmp_path, row(at(1), 1.0))
    keep(tmp_path, row(at(1), 2.0))
    other = at(1, series="TP", scaling="weak")
    twin = shared(tmp_path, other, 2)
    assert twin is not None
    assert twin["point"] == dataclasses.asdict(other)
    assert twin["measured"]["tflops_per_rank"] == 2.0
    assert shared(tmp_path, other, 3) is None
    assert shared(tmp_path, at(1, series="TP", tokens=512), 1) is None


def test_repeats_become_a_median_with_its_spread() -> None:
    (one,) = seen([row(at(1), rate) for rate in (3.0, 1.0, 2.0)] + [failed(at(1))])
    assert (one.low["mfu"], one.measured["mfu"], one.high["mfu"]) == (0.25, 0.5, 0.75)
    assert one.count == 3


def test_efficiency_is_a_rank_s_speed_over_that_at_the_first_point() -> None:
    first, second = seen([row(at(1), 2.0), row(at(2), 1.5)])
    assert efficiency(second, first) == 0.75
    assert efficiency(second, first, "predicted") == 1.0
    assert "| DP | 2 | tiny | DP2 | 3,000 (x1.33) | 75% (100%) | 37.5% (50.0%)" in table(
        [first, second]
    )


def test_a_results_file_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for point in (at(1), at(2), at(4)):
        keep(tmp_path, row(point, 1.0 / point.ranks, bubble=0.1))
    keep(tmp_path, row(at(2, scaling="weak", series="A & B"), 1.0))
    keep(tmp_path, failed(at(8)))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "plot", str(tmp_path)])
    assert sweep.main() == 0
    assert "failed: DP at 8" in capsys.readouterr().out
    strong, weak = (ElementTree.parse(tmp_path / f"{kind}.svg") for kind in ("strong", "weak"))
    words = [node.text for node in strong.iter("{http://www.w3.org/2000/svg}text")]
    assert {"DP", "bubble of the busiest stage", "MFU of training", "100%", "4"} <= set(words)
    marks = list(strong.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(marks) == 5 * 3  # a panel each for five figures, three points measured
    assert "A & B" in [node.text for node in weak.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plot", "OUT"], "results.jsonl is not there: the verb run writes it"),
        (["run", "OUT"], "run takes SWEEP.yaml and OUT, not 1 paths"),
        (["run", "a.yaml", "OUT", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["run", "a.yaml", "OUT", "--quiet", "2"], "--quiet 2.0 is a share"),
        (["plan", "CPU", "OUT"], "gpu=measured is known only once a point was run"),
    ],
)
def test_wrong_words_are_answered(
    tmp_path: Path,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"OUT": str(tmp_path), "CPU": str(Path(sweep.__file__).with_name("cpu.yaml"))}
    monkeypatch.setattr(sys, "argv", ["sweep.py", *(places.get(word, word) for word in words)])
    assert sweep.main() == 2
    assert told in capsys.readouterr().err


def test_the_last_errors_of_a_log_are_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[rank0]: Traceback (most recent call last):\n[rank0]:     raise ValueError(x)\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n[rank0]: ValueError: x is 3\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert sweep.last_errors(log) == [
        "torch.OutOfMemoryError: CUDA out of memory.",
        "ValueError: x is 3",
    ]
    log.write_text("slurmstepd: killed\n\n")
    assert sweep.last_errors(log) == ["slurmstepd: killed"]


def test_a_bubble_is_what_a_rank_waits_while_its_own_replica_is_at_work() -> None:
    class Place:
        """Two replicas of two stages, seen by a rank that is not among them."""

        data_rank = 9

        def gather_text(self, _: str) -> list[str]:
            ranks = [(0, 10.0, 14.0, 3.0), (0, 11.0, 15.0, 4.0), (1, 20.0, 22.0, 2.0)]
            names = ("replica", "first", "last", "busy")
            return [json.dumps(dict(zip(names, rank, strict=True))) for rank in ranks]

    passes = PassTimes(on_gpu=False)
    passes.begin()
    for name in ("forward-compute", "backward-compute", "forward-recv"):
        passes(name, log_level=2).start()
        passes(name).stop()
    assert len(passes.spans()) == 2  # what is received is no work
    found = waiting(Place(), passes, 0.0, 8.0)  # type: ignore[arg-type]
    assert [rank["bubble"] for rank in found] == pytest.approx([0.4, 0.2, 0.0])
    assert [rank["idle"] for rank in found] == pytest.approx([5 / 8, 0.5, 0.75])


class Alone:
    """A run of one rank."""

    rank = 0

    def maximum(self, values: Any) -> Any:
        return values

    def sum_one(self, value: float) -> float:
        return value


def test_what_busy_neighbours_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_load.psutil, "cpu_percent", lambda _: 0.0)
    used = iter([0.0, 1e9, 1e9, 1e9])  # seconds of all cores: the first try was disturbed
    monkeypatch.setattr(host_load, "_busy", lambda: next(used))
    tries: list[str] = []
    quietly = host_load.Quiet(Alone(), 0.2, 600)  # type: ignore[arg-type]
    assert quietly(lambda: tries.append("tried")) == (None, 0.0)
    assert len(tries) == 2


def test_a_host_that_never_is_quiet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_load.psutil, "cpu_percent", lambda _: 100.0)
    quietly = host_load.Quiet(Alone(), 0.2, 0.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="more than 20% of this host's cores"):
        quietly(lambda: None)


def test_without_a_bound_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_load.psutil, "cpu_percent", lambda _: 100.0)
    result, others = host_load.Quiet(Alone(), 1.0, 0.0)(lambda: 3)  # type: ignore[arg-type]
    assert (result, 0 <= others <= 1) == (3, True)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (600, 2500, [500, 1000, 2000, 5000]),
        (10, 10, [10, 20]),
        (5, 5e4, [1, 10, 1e2, 1e3, 1e4, 1e5]),
    ],
)
def test_a_logarithmic_axis_holds_its_values(low: float, high: float, ticks: list[float]) -> None:
    assert charts._powers(low, high) == pytest.approx(ticks)


def test_a_launcher_is_ended_with_all_its_ranks(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()) + ' ')\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--master-port", str(free_port()), str(rank), str(tmp_path)]
    launcher = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    places = [tmp_path / "0", tmp_path / "1"]
    await_(lambda: all(place.exists() and place.read_text() for place in places), 300)
    sweep.end(launcher)
    ranks = [int(place.read_text()) for place in places]
    await_(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 30)


def await_(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_point_beyond_its_time_is_told(tmp_path: Path) -> None:
    assert sweep.start(["sleep", "600"], tmp_path / "log", 0.1) == 124
    assert "TimeoutError: ended after" in sweep.last_errors(tmp_path / "log")[0]
