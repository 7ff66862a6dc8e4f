"""The launch scripts: on one machine, on two under Slurm, and across network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rest_mega.launch import free_port
from tests.support.runs import Run, make_run

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "launch"
SECONDS = 180.0
"""Until a test gives up, on a machine that does other things too."""
LONG = ("run.steps=1000", "run.save_every=0", "evaluation.prompts=1", "parallel.pipeline=2")


class Launched:
    """A script that runs, and what it says."""

    def __init__(self, log: Path, words: Sequence[object], **variables: object) -> None:
        bin_ = Path(sys.executable).parent
        self._log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "PATH": f"{bin_}:{os.environ['PATH']}"}
                | {name: str(value) for name, value in variables.items()},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {SECONDS:.0f} s:\n{self.said}") from None

    def end(self) -> None:
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for one in family:
            one.kill()
        if self.process.poll() is None:
            self.process.kill()


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    """What a test has launched, ended when it is over."""
    all_: list[Launched] = []
    yield all_
    for one in all_:
        one.end()


def wait_for_step(run: Run, step: int, *launched: Launched) -> None:
    end = time.monotonic() + SECONDS
    while steps(run)[-1:] < [step]:
        assert time.monotonic() < end, launched[0].said
        for one in launched:
            assert one.process.poll() is None, one.said
        time.sleep(0.05)


def steps(run: Run) -> list[int]:
    """Those that were trained."""
    if not (run.dir / "metrics.jsonl").is_file():
        return []
    return [row["step"] for row in run.rows() if "train/loss" in row]


def test_one_node_starts_all_ranks(tmp_path: Path, launched: list[Launched]) -> None:
    words = (SCRIPTS / "one_node.sh", "--seconds", "1")
    launched.append(Launched(tmp_path / "log", words, PROCESSES=2, VERB="doctor"))
    assert launched[0].wait() == 0, launched[0].said
    assert "all-reduce, all ranks of 2: exact" in launched[0].said


def test_multi_node_says_what_is_missing(tmp_path: Path, launched: list[Launched]) -> None:
    for variables, told in (
        ({"NODES": 2}, "HEAD: name or address of the machine where all meet"),
        ({"NODES": 2, "HEAD": "no-such-host.invalid"}, "cannot be resolved: write its address"),
        ({"NODES": 2, "HEAD": "127.0.0.1", "ADDRESS": "192.0.2.1"}, "no interface has ADDRESS"),
    ):
        launched.append(Launched(tmp_path / "log", [SCRIPTS / "multi_node.sh"], **variables))
        assert launched[-1].wait() != 0
        assert told in launched[-1].said


def slurm(
    run: Run, log: Path, restart: int, state: str, *words: str, **variables: object
) -> Launched:
    """The batch script as slurmd starts it: a copy, on the first of two nodes."""
    copy = log.with_name("slurm_script")
    copy.write_text((SCRIPTS / "slurm.sbatch").read_text())
    bin_ = ROOT / "tests" / "support" / "slurm"
    python = Path(sys.executable).parent
    return Launched(
        log,
        ["bash", copy, run.config, "parallel.pipeline=2", *words],
        PATH=f"{bin_}:{python}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=ROOT,
        SLURM_JOB_NUM_NODES=2,
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_JOB_ID=4711,
        SLURM_RESTART_COUNT=restart,
        SLURM_CALLS=log.with_name("calls"),
        SLURM_STATE=state,
        PORT=free_port(),
        PROCESSES=1,
        **variables,
    )


def test_a_slurm_job_at_its_time_limit_saves_goes_back_and_resumes(
    tmp_path: Path, launched: list[Launched]
) -> None:
    run, log, calls = make_run(tmp_path), tmp_path / "log", tmp_path / "calls"
    job = slurm(run, log, 0, "RUNNING", *LONG)
    launched.append(job)
    wait_for_step(run, 1, job)
    os.kill(job.process.pid, signal.SIGUSR1)
    assert job.wait() == 143, job.said
    assert "scontrol requeue 4711" in calls.read_text()
    assert "by SIGTERM; the same command resumes there" in job.said
    (saved,) = (run.dir / "checkpoints").iterdir()
    reached = steps(run)[-1]
    assert saved.name.endswith(str(reached))

    more = (f"run.steps={reached + 1}", "run.save_every=0", "evaluation.prompts=1")
    again = slurm(run, log, 1, "RUNNING", *more)
    launched.append(again)
    assert again.wait() == 0, again.said
    assert steps(run) == list(range(1, reached + 2))
    assert calls.read_text().count("requeue") == 1


@pytest.mark.parametrize(("state", "back"), [("RUNNING", True), ("CANCELLED", False)])
def test_a_preempted_slurm_job_goes_back_and_a_cancelled_one_does_not(
    tmp_path: Path, launched: list[Launched], state: str, back: bool
) -> None:
    node = tmp_path / "examples" / "launch" / "multi_node.sh"
    node.parent.mkdir(parents=True)
    node.write_text("#!/bin/sh\ntrap 'exit 143' TERM\necho ready\nsleep 100 & wait\n")
    node.chmod(0o755)
    job = slurm(make_run(tmp_path), tmp_path / "log", 0, state, REPOSITORY=tmp_path)
    launched.append(job)
    end = time.monotonic() + SECONDS
    while job.said.count("ready") < 2:
        assert time.monotonic() < end, job.said
        time.sleep(0.05)
    for child in psutil.Process(
        job.process.pid
    ).children():  # Slurm signals the step, not the batch
        child.terminate()
    assert job.wait() == 143, job.said
    assert ("scontrol requeue" in (tmp_path / "calls").read_text()) == back


# ------------------------------------------------------------------ machines with their own network


class Nodes:
    """Two network namespaces, joined by a cable that can be cut; each with its own host name."""

    def __init__(self) -> None:
        self._names = [f"rest{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        a, b = self._names
        for name in self._names:
            self._ip("netns", "add", name)
        self._ip("link", "add", "wire0", "netns", a, "type", "veth", "peer", "wire0", "netns", b)
        for name, address in zip(self._names, self.addresses, strict=True):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", "wire0")
            for link in ("wire0", "lo"):
                self._ip("-n", name, "link", "set", link, "up")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def cable(self, state: str) -> None:
        """`up` or `down`, of the second node's end."""
        self._ip("-n", self._names[1], "link", "set", "wire0", state)

    def words(self, node: int, *words: object) -> list[object]:
        """A command of this node."""
        inside = ["sh", "-c", f'hostname node{node}; exec "$0" "$@"', *words]
        return ["ip", "netns", "exec", self._names[node], "unshare", "--uts", *inside]

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    try:
        made = Nodes()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and the command ip: {error}")
    yield made
    made.close()


