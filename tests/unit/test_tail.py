"""`rest-mega tail` says every step and event of a run once: it goes on, is resumed, or is over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rest_mega.cli import main
from rest_mega.config import TelemetryConfig
from rest_mega.tail import follow, is_held
from rest_mega.telemetry.reporter import Reporter

QUIET = TelemetryConfig(tensorboard=False, console="plain")


def reporter(folder: Path, resume_step: int | None = None) -> Reporter:
    return Reporter(folder, QUIET, total_steps=9, active=True, resume_step=resume_step)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_run_that_is_over_is_told_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reporter(tmp_path)
    run.event("start", "train: begins")
    for step in (1, 2, 3):
        run.step(step, {"train/loss": float(step)})
    run.event("done", "ends")
    assert main(["tail", str(tmp_path)]) == 0
    lines = said(capsys)
    assert [line.split(" ", 1)[1] for line in lines[:1] + lines[-1:]] == ["train: begins", "ends"]
    assert lines[1:-1] == [f"step {n}: loss +{n}.000" for n in (1, 2, 3)]
    assert main(["tail", str(tmp_path), "--lines", "2"]) == 0
    assert said(capsys) == lines[-2:]


def test_a_run_that_goes_on_and_is_resumed_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reporter(tmp_path)
    run.step(1, {"train/loss": 1.0})
    todo = [
        lambda: run.step(2, {"train/loss": 2.0}),
        lambda: (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "train/lo'),
        lambda: reporter(tmp_path, resume_step=1).step(2, {"train/loss": 20.0}),
        lambda: reporter(tmp_path, resume_step=2).event("interrupted", "stopped"),
    ]

    def pause(_: float) -> None:
        if not todo:
            raise KeyboardInterrupt
        todo.pop(0)()

    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path, 10, wait=True, pause=pause)
    *steps, last = said(capsys)
    assert steps == ["step 1: loss +1.000", "step 2: loss +2.000", "step 2: loss +20.000"]
    assert last.endswith("stopped")


HOLD = """
import sys
from pathlib import Path
from rest_mega.run_directory import RunDirectory
held = RunDirectory(Path(sys.argv[1]), fresh=False)
print("held", flush=True)
sys.stdin.readline()
"""


def test_it_ends_when_the_process_that_holds_the_directory_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter(tmp_path).step(1, {"train/loss": 1.0})
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        waited = []

        def pause(_: float) -> None:
            waited.append(other.poll())
            other.communicate("\n")

        follow(tmp_path, 10, pause=pause)
    assert waited == [None]
    assert not is_held(tmp_path)


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tail", str(tmp_path)]) == 2
    assert "is no run directory: it has no run.json" in capsys.readouterr().err
