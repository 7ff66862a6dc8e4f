"""The plan's order of passes is that of megatron-core's own schedules on real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rest_mega.planning.schedule import in_flight, order
from rest_mega.records import Sample
from tests.support.bench import Bench
from tests.support.models import save_model
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

CASES = [
    (stages, chunks, microbatches)
    for stages in (2, 4)
    for chunks in (1, 2)
    for microbatches in (4, 8, 12)
]
LENGTH = 17
"""Tokens of a sample, the first of which is never predicted: one fills a micro-batch."""


def sample(number: int) -> Sample:
    ids = np.arange(LENGTH, dtype=np.int32) + number
    return Sample(
        ids_T=ids,
        mask_T=ids > number,
        regions_T=np.zeros(LENGTH, np.int8),
        logprobs_T=np.zeros(LENGTH, np.float32),
        version_T=np.zeros(LENGTH, np.int32),
        advantage=1.0,
        group=number,
    )


def passes(case: Any, stages: int, chunks: int, microbatches: int) -> list[tuple[bool, int, int]]:
    """(is forward, chunk, micro-batch) of every pass of this rank in one optimizer step, as its
    chunks saw them."""
    bench = Bench(case, pipeline=stages, virtual_pipeline=chunks)
    trainer = bench.trainer(tokens=LENGTH - 1)
    (batches,) = trainer.pack([sample(n) for n in range(microbatches)])
    assert len(batches) == microbatches
    seen: list[tuple[bool, int, int]] = []

    def watch(chunk: int, module: Any) -> None:
        count = 0

        def forward(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal count
            number, count = count, count + 1
            seen.append((True, chunk, number))
            output.register_hook(lambda _: seen.append((False, chunk, number)))

        module.register_forward_hook(forward)

    for chunk, module in enumerate(trainer.modules):
        watch(chunk, module)
    trainer.supervised_step(batches)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """The passes of every rank of every case."""
    from rest_mega.trainer.model import read_architecture

    path = tmp_path_factory.mktemp("model") / "eight"
    save_model(path, "qwen3", num_hidden_layers=8)
    model = str(path), read_architecture(str(path))
    found: dict[Any, list[Any]] = {}
    for stages in (2, 4):
        mine = [case for case in CASES if case[0] == stages]
        ranks = run_ranks(in_turn, stages, [(str(c), model, *c) for c in mine], passes)
        found |= {case: [answers[n] for answers in ranks] for n, case in enumerate(mine)}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"PP {c[0]} VPP {c[1]} x {c[2]}")
def test_ranks_go_through_their_passes_in_the_planned_order(case: Any, seen: Any) -> None:
    for stage, found in enumerate(seen[case]):
        assert found == order(stage, *case), f"stage {stage}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"PP {c[0]} VPP {c[1]} x {c[2]}")
def test_ranks_hold_as_many_micro_batches_as_planned(case: Any, seen: Any) -> None:
    for stage, found in enumerate(seen[case]):
        held = np.cumsum([1 if is_forward else -1 for is_forward, _, _ in found])
        assert max(held) == in_flight(stage, *case), f"stage {stage}"
