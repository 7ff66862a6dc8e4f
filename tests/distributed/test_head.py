"""The head over several ranks equals the head over one, with one collective in each direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ranks import run_ranks
from tests.unit.losses.test_head import (
    assert_same,
    assert_same_rows,
    by_definition,
    by_rows,
    exact_case,
    largest,
    rows_by_definition,
    without_offset,
)

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[tuple[int, ...], int]] = {
    "unequal shards": ((100, 31, 400), 531),
    "padding inside the last shard": ((256, 256, 256), 600),
    "shards that are all padding": ((128, 128, 128), 100),
    "more than a tile each": ((2049, 2500, 2048), 6597),
}
"""Rows of the vocabulary on each rank, and how many of all are real."""


def a_case(name: str, ranks: int) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """The whole problem, where each rank's shard begins, and the real vocabulary."""
    sizes, real = CASES[name]
    sizes = sizes[:ranks]
    case = exact_case(rows=21, vocab=sum(sizes), offset=500.0 if "unequal" in name else 0.0)
    real = min(real, sum(sizes))
    case["targets"] %= real
    return case, [sum(sizes[:r]) for r in range(ranks + 1)], real


class Collectives(TorchDispatchMode):
    """Names the operations of torch.distributed that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append(func.name().removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def head_answers(ranks: int, reduce: bool, form: str = "auto") -> dict[str, Any]:
    """On a rank: (outputs and gradients, collectives forward, collectives backward) of every
    case."""
    import torch.distributed as dist

    from rest_mega import launch
    from rest_mega.losses.head import linear_logprob_entropy

    launch.keep_gloo_on_loopback()
    me = launch.rank()
    dist.init_process_group("gloo", launch.rendezvous(), rank=me, world_size=ranks)
    answers = {}
    for name in CASES:
        case, bounds, real = a_case(name, ranks)
        hidden = case["hidden"].clone().requires_grad_()
        weight = case["weight"][bounds[me] : bounds[me + 1]].clone().requires_grad_()
        with Collectives() as forward:
            logprob, entropy = linear_logprob_entropy(
                hidden, weight, case["targets"], group=dist.group.WORLD,
                temperature=0.5, vocab_start=bounds[me], vocab_size=real, reduce_hidden_grad=reduce,
                form=form,
            )  # fmt: skip
            value = (logprob * case["d_logprob"]).sum() + (entropy * case["d_entropy"]).sum()
        with Collectives() as backward:
            value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        tensors = (logprob.detach(), entropy.detach(), hidden.grad, weight.grad)
        answers[name] = ([t.numpy() for t in tensors], forward.seen, backward.seen)
    dist.destroy_process_group()
    return answers


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequal_shards_agree_with_fp64_and_talk_once_in_each_direction(
    ranks: int,
) -> None:
    assert_agreed(run_ranks(head_answers, ranks, ranks, True))


def assert_agreed(answers: list[Any]) -> None:
    """What ranks made by `head_answers` is that of fp64, with one collective in each direction."""
    for name in CASES:
        case, bounds, real = a_case(name, len(answers))
        want = without_offset(by_definition(case, temperature=0.5, vocab_size=real))
        for rank, answer in enumerate(answers):
            got, forward, backward = answer[name]
            logprob, entropy, d_hidden, d_weight = map(torch.from_numpy, got)
            mine = want[3][bounds[rank] : bounds[rank + 1]]
            assert largest(d_weight - mine) <= 2e-6 * largest(want[3]), (name, rank)
            assert_same(without_offset((logprob, entropy, d_hidden, want[3])), want)
            assert forward == ["_allgather_base_"]
            assert backward == ["allreduce_"]


def test_a_caller_that_sums_the_hidden_gradient_itself_saves_the_collective() -> None:
    answers = run_ranks(head_answers, 2, 2, False)
    for name in CASES:
        case, _, real = a_case(name, 2)
        want = by_definition(case, temperature=0.5, vocab_size=real)[2][:, 1:]
        first, second = (torch.from_numpy(answer[name][0][2])[:, 1:].double() for answer in answers)
        assert largest(first + second - want) <= 2e-6 * largest(want), name
        assert [answer[name][2] for answer in answers] == [[], []]


def test_one_rank_alone_talks_to_nobody() -> None:
    (answer,) = run_ranks(head_answers, 1, 1, True)
    assert [answer[name][1:] for name in CASES] == [([], [])] * len(CASES)


def a_row_case(name: str, ranks: int) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """`a_case` with old log-probs of the size of the new ones."""
    case, bounds, real = a_case(name, ranks)
    case["d_entropy"] = case["d_entropy"] * 0.1 - 6.0
    return case, bounds, real


def _row_losses(ranks: int, reduce: bool) -> dict[str, Any]:
    import torch.distributed as dist

    from rest_mega import launch

    launch.keep_gloo_on_loopback()
    me = launch.rank()
    dist.init_process_group("gloo", launch.rendezvous(), rank=me, world_size=ranks)
    answers = {}
    for name in CASES:
        case, bounds, real = a_row_case(name, ranks)
        mine = case | {"weight": case["weight"][bounds[me] : bounds[me + 1]]}
        with Collectives() as seen:
            loss, tensors = by_rows(
                mine, group=dist.group.WORLD, temperature=0.5, vocab_start=bounds[me],
                vocab_size=real, reduce_hidden_grad=reduce, chunk_rows=8,
            )  # fmt: skip
        answers[name] = (loss, [t.numpy() for t in tensors], seen.seen)
    dist.destroy_process_group()
    return answers


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_gradient_taken_in_the_forward_pass_agrees_with_fp64_and_talks_once_a_chunk(
    ranks: int,
) -> None:
    answers = run_ranks(_row_losses, ranks, ranks, True)
    for name in CASES:
        case, bounds, real = a_row_case(name, ranks)
        loss, exact = rows_by_definition(case, temperature=0.5, vocab_size=real)
        want = without_offset(exact)
        for rank, answer in enumerate(answers):
            got_loss, got, seen = answer[name]
            logprob, entropy, d_hidden, d_weight = map(torch.from_numpy, got)
            mine = want[3][bounds[rank] : bounds[rank + 1]]
            assert largest(d_weight - mine) <= 1.2e-5 * largest(want[3]), (name, rank)
            whole = without_offset((logprob, entropy, d_hidden, want[3]))
            assert_same_rows((got_loss, whole), (loss, want))
            assert seen == 3 * ["_allgather_base_"] + ["allreduce_"]  # 21 rows, 8 a chunk


def test_a_caller_that_sums_the_hidden_gradient_of_a_row_loss_saves_the_collective() -> None:
    answers = run_ranks(_row_losses, 2, 2, False)
    for name in CASES:
        case, _, real = a_row_case(name, 2)
        want = rows_by_definition(case, temperature=0.5, vocab_size=real)[1][2][:, 1:]
        first, second = (torch.from_numpy(answer[name][1][2])[:, 1:].double() for answer in answers)
        assert largest(first + second - want) <= 1.2e-5 * largest(want), name
        assert [answer[name][2] for answer in answers] == 2 * [3 * ["_allgather_base_"]]
