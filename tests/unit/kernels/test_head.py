"""The kernels of the head, run by triton's interpreter on the CPU, equal autograd through the fp64
softmax.

The interpreter is chosen when triton is imported, so all answers come from new processes: one for
the cases of a single shard, two for shards over gloo.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from rest_mega.losses.head import linear_logprob_entropy
from tests.distributed.test_head import assert_agreed, head_answers
from tests.support.ranks import run_ranks
from tests.unit.losses.test_head import (
    Answer,
    assert_rounded_twice,
    assert_same,
    by_definition,
    by_the_head,
    exact_case,
    in_bf16,
    largest,
    without_offset,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton has no package for this system"
    ),
]
INTERPRETED = {"TRITON_INTERPRET": "1"}
Case = dict[str, torch.Tensor]


def poisoned(real: int) -> Case:
    """A vocabulary of 300 whose rows from `real` on would drown every other logit."""
    case = exact_case(rows=9, vocab=300)
    case["targets"] %= real
    case["weight"][real:] = 1e4
    return case


def a_head_of(case: Case, rows: int) -> Case:
    return {name: x if name == "weight" else x[:rows] for name, x in case.items()}


TEMPERED = {f"{vocab} columns": exact_case(rows=37, vocab=vocab) for vocab in (1, 255, 257, 2100)}
MANY = exact_case(rows=1100, vocab=300, dim=80)
"""More row blocks than run side by side, and a hidden size that no block divides."""
SINGLE: dict[str, tuple[Case, dict[str, Any]]] = {
    **{name: (case, {"temperature": 0.7}) for name, case in TEMPERED.items()},
    "many rows": (MANY, {}),
    "the first of many rows": (a_head_of(MANY, 70), {}),
    **{f"offset {o}": (exact_case(24, 2100, offset=o), {}) for o in (-500.0, 500.0)},
    **{f"{real} real": (poisoned(real), {"vocab_size": real}) for real in (1, 100, 256)},
    "no rows": (exact_case(rows=0, vocab=50), {}),
    "bf16": (in_bf16(exact_case(rows=33, vocab=700)), {"temperature": 2.0}),
    "bf16 again": (in_bf16(exact_case(rows=33, vocab=700)), {"temperature": 2.0}),
}


def _answers() -> tuple[dict[str, Any], str]:
    """Every case by the kernels, and what two precisions are told."""
    from rest_mega.kernels import head

    assert not head.is_compiled()
    head.GRADIENT_BYTES = 2**20  # so that the larger cases take several slices of the vocabulary
    answers = {}
    for name, (case, settings) in SINGLE.items():
        got = by_the_head(case, form="triton", **settings)
        answers[name] = tuple(x.float().numpy() for x in got)
    mixed = SINGLE["bf16"][0] | {"hidden": exact_case(33, 700)["hidden"]}
    with pytest.raises(ValueError) as refused:
        by_the_head(mixed, form="triton")
    turned = mixed | {"weight": torch.zeros(16, 700).T}
    with pytest.raises(ValueError, match=r"\(16, 1\) and \(1, 700\).*call contiguous\(\)"):
        linear_logprob_entropy(turned["hidden"], turned["weight"], turned["targets"], form="triton")
    return answers, str(refused.value)


@pytest.fixture(scope="module")
def answered() -> tuple[dict[str, Answer], str]:
    ((answers, refusal),) = run_ranks(_answers, 1, environment=INTERPRETED)
    return {name: tuple(map(torch.from_numpy, got)) for name, got in answers.items()}, refusal


@pytest.fixture(scope="module")
def answers(answered: tuple[dict[str, Answer], str]) -> dict[str, Answer]:
    return answered[0]


@pytest.mark.parametrize("name", TEMPERED)
def test_values_and_gradients_are_those_of_the_softmax(
    answers: dict[str, Answer], name: str
) -> None:
    assert_same(answers[name], by_definition(TEMPERED[name], temperature=0.7))


def test_row_blocks_beyond_one_group_are_like_any_other(answers: dict[str, Answer]) -> None:
    assert_same(answers["many rows"], by_definition(MANY))


def test_a_row_does_not_depend_on_the_rows_beside_it(answers: dict[str, Answer]) -> None:
    few, many = answers["the first of many rows"], answers["many rows"]
    assert torch.equal(few[0], many[0][:70])
    assert torch.equal(few[1], many[1][:70])


@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_an_offset_of_all_logits_changes_nothing(answers: dict[str, Answer], offset: float) -> None:
    got = without_offset(answers[f"offset {offset}"])
    assert_same(got, without_offset(by_definition(SINGLE[f"offset {offset}"][0])))
    assert_same(got, without_offset(by_definition(exact_case(24, 2100))))


@pytest.mark.parametrize("real", [1, 100, 256])
def test_padding_of_the_vocabulary_has_neither_mass_nor_gradient(
    answers: dict[str, Answer], real: int
) -> None:
    got = answers[f"{real} real"]
    assert_same(got, by_definition(SINGLE[f"{real} real"][0], vocab_size=real))
    assert largest(got[3][real:]) == 0


def test_no_rows_give_a_zero_that_backward_can_walk(answers: dict[str, Answer]) -> None:
    logprob, entropy, d_hidden, d_weight = answers["no rows"]
    assert (logprob.shape, entropy.shape, d_hidden.shape) == ((0,), (0,), (0, 16))
    torch.testing.assert_close(d_weight, torch.zeros(50, 16))


def test_bf16_inputs_are_summed_in_fp32_and_their_gradients_rounded_twice(
    answers: dict[str, Answer],
) -> None:
    assert_rounded_twice(answers["bf16"], exact_case(rows=33, vocab=700), temperature=2.0)


def test_the_same_inputs_give_the_same_bits(answers: dict[str, Answer]) -> None:
    for first, second in zip(answers["bf16"], answers["bf16 again"], strict=True):
        assert torch.equal(first, second)


def test_inputs_of_two_precisions_are_refused(answered: tuple[dict[str, Answer], str]) -> None:
    assert "both bf16 or both fp32, not torch.float32 and torch.bfloat16" in answered[1]
    assert "form=chunked" in answered[1]


def test_two_ranks_with_unequal_shards_agree_with_fp64_and_talk_once_in_each_direction() -> None:
    assert_agreed(run_ranks(head_answers, 2, 2, True, "triton", environment=INTERPRETED))
