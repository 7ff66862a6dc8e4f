"""Under torchrun itself: a Ctrl-C ends every process and leaves a checkpoint that the same command
resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rest_mega.launch import free_port
from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""Until a test gives up; a run takes a tenth of it."""


def torchrun(run: Run, log: Path, *words: str) -> subprocess.Popen[bytes]:
    """torchrun as a terminal starts it: the first of a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "rest_mega", "train", str(run.config), "parallel.tensor=2", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def wait_for(run: Run, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `step` is in the metrics."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        file = run.dir / "metrics.jsonl"
        rows = file.read_text().splitlines() if file.is_file() else []
        if any(f'"step": {step},' in row and "train/loss" in row for row in rows):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {SECONDS} s: {log.read_text()}")


@pytest.fixture
def ended() -> Iterator[list[psutil.Process]]:
    """Processes that must be gone when the test is over; those that are not are ended here."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            process.kill()


def test_ctrl_c_ends_every_process_and_the_same_command_resumes(
    tmp_path: Path, ended: list[psutil.Process]
) -> None:
    run, log = make_run(tmp_path), tmp_path / "log"
    words = ("run.steps=1000", "run.save_every=0", "evaluation.prompts=1")
    first = torchrun(run, log, *words)
    ended[:] = [psutil.Process(first.pid)]
    wait_for(run, 2, first, log)
    ended[:] = family(first)
    assert len(ended) >= 3
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(timeout=SECONDS) != 0
    _, alive = psutil.wait_procs(ended, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], log.read_text()

    (checkpoint,) = (run.dir / "checkpoints").iterdir()
    state = json.loads((checkpoint / "run_state.json").read_text())
    steps = [row["step"] for row in run.measured() if "train/loss" in row]
    assert steps == list(range(1, state["step"] + 1))
    assert f"interrupted after step {state['step']}" in log.read_text()
    assert "train.py" not in log.read_text(), "no traceback of ours"

    last = state["step"] + 1
    words = (f"run.steps={last}", "run.save_every=0", "evaluation.prompts=1")
    again = start(2, "train", run.config, "parallel.tensor=2", *words)
    assert [rank.code for rank in again] == [0, 0], again[0].err
    steps = [row["step"] for row in run.measured() if "train/loss" in row]
    assert steps == list(range(1, last + 1))
    assert (run.dir / "hf" / "model.safetensors").is_file()
    assert (run.dir / "report.html").is_file()
