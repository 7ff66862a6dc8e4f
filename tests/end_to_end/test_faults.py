"""Whatever kills a run, it ends within its deadline, says why, and the same command goes on to the
very numbers of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rest_mega.watchdog import FAILED, HUNG
from tests.support.ranks import Job
from tests.support.runs import Run, job_of, make_run, start

pytestmark = pytest.mark.distributed

Start = Callable[..., Job]
PP2 = ("parallel.pipeline=2", "telemetry.trajectories=2")
SECONDS = 90.0
"""Until a job that lost a rank must have ended, on a machine that does other things too."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of four steps at PP 2."""
    made = make_run(tmp_path_factory.mktemp("run"))
    ended = start(2, "train", made.config, *PP2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return made


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Start]:
    """Starts a run whose ranks are gone when the test is over."""
    jobs: list[Job] = []

    def start_(*words: object, folder: Path = tmp_path) -> Job:
        jobs.append(job_of(2, folder / "job", *words))
        return jobs[-1]

    yield start_
    for job in jobs:
        job.wait(0.0)


def words(run: Run, folder: Path) -> tuple[object, ...]:
    return ("train", run.config, *PP2, f"run.dir={folder / 'run'}")


def wait_until(true: Callable[[], bool], job: Job) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, job.said()
        assert all(process.is_alive() for process in job.ranks), job.said()
        time.sleep(0.02)


def resumed(run: Run, folder: Path) -> None:
    """The same command again ends well, with the numbers of the undisturbed run."""
    ended = start(2, *words(run, folder))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert run.measured(folder / "run") == run.measured()


def has_step(folder: Path, step: int) -> Callable[[], bool]:
    file = folder / "run" / "metrics.jsonl"
    return lambda: file.exists() and f'"step": {step},' in file.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_which_says_so_and_resumes(
    run: Run, tmp_path: Path, start_job: Start, rank: int
) -> None:
    job = start_job(*words(run, tmp_path))
    wait_until(has_step(tmp_path, 2), job)
    job.ranks[rank].kill()
    codes = job.wait(SECONDS)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == FAILED, job.said()
    assert f"[rank {1 - rank}]: ends because rank {rank} failed: no sign of life" in job.said()
    resumed(run, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_arrives_ends_the_job_which_says_so(
    run: Run, tmp_path: Path, start_job: Start, rank: int
) -> None:
    job = start_job(*words(run, tmp_path), "deadlines.join=3")
    job.ranks[rank].kill()
    codes = job.wait(SECONDS)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == HUNG, job.said()
    told = f"rest-mega [rank {1 - rank}]: not all ranks arrived within 3 s (deadlines.join): "
    assert told in job.said()


def test_a_rank_that_stands_still_is_named_with_the_phase(
    run: Run, tmp_path: Path, start_job: Start
) -> None:
    """A stopped process keeps its connections: only the deadline finds it, or its silence."""
    phases = ("rollout", "score", "train", "publish", "evaluate", "save", "loop")
    deadlines = [f"deadlines.{phase}=15" for phase in phases]
    job = start_job(*words(run, tmp_path), *deadlines)
    wait_until(has_step(tmp_path, 2), job)
    pid = job.ranks[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    job.ranks[0].join(SECONDS)
    assert job.ranks[0].exitcode == HUNG, job.said()
    os.kill(pid, signal.SIGCONT)
    assert job.wait(SECONDS)[1] in (HUNG, FAILED)
    assert "rank 0 failed: phase" in job.said()
    text = (tmp_path / "run" / "hang" / "rank_0.txt").read_text()
    assert "is not over after 15 s" in text
    assert "distributed_c10d.py" in text, "where it waits"
    resumed(run, tmp_path)


def test_an_exception_on_one_rank_comes_first_and_ends_all(
    run: Run, tmp_path: Path, start_job: Start
) -> None:
    """The lead's environment raises what no tool call answers for."""
    module = tmp_path / "parity.py"
    text = (run.root / "parity.py").read_text()
    module.write_text(text.replace("asked = ", "raise OSError('no disc')\n        asked = "))
    job = start_job(*words(run, tmp_path), f"environment.modules=[{module}]")
    assert job.wait(SECONDS) == [FAILED, FAILED]
    assert "OSError: no disc" in job.logs[0].read_text()
    assert "[rank 1]: ends because rank 0 failed: OSError: no disc" in job.logs[1].read_text()
    assert "Traceback" not in job.logs[1].read_text()


def test_sigterm_saves_and_says_so_in_the_exit_code(
    run: Run, tmp_path: Path, start_job: Start
) -> None:
    job = start_job(*words(run, tmp_path), "run.save_every=0")
    wait_until(has_step(tmp_path, 1), job)
    for process in job.ranks:
        process.terminate()
    codes = job.wait(SECONDS)
    assert codes == [128 + signal.SIGTERM] * 2, job.said()
    assert "by SIGTERM; the same command resumes there" in job.said()
    resumed(run, tmp_path)


def test_a_second_run_in_the_same_directory_is_refused(
    run: Run, tmp_path: Path, start_job: Start
) -> None:
    job = start_job(*words(run, tmp_path), "run.steps=1000")
    wait_until(has_step(tmp_path, 1), job)
    for fresh in ("run.fresh=false", "run.fresh=true"):
        ended = start(2, *words(run, tmp_path), fresh)
        assert [rank.code for rank in ended] == [2, 2]
        told = f"run.dir='{tmp_path / 'run'}' is in use by process {job.ranks[0].pid} on "
        assert told in ended[0].err
    job.ranks[1].kill()
    job.wait(SECONDS)
    resumed(run, tmp_path)


def test_a_run_directory_that_vanishes_ends_the_run_with_its_name(
    run: Run, tmp_path: Path, start_job: Start
) -> None:
    job = start_job(*words(run, tmp_path), "run.steps=1000")
    wait_until(has_step(tmp_path, 1), job)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert job.wait(SECONDS) == [FAILED, FAILED]
    assert str(tmp_path / "run") in job.said()


@pytest.mark.slow
def test_thirty_kills_at_random_moments(run: Run, tmp_path: Path, start_job: Start) -> None:
    """SIGKILL of a random rank at a random moment, from the first second to the last."""
    draw = random.Random(0)
    began = time.monotonic()
    start(2, *words(run, tmp_path / "timed"))
    whole = time.monotonic() - began
    for number in range(30):
        folder = tmp_path / str(number)
        job = start_job(*words(run, folder), "deadlines.join=20", folder=folder)
        rank = draw.randrange(2)
        time.sleep(draw.uniform(0.0, whole))
        job.ranks[rank].kill()
        codes = job.wait(SECONDS)
        assert None not in codes, f"kill {number}: {job.said()}"
        if codes[1 - rank] != 0:  # it had not ended already
            assert codes[1 - rank] in (FAILED, HUNG), f"kill {number}: {job.said()}"
            assert f"rest-mega [rank {1 - rank}]: " in job.said(), f"kill {number}"
        resumed(run, folder)