def launch(nodes: Nodes, run: Run, logs: Path, *words: str, **variables: object) -> list[Launched]:
    """The multi-node script on both nodes."""
    logs.mkdir()
    command = (SCRIPTS / "multi_node.sh", run.config, "parallel.pipeline=2", *words)
    shared = {"HEAD": nodes.addresses[0], "NODES": 2, "PROCESSES": 1, **variables}
    return [
        Launched(logs / f"node{node}", nodes.words(node, *command), **shared) for node in range(2)
    ]


@pytest.mark.slow
def test_a_machine_that_is_cut_off_is_named_and_the_run_resumes(
    tmp_path: Path, nodes: Nodes, launched: list[Launched]
) -> None:
    run = make_run(tmp_path)
    launched += launch(
        nodes, run, tmp_path / "first", *LONG[:1], "run.save_every=1", *LONG[2:3], LINGER_S=5
    )
    wait_for_step(run, 2, *launched)
    nodes.cable("down")
    for one in launched:
        assert one.wait() != 0, one.said
    assert "rank 1 failed: no sign of life of rank 1 (in phase" in launched[0].said
    assert "its store has not answered for 30 s: its machine was lost" in launched[1].said
    reached = steps(run)[-1]

    nodes.cable("up")
    more = (f"run.steps={reached + 2}", "evaluation.prompts=1")
    launched += launch(nodes, run, tmp_path / "again", *more)
    for one in launched[2:]:
        assert one.wait() == 0, one.said
    assert steps(run) == list(range(1, reached + 3))


@pytest.mark.slow
def test_torchrun_starts_ranks_anew_after_one_died(
    tmp_path: Path, nodes: Nodes, launched: list[Launched]
) -> None:
    run = make_run(tmp_path)
    words = ("run.steps=12", "run.save_every=1", "evaluation.prompts=1")
    launched += launch(nodes, run, tmp_path / "logs", *words, RESTARTS=1)
    wait_for_step(run, 2, *launched)
    (launcher,) = [
        child
        for child in psutil.Process(launched[1].process.pid).children()
        if any(word.endswith("torchrun") for word in child.cmdline())
    ]
    (rank,) = launcher.children()
    rank.kill()
    for one in launched:
        assert one.wait() == 0, one.said
    assert steps(run) == list(range(1, 13))
