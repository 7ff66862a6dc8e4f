"""Every sink gets the same numbers; trackers are the real packages, where they are installed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, TelemetryConfig
from rest_mega.telemetry import sinks
from rest_mega.telemetry.console import LIVE, Live, fitting, lines_of
from rest_mega.telemetry.reporter import Reporter
from rest_mega.telemetry.rows import read_rows

CONFIG = {"run": {"seed": 3, "dir": "x"}, "rewards": {"parts": {}}}
ROWS = [
    (1, {"train/loss": 0.5, "tokens/s": 9.0, "gap/p99": math.nan}),
    (1, {"eval/greedy_success": 0.25}),
    (2, {"train/loss": -0.5}),
]


def reporter(folder: Path, resume_step: int | None = None, **more: Any) -> Reporter:
    config = TelemetryConfig(**({"tensorboard": False, "console": "plain"} | more))
    known = {"total_steps": 4, "active": True, "config_tree": CONFIG, "resume_step": resume_step}
    return Reporter(folder, config, **known)


def test_mlflow_keeps_params_and_metrics_and_a_resumed_run_goes_on_in_its_run(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlflow", reason="the extra `tracking` is not installed")
    store, run = tmp_path / "store", tmp_path / "run"
    first = reporter(run, mlflow=str(store), project="tools", name="one")
    for step, row in ROWS:
        first.step(step, row)
    first.close()
    again = reporter(run, resume_step=2, mlflow=str(store), project="tools")
    again.step(3, {"train/loss": 1.5})
    again.close()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store.as_uri())
    experiment = client.get_experiment_by_name("tools")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert found.data.params == {"run.seed": "3", "run.dir": '"x"', "rewards.parts": "{}"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, -0.5), (3, 1.5)]
    assert "gap/p99" not in found.data.metrics  # not a number
    assert reporter(run, mlflow=str(store)).close() is None  # a new run is another one
    assert json.loads((run / sinks.TRACKING).read_text())["mlflow"] != found.info.run_id


def level_db_log(data: bytes) -> list[bytes]:
    """Records of W&B's file after its header of 7 bytes: LevelDB's log format."""
    records, at, size = list[bytes](), 0, 2**15
    while at + 7 <= len(data):
        if size - (at + 7) % size < 7:  # too little of the block is left for a header
            at += size - (at + 7) % size
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        if kind in (1, 2):
            records.append(b"")
        records[-1] += part
        at += 7 + length
    return records


def test_wandb_writes_offline_files_that_hold_every_row(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `tracking` is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    r = reporter(tmp_path, wandb="offline", project="tools")
    for step, row in ROWS:
        r.step(step, row)
    r.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = [Record.FromString(data) for data in level_db_log(file.read_bytes()[7:])]
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    for (step, row), kept in zip(ROWS, history, strict=True):
        want = {name: value for name, value in row.items() if math.isfinite(value)}
        assert {name: kept[name] for name in ("step", *want)} == {"step": step, **want}
    assert json.loads((tmp_path / sinks.TRACKING).read_text())["wandb"] in file.name


def test_a_tracker_without_its_package_or_its_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.wandb='online' must be one of|wandb"):
        TelemetryConfig(wandb="cloud")
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package wandb: install rest-mega\[tracking"):
        sinks.check(TelemetryConfig(wandb="offline"))
    with pytest.raises(ConfigError, match=r"telemetry\.mlflow='x' needs the package mlflow"):
        sinks.check(TelemetryConfig(mlflow="x"))
    sinks.check(TelemetryConfig())


class Gone(sinks.Sink):
    """A tracker whose server has gone."""

    def step(self, step: int, row: Any, trajectories: Any = ()) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_left_out_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sinks, "open_trackers", lambda *_: {"mlflow": Gone()})
    r = reporter(tmp_path)
    r.step(1, {"train/loss": 0.0})
    r.step(2, {"train/loss": 0.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err.count("mlflow gets nothing more of this run") == 1
    (event,) = read_rows(tmp_path / "events.jsonl")
    assert event["kind"] == "tracker"
    assert "no route to host" in event["text"]


# ------------------------------------------------------------------ the console


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 2**12).decode()
    except OSError:  # nobody writes any more
        return ""


@pytest.mark.parametrize("columns", [60, 80])
def test_the_live_display_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        assert sys.stderr.isatty()
        live = Live(1000, 0)
        for step in range(1, 4):
            live.phase("rollout")
            live.step(step, {name: 123456.0 for name, _ in LIVE})
        live.event("checkpoint", "saved")
        live.close()
    written = "".join(iter(lambda: _read(master), ""))
    os.close(master)
    drawn = re.split(r"[\r\n]|\x1b\[A", written)
    assert max(map(len, drawn)) <= columns
    assert any("3/1000" in line for line in drawn)
    assert any(line.startswith("reward 123456.00 success") for line in drawn)
    assert "saved" in drawn


def test_a_line_is_filled_from_the_left() -> None:
    assert fitting(["ab", "cd", "e"], 5) == "ab cd"
    assert fitting(["ab", "cd", "e"], 7) == "ab cd e"
    assert fitting(["abc"], 2) == ""


def test_rows_in_words() -> None:
    row = {"train/loss": 0.5, "reward/mean": None, "eval/greedy_success": 0.25}
    assert lines_of(7, row) == ["step 7: held-out greedy success 25.0%", "step 7: loss +0.500"]
    assert lines_of(7, {"time/rollout": 1.0}) == []
