"""run_ranks(fn, world_size, ...): fresh processes of a distributed run, forked from a server that
has torch and megatron.

Starting the server takes seconds, once per test session; four ranks with their groups are then up
in about a second. Every call has a deadline: ranks that are silent are named, and only its own
children are ended.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])


class RankError(AssertionError):
    """A rank failed or stayed silent."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    machines: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """`fn(*args)` on every rank of a new run, with torchrun's variables set; the results in rank
    order. `machines`: how many the ranks, cut evenly, take themselves to be on.

    `fn` must be importable (a module-level function). The first failing rank's traceback is raised
    as RankError. `environment`: variables that must be there before anything is imported; the ranks
    are then new interpreters, seconds slower to start.
    """
    context = _CONTEXT if environment is None else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe(duplex=False)
            place = rank, world_size, folder, machines
            child = context.Process(target=_rank, args=(fn, args, place, theirs))
            with mock.patch.dict(os.environ, environment or {}):
                child.start()
            theirs.close()
            pipes.append(mine)
            children.append(child)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for child in children:
                child.join(timeout=5)
                if child.is_alive():
                    child.kill()
                    child.join()


def in_turn(cases: Sequence[tuple[Any, ...]], run: Callable[..., Any]) -> list[Any]:
    """On a rank: `run(*arguments)` of every (name, *arguments), one run's model-parallel groups
    after another's; an error names its case."""
    from megatron.core import parallel_state

    answers = []
    for name, *arguments in cases:
        try:
            answers.append(run(*arguments))
        except Exception as error:
            error.add_note(f"in {name}")
            raise
        parallel_state.destroy_model_parallel()
    return answers


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(
                f"no answer from rank(s) {sorted(waiting.values())} within {timeout:.0f} s"
            )
        for pipe in ready:
            results[waiting[pipe]] = _receive(pipe, waiting[pipe])  # type: ignore[index, arg-type]
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Any, rank: int) -> Any:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died without an answer") from None
    if not ok:
        raise RankError(f"rank {rank} failed:\n{value}")
    return value


class Job:
    """`main()` on every rank of a run that a test watches and kills; output goes to a file each."""

    def __init__(self, main: Callable[..., int], world_size: int, folder: Path, *args: Any) -> None:
        folder.mkdir(parents=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
        self.ranks = [
            _CONTEXT.Process(target=_logged, args=(main, args, rank, world_size, folder, log))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.ranks:
            process.start()

    def said(self) -> str:
        """What all ranks have printed."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, timeout: float) -> list[int | None]:
        """Exit codes in rank order (-9: killed); None of a rank that is still there after `timeout`
        seconds, which is then killed."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            if process.is_alive():
                process.kill()
                process.join()
        return codes


def _logged(
    main: Callable[..., int], args: Any, rank: int, world_size: int, folder: Path, log: Path
) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    _become(rank, world_size, folder)
    sys.exit(main(*args))


def _rank(
    fn: Callable[..., Any], args: Any, place: tuple[int, int, str, int], pipe: Connection
) -> None:
    rank, world_size, folder, machines = place
    _become(rank, world_size, Path(folder))
    if machines > 1:
        from rest_mega import launch

        launch.machine = lambda: f"machine{rank * machines // world_size}"
    try:
        answer = (True, fn(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


def _become(rank: int, world_size: int, folder: Path) -> None:
    """torchrun's variables for this process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        REST_MEGA_INIT_METHOD=f"file://{folder / 'store'}",
        OMP_NUM_THREADS="1",
    )
