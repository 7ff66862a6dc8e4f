"""Watchdog: no rank waits for ever and none dies in silence.

Every rank tells a small key-value store which phase it is in; a thread of its own looks on.
Whatever ends one rank ends all:

- a phase that lasts beyond its deadline: the rank says which ranks have not come as far as it has;
- an exception: the rank prints its traceback, then tells the store; peers whose collectives then
  fail name that rank instead of printing tracebacks of their own;
- a rank that is gone (killed, its machine lost) stops sending heartbeats;
- the store itself no longer answers: this machine, or that of the store, is cut off.

The first rank to fail is written down; every other rank leaves with its exit code. When a deadline
passes, each rank writes all its Python stacks to RUN/hang/rank_N.txt before it leaves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError

FAILED, BAD_INPUT, HUNG = 1, 2, 70
"""Exit codes: of an exception or a lost rank, of a ConfigError, of a phase beyond its deadline."""

SILENCE_S = 30.0
"""A rank without a heartbeat for this long is lost."""
BLAME_S = 5.0
"""The same, once a collective has failed."""
BEAT_S = 1.0
"""Between two looks of the thread."""

_ARRIVED, _FAILURE = "arrived", "failure"


@dataclass(frozen=True)
class Failure:
    """The first failure of a run."""

    rank: int
    text: str
    code: int


class Watchdog:
    """Of one rank. `store` is a torch Store that all ranks share; each thread uses a connection of
    its own, since a blocked call holds the one it uses."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        folder: Path,
        deadlines: Mapping[str, float],
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """`deadlines`: phase -> seconds. `leave(code)` ends this process."""
        self._mine, self._threads = store.clone(), store.clone()
        self._rank, self._world, self._folder = rank, world_size, folder
        self._deadlines, self._leave = deadlines, leave
        self._count, self._phase, self._since = 0, "start", time.monotonic()
        self._neighbour = ("", 0.0)
        """The next rank's last heartbeat, and when it was first seen."""
        self._closed = threading.Event()
        self._looked = 0.0
        """When the store was last turned to: by `arrive`, then by the thread."""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def arrive(self) -> None:
        """Wait until all ranks have come here. TimeoutError names those that have not within the
        deadline `join`; ConnectionError: the store is gone meanwhile."""
        end = time.monotonic() + self._deadlines["join"]
        self._looked = time.monotonic()
        threading.Thread(target=self._watch_the_store, name="watchdog-store", daemon=True).start()
        try:
            self._mine.set(f"beat/{self._rank}", "0")
            self._tell()
            self._mine.add(_ARRIVED, 1)
            while self._mine.add(_ARRIVED, 0) < self._world:
                self._looked = time.monotonic()
                if time.monotonic() > end:
                    ranks = range(self._world)
                    missing = [str(r) for r in ranks if not _get(self._mine, f"beat/{r}")]
                    raise TimeoutError(f"no word of rank {', '.join(missing[:8])}")
                time.sleep(BEAT_S / 20)
        except TimeoutError:
            self._closed.set()
            raise
        except RuntimeError as error:
            self._closed.set()
            raise ConnectionError("the store is gone: rank 0 or its machine was lost") from error

    def start(self) -> None:
        """Begin to watch; all ranks have arrived."""
        self._tell()
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside has the deadline of `name`."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> None:
        """From here on, outside of `phase`, the deadline of `name` counts."""
        self._count, self._phase, self._since = self._count + 1, name, time.monotonic()
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the thread finds a lost store
            self._mine.set(f"phase/{self._rank}", json.dumps([self._count, self._phase]))

    def close(self) -> None:
        """Stop watching: from here on a rank may leave without a word."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):
            self._mine.set(f"closed/{self._rank}", "1")
        if self._thread.is_alive():
            self._thread.join(timeout=10 * BEAT_S)

    # ------------------------------------------------------------ failures

    def tell(self, error: BaseException) -> None:
        """This rank ends by `error`: tell the others, unless one of them failed first.

        A traceback is printed here, before any peer can speak; SystemExit then ends this rank.
        ConfigError and what is no Exception are for the caller to report.
        """
        if not isinstance(error, Exception):
            return
        first = self._culprit() if _of_a_collective(error) else None
        if first is not None:
            _say(self._rank, f"ends because {_told(first)}")
            raise SystemExit(first.code)
        if isinstance(error, ConfigError):
            self._first(self._mine, Failure(self._rank, str(error), BAD_INPUT))
            return
        traceback.print_exception(error)
        sys.stderr.flush()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._first(self._mine, Failure(self._rank, text, FAILED))
        raise SystemExit(FAILED)

    def _culprit(self) -> Failure | None:
        """The rank that failed before a collective of this one did; waits until it has said so or
        has fallen silent. None: no other has failed."""
        end, seen = time.monotonic() + BLAME_S + BEAT_S, self._beats(self._mine)
        while time.monotonic() < end:
            time.sleep(BEAT_S / 4)
            if (found := self._read(self._mine)) is not None:
                return found if found.rank != self._rank else None
        silent = [r for r, beat in self._beats(self._mine).items() if beat == seen.get(r)]
        return self._first(self._mine, self._lost(self._mine, silent, BLAME_S)) if silent else None

    def _beats(self, store: Any) -> dict[int, str]:
        with contextlib.suppress(RuntimeError):
            others = (r for r in range(self._world) if r != self._rank)
            return {r: _get(store, f"beat/{r}") for r in others if not _get(store, f"closed/{r}")}
        return {}

    def _lost(self, store: Any, ranks: Sequence[int], seconds: float) -> Failure:
        what = ", ".join(f"rank {r} (in phase {_phase_of(store, r)[1]!r})" for r in ranks[:8])
        text = f"no sign of life of {what} for {seconds:.0f} s: killed, or its machine was lost"
        return Failure(ranks[0], text, FAILED)

    def _first(self, store: Any, failure: Failure) -> Failure:
        text = json.dumps([failure.rank, failure.text, failure.code])
        try:
            rank, text, code = json.loads(store.compare_set(_FAILURE, "", text))
        except RuntimeError:  # the store is gone with its rank
            return failure
        return Failure(rank, text, code)

    def _read(self, store: Any) -> Failure | None:
        try:
            if store.check([_FAILURE]):
                return Failure(*json.loads(store.get(_FAILURE)))
        except RuntimeError:
            return Failure(0, "its store is gone: the process or its machine was lost", FAILED)
        return None

    # ------------------------------------------------------------ the thread

    def _watch(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_S):
            beat += 1
            self._looked = time.monotonic()
            found = self._read(self._threads) or self._look(str(beat))
            if found is not None and not self._closed.is_set():
                self._end(found)
                return

    def _watch_the_store(self) -> None:
        """A store whose machine no longer answers blocks whoever asks it, past every timeout of
        its own: the thread that asks is watched by this one, which does not."""
        while not self._closed.wait(BEAT_S):
            if time.monotonic() - self._looked > SILENCE_S:
                text = (
                    f"its store has not answered for {SILENCE_S:.0f} s: its machine was lost, or "
                )
                self._end(Failure(0, text + "this one is cut off", FAILED))
                return

    def _look(self, beat: str) -> Failure | None:
        """A failure that this rank finds: its own deadline, or its neighbour without heartbeat."""
        try:
            self._threads.set(f"beat/{self._rank}", beat)
            if time.monotonic() - self._since > self._deadlines[self._phase]:
                return self._first(self._threads, Failure(self._rank, self._say_late(), HUNG))
            return self._look_at_neighbour()
        except RuntimeError:
            return self._read(self._threads)

    def _look_at_neighbour(self) -> Failure | None:
        rank, now = (self._rank + 1) % self._world, time.monotonic()
        beat = _get(self._threads, f"beat/{rank}")
        if beat != self._neighbour[0] or not beat or _get(self._threads, f"closed/{rank}"):
            self._neighbour = (beat, now)
        elif now - self._neighbour[1] > SILENCE_S:
            return self._first(self._threads, self._lost(self._threads, [rank], SILENCE_S))
        return None

    def _say_late(self) -> str:
        """The phase, its deadline, and who has not come as far."""
        phases = {rank: _phase_of(self._threads, rank) for rank in range(self._world)}
        behind = [f"rank {r} (in {n!r})" for r, (c, n) in phases.items() if c < self._count]
        seconds = self._deadlines[self._phase]
        text = f"phase {self._phase!r} is not over after {seconds:.0f} s (deadlines.{self._phase})"
        if behind:
            return f"{text}; not arrived there: {', '.join(behind)}"
        return f"{text}; all ranks are in it"

    def _end(self, failure: Failure) -> None:
        """Say why, write the stacks where a phase hung, and leave."""
        if failure.code == HUNG:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"rank_{self._rank}.txt"
            with file.open("w") as out:
                out.write(f"{_told(failure)}\nrank {self._rank}: ")
                out.write(f"in phase {self._phase!r}, mark {self._count}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            _say(self._rank, f"{_told(failure)}; stacks are in {file}")
        else:
            _say(self._rank, f"ends because {_told(failure)}")
        if failure.rank == self._rank:
            time.sleep(3 * BEAT_S)  # peers see it, and write their stacks
        self._leave(failure.code)


def _of_a_collective(error: BaseException) -> bool:
    """Whether the error may be no more than a peer's end: gloo and NCCL raise it inside torch."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text
        for word in ("gloo", "nccl", "connection", "broken pipe", "timed out", "timeout")
    )


def _get(store: Any, key: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else ""


def _phase_of(store: Any, rank: int) -> tuple[int, str]:
    """(how many phases a rank has entered, which it is in)."""
    text = _get(store, f"phase/{rank}")
    count, name = json.loads(text) if text else (0, "start")
    return int(count), str(name)


def _told(failure: Failure) -> str:
    return f"rank {failure.rank} failed: {failure.text}"


def _say(rank: int, text: str) -> None:
    sys.stderr.write(f"rest-mega [rank {rank}]: {text}\n")
    sys.stderr.flush()
