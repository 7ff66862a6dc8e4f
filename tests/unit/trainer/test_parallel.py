"""Where ranks meet, and which of them play."""

from __future__ import annotations

import pytest

from rest_mega.config import ConfigError
from rest_mega.trainer import parallel


def test_ranks_that_are_started_anew_do_not_meet_in_the_store_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parallel.meet(1.0)


@pytest.mark.parametrize(
    ("replicas", "per_machine", "players"),
    [
        ([[0, 1, 2, 3]], 8, (0,)),
        ([[0, 1], [2, 3]], 4, (0, 2)),
        ([[0, 1, 2, 3]], 2, (0, 2)),
        ([[0, 2], [1, 3]], 2, (0, 1, 2, 3)),  # a stage on each machine
        ([[0, 1, 4, 5], [2, 3, 6, 7]], 4, (0, 2, 4, 6)),
        ([[0, 1, 2], [3, 4, 5]], 2, (0, 3)),  # two ranks and one
        ([[0, 1], [2, 3], [4, 5]], 3, (0, 2, 4)),  # the second on two machines
    ],
)
def test_a_replica_has_a_player_on_each_machine_where_all_are_cut_alike(
    replicas: list[list[int]], per_machine: int, players: tuple[int, ...]
) -> None:
    machines = {rank: f"m{rank // per_machine}" for ranks in replicas for rank in ranks}
    assert parallel.find_players(replicas, machines) == players
