"""Servers and ranks on the GPUs of a machine: every GPU has one use, or the config is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.config import ConfigError, SglangConfig
from rest_mega.rollout.sglang_placement import Machine, place_servers, row

ONE_LEAD = Machine(visible=8, training=(0, 1, 2, 3), replica=(0, 1, 2, 3), players=1, index=0)


def run_of(nodes: int, replicas: int, ranks: int) -> list[str]:
    """Rows of a run whose replicas of `ranks` ranks follow each other on each of the nodes."""
    return [
        row(f"node{node}", replica * ranks + r, r == 0, node * replicas + replica)
        for node in range(nodes)
        for replica in range(replicas)
        for r in range(ranks)
    ]


@given(*[st.integers(1, 3) for _ in range(5)])
def test_each_gpu_is_trained_on_or_served_from_once(
    nodes: int, replicas: int, ranks: int, servers: int, tensor: int
) -> None:
    rows, train = run_of(nodes, replicas, ranks), replicas * ranks
    serve = replicas * servers * tensor
    gpus = tuple(range(train, train + serve))
    config = SglangConfig(gpus=gpus, servers=servers, arguments={"tp_size": tensor})
    for node in range(nodes):
        given_out: list[int] = []
        for lead in range(replicas):
            rank = (node * replicas + lead) * ranks
            machine = Machine.of(rows, rank, train + serve)
            placed = place_servers(config, machine, "cuda")
            assert [len(one) for one in placed] == [tensor] * servers
            given_out += [gpu for one in placed for gpu in one]
        assert given_out == list(gpus)


def test_machines_without_a_player_are_counted() -> None:
    rows = [row(f"node{n // 2}", n % 2, n in (0, 3), n // 3) for n in range(6)]
    assert [Machine.of(rows, rank, 2).idle for rank in (0, 5)] == [1, 1]
    assert Machine.of(run_of(2, 1, 2), 0, 2).idle == 0


def test_colocated_servers_lie_on_their_own_replicas_gpus() -> None:
    rows = run_of(nodes=2, replicas=2, ranks=4)
    config = SglangConfig(colocate=True, servers=2, arguments={"tensor_parallel_size": 2})
    found = [place_servers(config, Machine.of(rows, rank, 8), "cuda") for rank in (0, 4, 8, 12)]
    assert found == [[(0, 1), (2, 3)], [(4, 5), (6, 7)]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"does not say on which GPUs.*free here: \[4, 5, 6, 7\].*colocate=true.*urls"),
        ({"gpus": (7, 8)}, r"gpus has \[8\], but this machine shows GPUs 0 to 7"),
        ({"gpus": (3, 4)}, r"gpus has \[3\], on which ranks.*free are \[4, 5, 6, 7\]"),
        (
            {"gpus": (4, 5, 6), "servers": 2},
            "are 3 GPUs, but 1 replicas .* servers=2 of 1 .* need 2",
        ),
        ({"colocate": True, "servers": 3, "arguments": {"tp_size": 2}}, "needs 6, but .* has 4"),
        ({"gpus": (4,), "environment": {"CUDA_VISIBLE_DEVICES": "4"}}, "VISIBLE_DEVICES is set"),
    ],
)
def test_what_does_not_fit_the_machine_is_refused_with_the_way_out(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        place_servers(SglangConfig(**settings), ONE_LEAD, "cuda")


def test_gpus_of_a_run_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus=\[1\], but the run is on a CPU"):
        place_servers(SglangConfig(gpus=(1,)), ONE_LEAD, "cpu")


def test_nothing_is_placed_where_it_is_not_ours_to_say() -> None:
    by_hand = SglangConfig(servers=2, environment={"CUDA_VISIBLE_DEVICES": "4"})
    assert place_servers(by_hand, ONE_LEAD, "cuda") == [(), ()]
    assert place_servers(SglangConfig(colocate=True), ONE_LEAD, "cpu") == [()]
    assert place_servers(SglangConfig(urls=("http://h:1",)), ONE_LEAD, "cuda") == []
