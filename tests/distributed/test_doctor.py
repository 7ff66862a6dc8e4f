"""`rest-mega doctor` between ranks: links are tried, and what is wrong with one is found."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rest_mega.config import ParallelConfig
from rest_mega.diagnosis import ERROR, WARNING, Finding
from tests.support.ranks import run_ranks
from tests.support.runs import Ended, make_run, run_verb, start

pytestmark = pytest.mark.distributed

LINKS = [
    "all-reduce, all ranks of 4",
    "broadcast, all ranks of 4",
    "all-reduce, tensor groups of 2",
    "hop, pipeline groups of 2",
]


def test_all_ranks_together_find_nothing_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    words = ("doctor", run.config, "--seconds", 1)
    ended = start(4, *words, "parallel.tensor=2", "parallel.pipeline=2")
    assert [rank.code for rank in ended] == [0] * 4, ended[0].out
    said = " ".join(ended[0].out.split())
    assert all(f"{link}: exact" in said for link in LINKS)
    assert "files of rank 0 are seen" in said
    assert "within 1 s of each other" in said
    assert "0 errors" in said
    assert not any(rank.out for rank in ended[1:])
    assert not run.dir.exists()


def test_a_layout_that_does_not_fit_the_ranks_is_an_error(tmp_path: Path) -> None:
    ended = start(2, "doctor", make_run(tmp_path).config, "parallel.tensor=4")
    assert [rank.code for rank in ended] == [1, 1]
    assert "world size 2" in ended[0].out
    assert "not tried: errors above" in ended[0].out


def other_versions(words: list[str]) -> Ended:
    """Rank 1 believes that it has another Python."""
    version = "3.14.1" if os.environ["RANK"] == "1" else "3.11.0"
    with mock.patch("platform.python_version", return_value=version):
        return run_verb(words)


def test_ranks_with_unlike_packages_are_an_error() -> None:
    ended = run_ranks(other_versions, 2, ["doctor", "--seconds", "1"])
    assert [rank.code for rank in ended] == [1, 1]
    assert "[rank 1]" in ended[0].out
    assert "ranks have different ones" in ended[0].out


def planted(fault: str) -> list[Finding]:
    """What the links' tests find when rank 1 has a fault."""
    import torch.distributed as dist

    from rest_mega.diagnosis import links
    from rest_mega.trainer import parallel

    place = parallel.start(ParallelConfig(), "cpu")
    if place.rank == 1 and fault == "clock":
        own = place.clock_offset
        mock.patch.object(type(place), "clock_offset", side_effect=lambda: own() + 5).start()
    if place.rank == 1 and fault == "slow":
        mock.patch.object(links, "_synchronise", side_effect=lambda _: time.sleep(0.5)).start()
    if place.rank == 1 and fault == "wrong":
        reduce: Any = dist.all_reduce

        def one_number_off(tensor: Any, *words: Any, **named: Any) -> Any:
            if tensor.numel() > 10_000:
                tensor[1234] += 1
            return reduce(tensor, *words, **named)

        mock.patch.object(dist, "all_reduce", one_number_off).start()
    return links.look(place, 0.1)


@pytest.mark.parametrize(
    ("fault", "level", "text"),
    [
        ("clock", WARNING, "rank 1's is +5.0 s off rank 0's"),
        ("slow", WARNING, "; rank 1: "),
        ("wrong", ERROR, "all-reduce, all ranks of 2: the numbers that arrive are wrong, rank 0-1"),
    ],
)
def test_what_is_wrong_with_one_rank_is_found(fault: str, level: str, text: str) -> None:
    every = run_ranks(planted, 2, fault)
    assert every[0] == every[1], "all ranks find the same"
    (found,) = [f for f in every[0] if text in f.text]
    assert found.level == level
    assert found.remedy
    assert not [f for f in every[0] if f.level == ERROR and f != found]


def alone_of_two() -> Ended:
    """Rank 0 of two: rank 1 never comes."""
    if os.environ["RANK"] == "1":
        return Ended(0, "", "")
    return run_verb(["doctor", "--wait", "2"])


def test_ranks_that_do_not_come_are_named() -> None:
    ended = run_ranks(alone_of_two, 2)[0]
    assert ended.code == 70
    assert "not all ranks arrived within 2 s" in ended.out
