"""The engine's share of the memory: what the plan says, by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rest_mega.cli import read
from rest_mega.config import ConfigError, RunConfig
from rest_mega.planning import GPUS, Plan, plan
from rest_mega.planning.engine import cache_bytes, played_stages, with_servers
from rest_mega.planning.layouts import propose
from rest_mega.trainer.model import Architecture, read_architecture

ROOT = Path(__file__).parents[3]
ROOM = 0.92 * 80e9
PARAMETERS = 8_190_735_360
"""Of Qwen3-8B."""


def recipe(name: str, *words: str) -> tuple[RunConfig, Architecture]:
    config = read(["train", str(ROOT / "examples" / "recipes" / f"{name}.yaml"), *words])[1]
    return config, read_architecture(config.model.path)


def made(name: str, ranks: int, *words: str) -> Plan:
    return plan(*recipe(name, *words), "h100-80g", ranks)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_token_caches_keys_and_values_of_every_layer() -> None:
    """Qwen3-8B: 36 layers, 8 key-value heads of 128, two bytes each; not cut below one head."""
    a = recipe("qwen3_8b")[1]
    assert cache_bytes(a, 1, 1, 2) == 2 * 36 * 8 * 128 * 2
    assert cache_bytes(a, 4, 1, 2) == 2 * 36 * 2 * 128 * 2
    assert cache_bytes(a, 16, 1, 2) == 2 * 36 * 1 * 128 * 2
    assert cache_bytes(a, 4, 2, 1) == 2 * 18 * 2 * 128 * 1


def test_a_colocated_engine_has_its_share_of_what_the_trainer_leaves() -> None:
    """Bytes a parameter of a rank: 2 + 4 + 12 / DP; SGLang gets 0.6 of the rest."""
    planned = made("qwen3_8b", 8)
    e, state = planned.engine, planned.stages[0].state
    assert state == pytest.approx(PARAMETERS / 4 * (2 + 4 + 12 / 2), rel=1e-3)
    assert e.free == ROOM - state
    assert e.weights == PARAMETERS * 2 / 4
    assert e.cache == 0.6 * e.free - e.weights
    assert e.sequences == int(e.cache // (36_864 * 4096))
    needs = {phase.name: phase.need for phase in planned.phases}
    assert needs["training"] == planned.memory.total + e.resting
    assert needs["rollout"] == pytest.approx(state + (e.weights + 36_864 * 4096) / 0.6)
    assert [phase.need for phase in planned.phases] == sorted(needs.values(), reverse=True)


def test_a_rollout_that_does_not_fit_is_told_apart_from_training() -> None:
    low = made("qwen3_8b", 8, "rollout.sglang.mem_fraction_static=0.05")
    assert (low.fits, low.phases[0].name, low.engine.sequences) == (False, "rollout", 0)
    assert "mem_fraction_static=0.09 or more" in low.phases[0].remedy
    assert made("qwen3_8b", 8, "rollout.sglang.mem_fraction_static=0.09").engine.sequences > 0
    narrow = made("qwen3_14b", 4, "rollout.sglang.tp_size=1")
    assert (narrow.fits, narrow.phases[0].name) == (False, "rollout")
    assert "tp_size" in narrow.phases[0].remedy


def test_an_engine_apart_has_gpus_of_its_own() -> None:
    planned = made("qwen3_8b_split", 4)
    e = planned.engine
    assert (e.placement, e.servers, e.gpus, e.free, e.resting) == ("apart", 1, 4, ROOM, 0.0)
    needs = {phase.name: phase.need for phase in planned.phases}
    assert needs["training"] == planned.memory.total
    assert needs["rollout"] == pytest.approx((e.weights + 36_864 * 4096) / e.share)


def test_the_limits_of_a_server_hold() -> None:
    most = made("qwen3_8b", 8, "rollout.sglang.max_total_tokens=8192").engine
    assert (most.sequences, most.cache) == (2, 8192 * 36_864)
    assert made("qwen3_8b", 8, "rollout.sglang.max_running_requests=7").engine.sequences == 7
    half = made("qwen3_8b", 8, "rollout.sglang.kv_cache_dtype=fp8_e5m2").engine
    assert half.token == 36_864 / 2


def test_the_embedded_engine_keeps_a_whole_copy_in_training() -> None:
    planned = made("qwen3_1.7b", 8, "rollout.engine=embedded")
    needs = {phase.name: phase.need for phase in planned.phases}
    assert needs["training"] == planned.memory.total + planned.engine.weights
    assert planned.engine.weights == planned.parameters * 2


@pytest.mark.parametrize(
    ("sizes", "world", "stages"),
    [
        ({"tensor": 4}, 8, [[0, 0, 0, 0]]),
        ({"pipeline": 4}, 16, [[0, 1], [2, 3]]),  # ranks 0, 4, 8, 12
        ({"tensor": 2, "pipeline": 4}, 32, [[0, 0], [1, 1], [2, 2], [3, 3]]),
        ({"tensor": 2, "pipeline": 2}, 4, [[0, 0, 1, 1]]),
        ({"tensor": 4, "pipeline": 3}, 12, [[0, 0, 0, 0, 1, 1, 1, 1]]),  # and four of stage 2
    ],
)
def test_a_replica_plays_on_each_of_its_machines(
    sizes: dict[str, int], world: int, stages: list[list[int]]
) -> None:
    config = recipe("qwen3_8b")[0]
    parallel = dataclasses.replace(config.parallel, sequence=False, **({"tensor": 1} | sizes))
    config = dataclasses.replace(config, parallel=parallel)
    assert played_stages(config, world, 8) == stages


def test_an_engine_on_every_machine_of_a_replica_is_counted() -> None:
    """Llama 3.3 70B at PP 4 on 32 GPUs: a server on each of the four machines of its replica."""
    planned = made("llama3.3_70b", 32)
    sizes, e = planned.config.parallel, planned.engine
    assert (sizes.tensor * sizes.context, sizes.pipeline, planned.batch.replicas) == (8, 4, 1)
    assert (e.servers, e.gpus, e.stages) == (4, 8, frozenset(range(4)))
    assert e.free == ROOM - max(stage.state for stage in planned.stages)
    words = ("rollout.sglang.colocate=false", 'rollout.sglang.urls=["http://h:1"]')
    assert made("llama3.3_70b", 32, *words).engine.servers == 1


def test_servers_that_need_more_gpus_than_a_replica_has_here_are_refused() -> None:
    words = ("rollout.sglang.servers=2",)
    with pytest.raises(ConfigError, match="needs 8, but a replica has 4"):
        made("qwen3_8b", 8, *words)


def test_proposed_layouts_have_servers_that_fit(tmp_path: Any) -> None:
    """A server of two GPUs cannot hold Qwen3-30B-A3B beside the trainer: wider ones are found."""
    config, a = recipe("qwen3_30b_a3b", "rollout.sglang.tp_size=2")
    best, _ = propose(config, a, GPUS["h100-80g"], 16)
    assert best[0].fits
    assert best[0].engine.gpus > 2
    assert all(one.engine.servers * one.engine.gpus <= 16 for one in best)
    narrow = dataclasses.replace(config.parallel, tensor=1, sequence=False)
    found = with_servers(dataclasses.replace(config, parallel=narrow), a, GPUS["h100-80g"], 16)
    assert found.rollout.sglang.gpus_per_server == 1
