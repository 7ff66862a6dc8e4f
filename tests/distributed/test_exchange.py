"""What players share arrives on their replica's ranks as it was, as plain arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ParallelConfig
from rest_mega.records import Sample
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _shared(parallel: ParallelConfig) -> Any:
    """(its player number if it is one, what it gets of: many samples, none, and one)."""
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.exchange import share_samples

    place = places.start(parallel, "cpu")
    me = place.player if place.is_player else None
    given = ([], [], []) if me is None else (groups_of(me), [], random_samples(1))
    return me, [share_samples(place, samples) for samples in given]


def groups_of(player: int) -> list[Sample]:
    """Six samples in three groups."""
    samples = random_samples(6, seed=player)
    return [replace(sample, group=n // 2) for n, sample in enumerate(samples)]


def assert_equal(got: list[Sample], want: list[Sample]) -> None:
    for one, other in zip(got, want, strict=True):
        for name in ("ids_T", "mask_T", "regions_T", "logprobs_T"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        for name in ("advantage", "reward", "group"):
            assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize(
    ("parallel", "machines", "players"),
    [
        (ParallelConfig(tensor=2), 1, [[0], [0]]),
        (ParallelConfig(), 1, [[0], [1]]),
        (ParallelConfig(tensor=2), 2, [[0, 1], [0, 1]]),
        (ParallelConfig(pipeline=2), 2, [[0, 2], [1, 3], [0, 2], [1, 3]]),
    ],
    ids=["one replica", "two replicas", "one on two machines", "two on two machines each"],
)
def test_the_samples_of_its_players_arrive_on_all_ranks_of_a_replica(
    parallel: ParallelConfig, machines: int, players: list[list[int]]
) -> None:
    answers = run_ranks(_shared, len(players), parallel, machines=machines)
    for (me, got), mine in zip(answers, players, strict=True):
        (samples, own), (none, _), (one, _) = got
        numbered = [
            [replace(s, group=s.group + 3 * n) for s in groups_of(player)]
            for n, player in enumerate(mine)
        ]
        assert_equal(samples, [s for part in numbered for s in part])
        assert_equal(samples[own], [] if me is None else numbered[mine.index(me)])
        assert none == []
        assert_equal(one, [replace(random_samples(1)[0], group=n) for n in range(len(mine))])
    assert sorted({me for me, _ in answers} - {None}) == sorted({p for ps in players for p in ps})


def _collectives() -> Any:
    from rest_mega.trainer import parallel as places

    place = places.start(ParallelConfig(tensor=2), "cpu")
    rank, answer = place.rank, {}
    answer["share"] = place.share(
        {"a": np.arange(3), "b": np.zeros((0, 2))} if not rank else None, 0
    )
    answer["text"] = place.gather_text(["", "größer \U0001f600"][rank])
    answer["empty"] = place.gather_text("")
    mine = {"both": (1.0 + rank, 2.0), f"only {rank}": (5.0, 4.0), "none": (0.0, 0.0)}
    answer["merge"] = place.merge(mine)
    answer["sum"] = place.sum(np.array([0.1, rank])).tolist()
    answer["sum_one"] = place.sum_one(rank + 0.5)
    answer["maximum"] = place.maximum(np.array([-1.0 - rank, rank])).tolist()
    try:
        place.share({"object": np.array([{"not": "plain"}])} if not rank else None, 0)
    except ValueError as error:
        answer["refusal"] = str(error)
    return answer


def test_collectives_give_every_rank_the_same_and_nothing_is_unpickled() -> None:
    answers = run_ranks(_collectives, 2)
    for answer in answers:
        np.testing.assert_array_equal(answer["share"]["a"], np.arange(3))
        assert answer["share"]["b"].shape == (0, 2)
        assert answer["text"] == ["", "größer \U0001f600"]
        assert answer["empty"] == ["", ""]
        assert answer["merge"] == {"both": 0.75, "only 0": 1.25, "only 1": 1.25}
        assert answer["sum"] == [0.2, 1.0]
        assert answer["sum_one"] == 2.0
        assert answer["maximum"] == [-1.0, 1.0]
        assert "allow_pickle=False" in answer["refusal"]
