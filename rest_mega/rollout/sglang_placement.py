"""Which GPUs of this machine each server of a player gets: GPUs of its own, or its replica's.

GPUs are numbered as the run sees them: rank r of the machine trains on GPU r.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rest_mega.config import SglangConfig, require

Gpus = tuple[int, ...]
VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Machine:
    """What a player must know of its machine; built by all ranks from all ranks' rows."""

    visible: int
    """GPUs that the run sees here."""
    training: Gpus
    """Those that ranks of the run train on."""
    replica: Gpus
    """Those of them that belong to the player's replica, in rank order."""
    players: int
    """Players on this machine."""
    index: int
    """Which of them this one is; -1 for a rank that is none."""
    idle: int = 0
    """Machines of the run that have no player."""

    @classmethod
    def of(cls, rows: Sequence[str], rank: int, visible: int) -> Machine:
        """From the `row` of every rank, in rank order."""
        ranks = [json.loads(row) for row in rows]
        me = ranks[rank]
        here = [r for r in ranks if r["machine"] == me["machine"]]
        players = [r for r in here if r["plays"]]
        sampling = {r["machine"] for r in ranks if r["plays"]}
        return cls(
            visible,
            tuple(r["gpu"] for r in here),
            tuple(r["gpu"] for r in here if r["replica"] == me["replica"]),
            len(players),
            players.index(me) if me["plays"] else -1,
            len({r["machine"] for r in ranks} - sampling),
        )


def row(machine: str, gpu: int, plays: bool, replica: int) -> str:
    """One rank, as text that ranks can gather."""
    return json.dumps({"machine": machine, "gpu": gpu, "plays": plays, "replica": replica})


def place_servers(config: SglangConfig, machine: Machine, device: str) -> list[Gpus]:
    """The GPUs of each server that a player starts; empty tuples where that is not ours to say: on
    a CPU, or where the user has set CUDA_VISIBLE_DEVICES for the servers. ConfigError when the
    config's GPUs do not fit the machine."""
    if config.urls:
        return []
    by_hand = VARIABLE in config.environment
    if device == "cpu" or by_hand:
        why = f"rollout.sglang.environment.{VARIABLE} is set" if by_hand else "the run is on a CPU"
        require(
            not config.gpus, f"rollout.sglang.gpus={list(config.gpus)}, but {why}: set one of them"
        )
        return [()] * config.servers
    gpus = _shared(config, machine) if config.colocate else _split(config, machine)
    width = config.gpus_per_server
    return [gpus[n * width : (n + 1) * width] for n in range(config.servers)]


def _shared(config: SglangConfig, machine: Machine) -> Gpus:
    """The replica's own GPUs."""
    need = config.servers * config.gpus_per_server
    require(
        need <= len(machine.replica),
        f"rollout.sglang.colocate=true with servers={config.servers} of {config.gpus_per_server} "
        f"GPUs needs {need}, but the replica has {len(machine.replica)} on this machine: lower "
        "servers or tp_size, or give servers GPUs of their own with rollout.sglang.gpus",
    )
    return machine.replica[:need]


def _split(config: SglangConfig, machine: Machine) -> Gpus:
    """This player's share of `gpus`."""
    gpus, need = config.gpus, config.servers * config.gpus_per_server
    free = [gpu for gpu in range(machine.visible) if gpu not in machine.training]
    require(
        bool(gpus),
        "rollout.sglang starts servers and does not say on which GPUs: set rollout.sglang.gpus "
        f"(free here: {free}), rollout.sglang.colocate=true, or name running servers in "
        "rollout.sglang.urls",
    )
    wrong = [gpu for gpu in gpus if gpu >= machine.visible]
    require(
        not wrong,
        f"rollout.sglang.gpus has {wrong}, but this machine shows GPUs 0 to {machine.visible - 1}",
    )
    taken = sorted(set(gpus) & set(machine.training))
    require(
        not taken,
        f"rollout.sglang.gpus has {taken}, on which ranks of the run train: free are {free}; start "
        "fewer ranks, or share the GPUs with rollout.sglang.colocate=true",
    )
    require(
        len(gpus) == machine.players * need,
        f"rollout.sglang.gpus={list(gpus)} are {len(gpus)} GPUs, but {machine.players} replicas of "
        f"this machine with servers={config.servers} of {config.gpus_per_server} GPUs each need "
        f"{machine.players * need}",
    )
    return gpus[machine.index * need : (machine.index + 1) * need]
