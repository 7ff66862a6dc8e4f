"""ParallelConfig and torchrun's variables -> Parallel: groups, ranks, players. Sole reader of
mcore's parallel_state.

A *replica* is one TP x CP x PP block that holds one copy of the model. Its *players*, the first of
its ranks on each machine, talk to the rollout engines and to the tools there; its *lead*, the first
of all, is one of them and speaks for it. Groups made here:

- mcore's own groups (TP, PP, DP, ...) carry tensors of the training step: gloo on a CPU, NCCL on
  GPUs;
- `control` (all ranks) and `replica` are gloo and carry small host data, so that NCCL's watchdog
  never times a rollout.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from rest_mega import launch
from rest_mega.config import ConfigError, DeadlineConfig, ParallelConfig, require
from rest_mega.trainer import device as devices

Arrays = Mapping[str, npt.NDArray[Any]]
Sums = Mapping[str, tuple[float, float]]
"""Name -> (total, count): what a mean needs to be merged over ranks."""

_CLOCK_ROUNDS, _CLOCK_NOISE_S = 7, 0.005


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the run, and the few collectives that the loop needs."""

    config: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    groups: Any
    """mcore's ProcessGroupCollection."""
    replica: dist.ProcessGroup
    control: dist.ProcessGroup
    replica_ranks: tuple[int, ...]
    players: tuple[int, ...]
    """Global ranks of all players; those of replica r of n stand at r, r + n, r + 2 n, ..."""
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    """Index of this rank's replica."""
    data_size: int
    """Number of replicas."""
    waits: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of this rank's host collectives by its own clock, in seconds since the epoch:
    they carry little, so their time is that of waiting for peers. Emptied by `take_waits`."""

    @property
    def lead(self) -> int:
        """Global rank of this replica's lead."""
        return self.replica_ranks[0]

    @property
    def is_lead(self) -> bool:
        """True on the rank that speaks for this replica."""
        return self.rank == self.lead

    @property
    def is_player(self) -> bool:
        """True on a rank that talks to an engine."""
        return self.rank in self.players

    @property
    def player(self) -> int:
        """Which of the players this rank is; ValueError on ranks that are none."""
        return self.players.index(self.rank)

    @property
    def is_head(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding is."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the LM head and the loss are."""
        return self.pipeline_rank == self.config.pipeline - 1

    @property
    def counts_tokens(self) -> bool:
        """True on one tensor rank of each last stage: the ranks whose per-token sums add up to the
        batch."""
        return self.is_last_stage and self.tensor_rank == 0

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Element-wise sum over all ranks (float64)."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def sum_in_replica(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Element-wise sum over the ranks of this replica (float64)."""
        return self._reduce(values, dist.ReduceOp.SUM, self.replica)

    def sum_one(self, value: float) -> float:
        """Sum of one number over all ranks."""
        return float(self.sum(np.array([float(value)]))[0])

    def maximum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Element-wise maximum over all ranks (float64)."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(
        self, values: npt.NDArray[np.float64], op: Any, group: dist.ProcessGroup | None = None
    ) -> npt.NDArray[np.float64]:
        tensor = torch.from_numpy(np.array(values, dtype=np.float64))
        with self._waiting():
            dist.all_reduce(tensor, op=op, group=group or self.control)
        return tensor.numpy()

    def share(self, arrays: Arrays | None, source: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of `source`, a rank of this replica, on every rank of it; others pass None. No
        pickle crosses the wire."""
        mine = self.rank == source
        data = _pack(arrays) if mine and arrays is not None else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()], dtype=torch.int64)
        with self._waiting():
            dist.broadcast(size, source, group=self.replica)
        if not mine:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, source, group=self.replica)
        return _unpack(data)

    def gather_text(self, text: str, group: dist.ProcessGroup | None = None) -> list[str]:
        """Every rank's text, in rank order, on every rank of `group` (default: all ranks)."""
        with self._waiting():
            return _gather_text(text, group or self.control)

    def merge(self, sums: Sums) -> dict[str, float]:
        """Means over all ranks' (total, count) pairs, on every rank; names need not be the same on
        all ranks."""
        merged: dict[str, tuple[float, float]] = {}
        for text in self.gather_text(json.dumps(sums)):
            for name, (total, count) in json.loads(text).items():
                before = merged.get(name, (0.0, 0.0))
                merged[name] = (before[0] + total, before[1] + count)
        return {name: total / count for name, (total, count) in merged.items() if count > 0}

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self._waiting():
            dist.barrier(group=self.control)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        begin = time.time()
        yield
        self.waits.append((begin, time.time()))

    def take_waits(self) -> list[tuple[float, float]]:
        """What was waited since the last call."""
        taken, self.waits[:] = list(self.waits), []
        return taken

    def clock_offset(self) -> float:
        """How far this rank's clock is ahead of rank 0's, in seconds: the median over a few
        barriers, which all ranks leave at nearly one moment; 0 below what that moment lasts.
        Collective."""
        left = np.zeros((_CLOCK_ROUNDS, self.world_size))
        for row in left:
            self.barrier()
            row[self.rank] = time.time()
        left = self.sum(left)
        offset = float(np.median(left[:, self.rank] - left[:, 0]))
        return offset if abs(offset) > _CLOCK_NOISE_S else 0.0


def _gather_text(text: str, group: dist.ProcessGroup) -> list[str]:
    size = dist.get_world_size(group)
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([data.numel()]), group=group)
    longest = max(1, *(int(n) for n in lengths))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - data.numel())), group=group)
    return [bytes(p[: int(n)].numpy()).decode() for p, n in zip(parts, lengths, strict=True)]


