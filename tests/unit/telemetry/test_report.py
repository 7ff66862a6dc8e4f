"""The page holds what the run's files say, whatever a model wrote, and no more than fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.telemetry import report_data
from rest_mega.telemetry.columns import pack, unpack
from rest_mega.telemetry.report import main, write_report
from rest_mega.telemetry.report_data import TOKEN_COLUMNS, read_run, spread
from tests.support.pages import embedded, synthetic_run

HOSTILE = "</script><script>alert(1)</script><!-- &amp; \u2028\ufffd"


def shown(path: Path) -> list[Any]:
    return list(unpack(embedded(path))["runs"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("report") / "run", 40, 30)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.text("abc</>", max_size=4), below),
)


@settings(max_examples=40, deadline=None)
@given(plain, st.lists(st.integers(-128, 127)), st.text())
def test_packing_is_lossless(tree: Any, numbers: list[int], text: str) -> None:
    arrays = [np.array(numbers, kind) for kind in (np.int8, np.float64, np.float16)]
    back = unpack(pack({"tree": tree, "arrays": arrays, text: np.array([], np.uint32)}))
    assert back["tree"] == tree
    for got, want in zip(back["arrays"], arrays, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert back[text].tolist() == []


def test_no_text_of_a_model_or_a_tool_can_leave_its_element(tmp_path: Path) -> None:
    calls = [{"name": HOSTILE, "arguments": {"a": HOSTILE}}]
    outcomes = [{"status": "ok", "content": HOSTILE, "seconds": 0.0}]
    turn = {"start": 0, "well_formed": True, "ended": True, "calls": calls, "outcomes": outcomes}
    folder = synthetic_run(tmp_path / "<b>run", 2, 6, turns=[turn], prompt=HOSTILE)
    page = write_report(folder)
    text = page.read_text()
    assert text.count("</script>") == 2  # the page's own two
    assert "<b>run" not in text
    assert re.search("http[s]?://(?!www.w3.org/2000/svg)", text) is None  # works offline
    (data,) = shown(page)
    assert json.loads(data["trajectories"]["turns"][0]) == [turn]
    assert data["trajectories"]["prompt"][0] == HOSTILE


def test_every_token_of_every_trajectory_is_there(run: Path) -> None:
    columns = read_run(run)["trajectories"]
    rows = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
    assert (columns["shown"], columns["of"]) == (40, 40)
    for n, row in enumerate(rows):
        at = slice(*columns["token_at"][n : n + 2])
        assert [columns["vocabulary"][i] for i in columns["id"][at]] == row["text"]
        assert columns["region"][at].tolist() == row["region"]
        sampled = slice(*columns["sampled_at"][n : n + 2])
        for name, key in TOKEN_COLUMNS.items():
            values = row["sampled"][key]
            np.testing.assert_allclose(columns[name][sampled], values, rtol=1e-3, atol=1e-6)
        assert columns["advantage"][n] == row["advantage"]
        gap = np.abs(row["sampled"]["gap"]).max()
        assert columns["gap"][n] == pytest.approx(gap)
        flags = [n % 5 == 1, n % 5 == 1, n % 7 == 0]
        assert [bool(columns["flags"][n] & bit) for bit in (1, 2, 4)] == flags


def test_what_only_some_trajectories_know_is_nan_for_the_others(tmp_path: Path) -> None:
    untrained = {"logprob": [-1.0], "weight": [1.0]}
    folder = synthetic_run(
        tmp_path / "run", 2, 9, sampled=untrained, text=["a"], region=[0], turn=[0]
    )
    columns = read_run(folder)["trajectories"]
    assert np.isnan(columns["token_gap"][:1]).all()
    assert np.isfinite(columns["token_gap"][1:]).all()
    assert np.isnan(columns["gap"]).tolist() == [True, False]


def test_a_long_run_is_thinned_evenly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("MOST_TRAJECTORIES", 8), ("MOST_SPANS", 4), ("MOST_ROWS", 2)):
        monkeypatch.setattr(report_data, name, most)
    data = read_run(run)
    assert (data["trajectories"]["shown"], data["trajectories"]["of"]) == (8, 40)
    assert np.unique(data["trajectories"]["step"]).tolist() == [1, 2, 3]
    assert len(data["metrics"]["step"]) == 2
    assert [timeline["step"].tolist() for timeline in data["timelines"]] == [[2, 2]] * 2
    monkeypatch.setattr(report_data, "MOST_TOKENS", 100)
    assert len(read_run(run)["trajectories"]["id"]) <= 100


@given(st.integers(0, 500), st.integers(1, 100))
def test_what_is_kept_is_spread_evenly_and_has_the_last(count: int, most: int) -> None:
    kept = spread(count, most)
    assert len(kept) == min(count, most) == len(set(kept))
    assert kept[-1:] == [count - 1][:count]
    gaps = np.diff(kept)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_several_runs_stand_in_one_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = synthetic_run(tmp_path / "other", 4, 9)
    assert main([str(run), str(other)]) == 0
    assert str(run / "compare.html") in capsys.readouterr().out
    assert [data["title"] for data in shown(run / "compare.html")] == [str(run), str(other)]
    assert main([str(run), "--output", str(tmp_path / "one.html")]) == 0
    assert len(shown(tmp_path / "one.html")) == 1


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"regions": ["A"], "config": {}}')
    (data,) = shown(write_report(tmp_path))
    assert data["trajectories"]["shown"] == 0
    assert data["timelines"] == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory: its run\.json says FileNotFound"):
        write_report(tmp_path / "absent")
    with pytest.raises(ConfigError, match="9 runs do not fit"):
        write_report(*[tmp_path] * 9)


def test_a_thousand_trajectories_stay_below_20_mb(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", 1000, 600)
    assert write_report(folder).stat().st_size < 20e6
