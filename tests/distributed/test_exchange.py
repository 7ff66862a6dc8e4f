"""What a lead shares arrives on its replica's ranks as it was, as plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rest_mega.config import ParallelConfig
from rest_mega.records import Sample
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _shared(parallel: ParallelConfig) -> Any:
    """What every rank gets of: samples, none, a stop; of its lead's replica."""
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.exchange import share_samples

    place = places.start(parallel, "cpu")
    return [
        share_samples(place, given if place.is_lead else None)
        for given in (random_samples(6, seed=place.data_rank), [], None, random_samples(1))
    ]


def assert_equal(got: list[Sample], want: list[Sample]) -> None:
    for one, other in zip(got, want, strict=True):
        for name in ("ids_T", "mask_T", "regions_T", "logprobs_T"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        for name in ("advantage", "reward", "group"):
            assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize(
    ("parallel", "replica"),
    [(ParallelConfig(tensor=2), [0, 0]), (ParallelConfig(), [0, 1])],
    ids=["one replica of two ranks", "two replicas"],
)
def test_samples_none_and_a_stop_arrive_on_all_ranks_of_the_replica(
    parallel: ParallelConfig, replica: list[int]
) -> None:
    for got, data_rank in zip(run_ranks(_shared, 2, parallel), replica, strict=True):
        samples, none, stop, one = got
        assert_equal(samples, random_samples(6, seed=data_rank))
        assert (none, stop) == ([], None)
        assert_equal(one, random_samples(1))


def _collectives() -> Any:
    from rest_mega.trainer import parallel as places

    place = places.start(ParallelConfig(tensor=2), "cpu")
    rank, answer = place.rank, {}
    answer["share"] = place.share({"a": np.arange(3), "b": np.zeros((0, 2))} if not rank else None)
    answer["text"] = place.gather_text(["", "größer \U0001f600"][rank])
    answer["empty"] = place.gather_text("")
    mine = {"both": (1.0 + rank, 2.0), f"only {rank}": (5.0, 4.0), "none": (0.0, 0.0)}
    answer["merge"] = place.merge(mine)
    answer["sum"] = place.sum(np.array([0.1, rank])).tolist()
    answer["sum_one"] = place.sum_one(rank + 0.5)
    answer["maximum"] = place.maximum(np.array([-1.0 - rank, rank])).tolist()
    try:
        place.share({"object": np.array([{"not": "plain"}])} if not rank else None)
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
