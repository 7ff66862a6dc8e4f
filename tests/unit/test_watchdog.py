"""No rank waits for ever and none ends without saying why: watchdogs of several ranks in one
process, on a real store."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega import watchdog
from rest_mega.config import ConfigError
from rest_mega.watchdog import BAD_INPUT, FAILED, HUNG, Watchdog

DEADLINES = {"join": 60.0, "start": 60.0, "loop": 60.0, "train": 0.3, "rollout": 60.0}


class Ranks:
    """Watchdogs that keep the exit code instead of leaving."""

    def __init__(self, folder: Path, count: int) -> None:
        from torch.distributed import FileStore

        self.codes: dict[int, int] = {}
        self._left = threading.Condition()
        self.dogs = [
            Watchdog(
                FileStore(str(folder / "store"), count),
                rank,
                count,
                folder / "hang",
                DEADLINES,
                leave=lambda code, rank=rank: self._leave(rank, code),  # type: ignore[misc]
            )
            for rank in range(count)
        ]

    def _leave(self, rank: int, code: int) -> None:
        with self._left:
            self.codes[rank] = code
            self._left.notify_all()

    def wait(self, count: int) -> dict[int, int]:
        """The exit codes, once `count` ranks have left."""
        with self._left:
            assert self._left.wait_for(lambda: len(self.codes) == count, timeout=30)
        return self.codes


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    monkeypatch.setattr(watchdog, "BLAME_S", 0.5)
    monkeypatch.setattr(watchdog, "SILENCE_S", 1.0)
    made = Ranks(tmp_path, 3)
    yield made
    for dog in made.dogs:
        dog.close()


def test_all_ranks_arrive_or_the_missing_ones_are_named(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = threading.Thread(target=ranks.dogs[0].arrive, daemon=True)
    first.start()
    monkeypatch.setitem(DEADLINES, "join", 0.2)
    with pytest.raises(TimeoutError, match=r"no word of rank 1$"):
        ranks.dogs[2].arrive()
    ranks.dogs[1].arrive()
    first.join(timeout=30)
    assert not first.is_alive()


def test_a_phase_beyond_its_deadline_names_who_has_not_arrived(
    ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for dog in ranks.dogs:
        dog.start()
        dog.enter("rollout")
    with ranks.dogs[0].phase("train"):
        assert ranks.wait(3) == dict.fromkeys(range(3), HUNG)
    said = capfd.readouterr().err
    why = "rank 0 failed: phase 'train' is not over after 0 s (deadlines.train)"
    assert f"{why}; not arrived there: rank 1 (in 'rollout'), rank 2 (in 'rollout')" in said
    for rank in range(3):
        text = (tmp_path / "hang" / f"rank_{rank}.txt").read_text()
        assert why in text
        assert f"in phase {'train' if rank == 0 else 'rollout'!r}" in text
        assert "test_a_phase_beyond_its_deadline" in text, "the stack of every thread"


def test_a_phase_that_ends_in_time_is_not_held_against_later_ones(ranks: Ranks) -> None:
    dog = ranks.dogs[0]
    for one in ranks.dogs:
        one.start()
    for _ in range(6):
        with dog.phase("train"):
            time.sleep(0.1)
    time.sleep(0.4)
    assert not ranks.codes


def test_an_exception_ends_the_others_with_its_name(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    for dog in ranks.dogs:
        dog.start()
    with pytest.raises(SystemExit) as left:
        ranks.dogs[1].tell(ZeroDivisionError("no tokens"))
    assert left.value.code == FAILED
    ranks.dogs[1].close()
    assert {**ranks.wait(2)} == {0: FAILED, 2: FAILED}
    said = capfd.readouterr().err
    assert said.index("ZeroDivisionError: no tokens") < said.index("[rank 0]: ends because rank 1")
    assert "[rank 2]: ends because rank 1 failed: ZeroDivisionError: no tokens" in said


def test_bad_input_ends_the_others_with_its_exit_code(ranks: Ranks) -> None:
    for dog in ranks.dogs:
        dog.start()
    ranks.dogs[2].tell(ConfigError("x=1 must be 2"))
    ranks.dogs[2].close()
    assert {**ranks.wait(2)} == {0: BAD_INPUT, 1: BAD_INPUT}


GLOO = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_a_failed_collective_is_put_down_to_the_rank_that_failed_first(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    peer = ranks.dogs[0]
    told: list[Any] = []

    def end() -> None:
        with pytest.raises(SystemExit) as left:
            peer.tell(GLOO)
        told.append(left.value.code)

    thread = threading.Thread(target=end)
    thread.start()
    ranks.dogs[1].tell(ConfigError("late"))
    thread.join()
    assert told == [BAD_INPUT]
    said = capfd.readouterr().err
    assert "ends because rank 1 failed: late" in said
    assert "Traceback" not in said


def test_a_failed_collective_is_put_down_to_the_rank_that_fell_silent(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is killed in its rollout: no word, no more heartbeats."""
    for dog in (ranks.dogs[0], ranks.dogs[2]):
        dog.start()
    ranks.dogs[1].enter("rollout")
    with pytest.raises(SystemExit) as left:
        ranks.dogs[0].tell(GLOO)
    assert left.value.code == FAILED
    assert "rank 1 failed: no sign of life of rank 1 (in phase 'rollout')" in capfd.readouterr().err


def test_a_rank_that_falls_silent_ends_the_others(ranks: Ranks) -> None:
    for dog in ranks.dogs:
        dog.start()
    time.sleep(0.3)
    ranks.dogs[1]._closed.set()  # its thread ends without a word, as in a killed process
    assert {**ranks.wait(2)} == {0: FAILED, 2: FAILED}


def test_a_rank_that_closed_may_leave(ranks: Ranks) -> None:
    for dog in ranks.dogs:
        dog.start()
    time.sleep(0.2)
    ranks.dogs[1].close()
    time.sleep(1.5)
    assert not ranks.codes


SERVER = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def test_a_store_that_falls_silent_ends_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import TCPStore

    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    monkeypatch.setattr(watchdog, "SILENCE_S", 1.0)
    codes: list[int] = []
    left = threading.Event()
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        store = TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
        dog = Watchdog(
            store, 0, 1, tmp_path, DEADLINES, leave=lambda code: (codes.append(code), left.set())[1]
        )
        dog.arrive()
        dog.start()
        server.send_signal(signal.SIGSTOP)  # its socket stays open: nothing is refused
        assert left.wait(timeout=30)
        server.kill()
    assert codes == [FAILED]
    assert "its store has not answered for 1 s: its machine was lost, or" in capfd.readouterr().err
    dog.close()
