"""One rank of a run of any size, in one process: groups without peers, a model without memory."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rest_mega.config import ParallelConfig
from rest_mega.trainer import device as devices
from rest_mega.trainer import parallel as places
from rest_mega.trainer.parallel import Parallel


@contextlib.contextmanager
def rank_of(config: ParallelConfig, rank: int, world: int) -> Iterator[Parallel]:
    """Rank `rank` of `world` on the meta device: mcore's groups for that rank over torch's fake
    backend, whose collectives move nothing. No other process group may exist."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    devices.adapt_mcore()
    store = FakeStore()
    dist.init_process_group("fake", rank=rank, world_size=world, store=store)
    try:
        places._model_parallel(config, datetime.timedelta(seconds=60))
        groups = ProcessGroupCollection.use_mpu_process_groups()
        everyone = dist.group.WORLD
        assert everyone is not None
        with torch.device("meta"):
            yield Parallel(
                config=config,
                device=torch.device("meta"),
                rank=rank,
                world_size=world,
                groups=groups,
                replica=everyone,
                control=everyone,
                replica_ranks=(rank,),
                players=(rank,),
                tensor_rank=groups.tp.rank(),
                pipeline_rank=groups.pp.rank(),
                context_rank=groups.cp.rank(),
                data_rank=groups.dp.rank(),
                data_size=groups.dp.size(),
            )
    finally:
        places.stop()


def leave_out_experts(chunks: Sequence[Any]) -> None:
    """Every mixture of experts hands on what it gets: its tokens choose experts by their values,
    which there are none of."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.forward = lambda hidden, *_, **__: (hidden, None)
