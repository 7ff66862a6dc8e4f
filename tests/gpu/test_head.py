"""On a GPU: both forms of the head equal autograd through the fp64 softmax.

    python -m pytest -m gpu tests/gpu/test_head.py

Cases and bounds are those of tests/unit/losses/test_head.py and tests/unit/kernels/test_head.py,
but for the entropy's.
"""

from __future__ import annotations

import pytest
import torch

from tests.unit.losses.test_head import (
    assert_rounded_twice,
    assert_same,
    by_definition,
    by_linear_rows,
    by_the_head,
    exact_case,
    in_bf16,
    largest,
    without_offset,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
Case = dict[str, torch.Tensor]
FORMS = ("triton", "chunked")
ENTROPY = 5e-6
"""Bound on the error of entropies of up to 9.2 nats: five roundings of that size. CUDA's expf and
logf err by up to 2 ulp, the CPU's by less than one."""


def on_gpu(case: Case) -> Case:
    return {name: x.cuda() for name, x in case.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [1, 129, 2049, 9001])
def test_values_and_gradients_are_those_of_the_softmax(form: str, vocab: int) -> None:
    case = on_gpu(exact_case(rows=200, vocab=vocab))
    got = by_the_head(case, form=form, temperature=0.7)
    assert_same(got, by_definition(case, temperature=0.7), entropy=ENTROPY)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_an_offset_of_all_logits_changes_nothing(form: str, offset: float) -> None:
    case = on_gpu(exact_case(24, 9001, offset=offset))
    assert_same(without_offset(by_the_head(case, form=form)), without_offset(by_definition(case)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("real", [1, 100, 256])
def test_padding_of_the_vocabulary_has_neither_mass_nor_gradient(form: str, real: int) -> None:
    case = on_gpu(exact_case(rows=9, vocab=300))
    case["targets"] %= real
    case["weight"][real:] = 1e4
    got = by_the_head(case, form=form, vocab_size=real)
    assert_same(got, by_definition(case, vocab_size=real))
    assert largest(got[3][real:]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_zero_that_backward_can_walk(form: str) -> None:
    got = by_the_head(on_gpu(exact_case(rows=0, vocab=50)), form=form)
    assert (got[0].shape, got[2].shape, largest(got[3])) == ((0,), (0, 16), 0)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize(("dim", "sharpness"), [(16, 1.0), (80, 0.5), (1024, 0.125)])
def test_bf16_is_summed_in_fp32_and_its_gradients_rounded_twice(
    form: str, dim: int, sharpness: float
) -> None:
    case = on_gpu(exact_case(rows=700, vocab=9001, dim=dim, sharpness=sharpness))
    got = by_the_head(in_bf16(case), form=form, temperature=2.0)
    assert_rounded_twice(got, case, temperature=2.0, entropy=ENTROPY)


def test_bf16_with_its_gradient_in_the_forward_pass_is_rounded_twice() -> None:
    case = on_gpu(exact_case(rows=700, vocab=9001)) | {"d_entropy": torch.zeros(700).cuda()}
    assert_rounded_twice(by_linear_rows(in_bf16(case), chunk_rows=256), case)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_inputs_give_the_same_bits(form: str) -> None:
    case = in_bf16(on_gpu(exact_case(rows=2100, vocab=9001, dim=256)))
    for one, two in zip(by_the_head(case, form=form), by_the_head(case, form=form), strict=True):
        assert torch.equal(one, two)


def test_the_kernels_memory_does_not_grow_with_the_vocabulary() -> None:
    extra = []
    for vocab in (32_768, 131_072):
        case = in_bf16(on_gpu(exact_case(rows=8192, vocab=vocab, dim=512)))
        by_the_head(case, form="triton")  # picks its blocks
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        by_the_head(case, form="triton")
        own = 2 * (case["hidden"].nbytes + case["weight"].nbytes)  # copied leaves, gradients
        extra.append(torch.cuda.max_memory_allocated() - before - own)
    assert extra[1] <= 256 * 2**20
    assert extra[1] - extra[0] <= 16 * 2**20  # four numbers a row and split
