"""Publishing: the engine must take every tensor, and say which version it serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from rest_mega.rollout.engine import Completion, Request, Sampling
from rest_mega.sync.publish import publish


class Tensors:
    """An exporter of three tensors that knows whether its stream was exhausted."""

    def __init__(self, names: Sequence[str] = ("a", "b", "c")) -> None:
        self.names, self.exhausted = names, False

    def stream(self) -> Iterator[tuple[str, Any]]:
        for name in self.names:
            yield name, name.upper()
        self.exhausted = True


class TakingEngine:
    """Takes the first `takes` tensors and then says that it serves `says`."""

    def __init__(self, takes: int, says: int) -> None:
        self.version, self.takes, self.says = -1, takes, says
        self.taken: list[tuple[str, Any]] = []

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        for pair in tensors:
            self.taken.append(pair)
            if len(self.taken) == self.takes:
                break
        self.version = self.says

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        raise NotImplementedError

    def close(self) -> None: ...


def test_every_tensor_reaches_the_engine_in_order() -> None:
    exporter, engine = Tensors(), TakingEngine(takes=99, says=7)
    publish(exporter, engine, 7)  # type: ignore[arg-type]
    assert engine.taken == [("a", "A"), ("b", "B"), ("c", "C")]


def test_an_engine_that_stops_reading_is_refused_after_the_other_ranks_were_let_go() -> None:
    exporter = Tensors()
    with pytest.raises(RuntimeError, match="left 2 tensors of version 7 unread, the first is 'b'"):
        publish(exporter, TakingEngine(takes=1, says=7), 7)  # type: ignore[arg-type]
    assert exporter.exhausted


def test_an_engine_that_serves_another_version_is_refused() -> None:
    with pytest.raises(RuntimeError, match="serves version 6 after loading version 7"):
        publish(Tensors(), TakingEngine(takes=99, says=6), 7)  # type: ignore[arg-type]


def test_a_rank_without_an_engine_takes_part_and_receives_nothing() -> None:
    exporter = Tensors(())
    publish(exporter, None, 7)  # type: ignore[arg-type]
    assert exporter.exhausted
    with pytest.raises(AssertionError, match="only players receive tensors"):
        publish(Tensors(), None, 7)  # type: ignore[arg-type]