def _pack(arrays: Arrays) -> torch.Tensor:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpack(data: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(data.numpy().tobytes()), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def meet(seconds: float) -> distributed_c10d.Store:
    """The small key-value store that all ranks of the run share. TimeoutError when it, or on the
    rank that holds it another rank, is not there within `seconds`. ConfigError where it could hold
    what ranks before these have said."""
    require(
        not launch.store_outlives_ranks(),
        "torchrun --max-restarts starts ranks anew in a store that still knows those before: set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on every machine",
    )
    launch.keep_gloo_on_loopback()
    rank, size, deadline = launch.rank(), launch.world_size(), datetime.timedelta(seconds=seconds)
    try:
        store, _, _ = next(rendezvous(launch.rendezvous(), rank, size, timeout=deadline))
    except dist.DistError as error:
        raise TimeoutError(str(error).splitlines()[0]) from error
    store.set_timeout(deadline)
    return cast(distributed_c10d.Store, store)


def start(
    config: ParallelConfig,
    device_name: str,
    deadlines: DeadlineConfig | None = None,
    store: distributed_c10d.Store | None = None,
    *,
    leads_play: bool = False,
) -> Parallel:
    """Join the run: process groups, mcore's parallel state, this rank's device. `store`: what
    `meet` gave, where the ranks have met already. `leads_play`: a replica's lead is its one player,
    however many machines the replica spans.

    ConfigError when the world size does not fit the parallel sizes or the device is not there.
    """
    config.data_parallel(launch.world_size())
    devices.adapt_mcore()
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank())
    else:
        torch.set_num_threads(1)
    device = devices.resolve(device_name)
    deadline = datetime.timedelta(seconds=(deadlines or DeadlineConfig()).collective)
    if not dist.is_initialized():
        _join(device, deadline, store or meet((deadlines or DeadlineConfig()).join))
    _model_parallel(config, deadline)
    return _place(config, device, deadline, leads_play)


def stop() -> None:
    """Leave the run: destroy mcore's groups and torch's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(
    device: torch.device, deadline: datetime.timedelta, store: distributed_c10d.Store
) -> None:
    dist.init_process_group(
        devices.backend(device),
        store=distributed_c10d.PrefixStore("groups", store),
        rank=launch.rank(),
        world_size=launch.world_size(),
        timeout=deadline,
    )


def _model_parallel(config: ParallelConfig, deadline: datetime.timedelta) -> None:
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        raise ConfigError(
            "model parallel groups exist already: call parallel.stop() before starting anew"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline
        if config.virtual_pipeline > 1
        else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(deadline.total_seconds() / 60),
        create_gloo_process_groups=False,
    )
    # mcore forks this stream around its parallel regions; with dropout 0 nothing is drawn from it.
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def find_players(replicas: Sequence[Sequence[int]], machines: Mapping[int, str]) -> tuple[int, ...]:
    """The first rank of each replica on each of its machines, in the order of `Parallel.players`.

    `replicas`: their global ranks; `machines`: of every one of these. Only the leads where the
    replicas are not cut alike, each into equal parts by its machines: their players would sample
    unequal shares.
    """
    cuts = []
    for ranks in replicas:
        parts: dict[str, list[int]] = {}
        for rank in ranks:
            parts.setdefault(machines[rank], []).append(rank)
        cuts.append(list(parts.values()))
    alike = len({len(cut) for cut in cuts}) == len({len(part) for cut in cuts for part in cut}) == 1
    firsts = [[part[0] for part in (cut if alike else cut[:1])] for cut in cuts]
    return tuple(rank for column in zip(*firsts, strict=True) for rank in column)


def _place(
    config: ParallelConfig, device: torch.device, deadline: datetime.timedelta, leads_play: bool
) -> Parallel:
    from megatron.core import parallel_state as state
    from megatron.core.process_groups_config import ProcessGroupCollection

    control = dist.new_group(backend="gloo", timeout=deadline)
    data_rank = state.get_data_parallel_rank()
    everyone = torch.zeros(launch.world_size(), dtype=torch.int64)
    everyone[launch.rank()] = data_rank
    dist.all_reduce(everyone, group=control)
    replicas = [
        tuple(torch.nonzero(everyone == r).flatten().tolist())
        for r in range(int(everyone.max()) + 1)
    ]
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=deadline) for ranks in replicas]
    machines = dict(enumerate(_gather_text(launch.machine(), control)))
    leads = tuple(ranks[0] for ranks in replicas)
    return Parallel(
        config=config,
        device=device,
        rank=launch.rank(),
        world_size=launch.world_size(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        replica=groups[data_rank],
        control=control,
        replica_ranks=replicas[data_rank],
        players=leads if leads_play else find_players(replicas, machines),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        context_rank=state.get_context_parallel_rank(),
        data_rank=data_rank,
        data_size=state.get_data_parallel_world_size(),
    )
