"""The helper that runs distributed tests tells results, failures and silence apart."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.ranks import RankError, run_ranks

pytestmark = pytest.mark.distributed


def _sum_of_ranks(offset: int) -> int:
    import torch
    import torch.distributed as dist

    from rest_mega import launch

    launch.keep_gloo_on_loopback()
    dist.init_process_group(
        "gloo", launch.rendezvous(), rank=launch.rank(), world_size=launch.world_size()
    )
    total = torch.tensor([launch.rank() + offset])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def _fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one has had enough")


def _hang_on_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def test_results_come_in_rank_order_and_ranks_talk() -> None:
    assert run_ranks(_sum_of_ranks, 3, 10) == [33, 33, 33]


def test_a_failing_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*rank one has had enough"):
        run_ranks(_fail_on_one, 2)


def test_a_silent_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"rank\(s\) \[1\] within 3 s"):
        run_ranks(_hang_on_one, 2, timeout=3)
