"""The head equals autograd through the fp64 softmax, and stores no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rest_mega.losses.head import ROW_TILE, VOCABULARY_TILE, linear_logprob_entropy

Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""logprob_R, entropy_R, d_hidden_RD, d_weight_VD"""


def exact_case(
    rows: int, vocab: int, dim: int = 16, offset: float = 0.0, sharpness: float = 1.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs on a coarse grid: every logit is exact in fp32, and the first column of the weights
    adds `offset` to all logits."""
    make = torch.Generator().manual_seed(seed)

    def grid(count: int) -> torch.Tensor:
        return torch.randint(-32, 33, (count, dim), generator=make).float() / 32

    hidden_RD, weight_VD = grid(rows) * sharpness, grid(vocab) * 2
    hidden_RD[:, 0], weight_VD[:, 0] = 1.0, offset
    return {
        "hidden": hidden_RD,
        "weight": weight_VD,
        "targets": torch.randint(0, vocab, (rows,), generator=make),
        "d_logprob": torch.randn(rows, generator=make),
        "d_entropy": torch.randn(rows, generator=make),
    }


def by_the_head(case: dict[str, torch.Tensor], **settings: Any) -> Answer:
    hidden, weight = (case[k].clone().requires_grad_() for k in ("hidden", "weight"))
    logprob, entropy = linear_logprob_entropy(hidden, weight, case["targets"], **settings)
    ((logprob * case["d_logprob"]).sum() + (entropy * case["d_entropy"]).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def by_definition(
    case: dict[str, torch.Tensor], temperature: float = 1.0, vocab_size: int | None = None
) -> Answer:
    hidden, weight = (case[k].double().requires_grad_() for k in ("hidden", "weight"))
    logits = (hidden @ weight[:vocab_size].T) / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprob = logprobs.gather(1, case["targets"][:, None])[:, 0]
    ((logprob * case["d_logprob"]).sum() + (entropy * case["d_entropy"]).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def assert_same(got: Answer, want: Answer, gradient: float = 2e-6) -> None:
    assert largest(got[0] - want[0]) <= 1e-5
    assert largest(got[1] - want[1]) <= 2e-6
    assert float(got[1].min()) >= 0
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert largest(ours - exact) <= gradient * largest(exact)


def without_offset(answer: Answer) -> Answer:
    """Without the hidden gradient's first column: terms of the offset's size, whose sum cancels."""
    return answer[0], answer[1], answer[2][:, 1:], answer[3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocab", [1, 2, 129, VOCABULARY_TILE, VOCABULARY_TILE + 1, 5003])
def test_values_and_gradients_are_those_of_the_softmax(vocab: int, temperature: float) -> None:
    case = exact_case(rows=37, vocab=vocab)
    assert_same(by_the_head(case, temperature=temperature), by_definition(case, temperature))


def test_rows_beyond_one_tile_are_like_any_other() -> None:
    case = exact_case(rows=ROW_TILE + 3, vocab=VOCABULARY_TILE + 5)
    assert_same(by_the_head(case), by_definition(case))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_an_offset_of_all_logits_changes_nothing(offset: float, sharpness: float) -> None:
    rows, vocab = 24, 2 * VOCABULARY_TILE + 7
    case = exact_case(rows, vocab, offset=offset, sharpness=sharpness)
    plain = exact_case(rows, vocab, offset=0.0, sharpness=sharpness)
    got, want = without_offset(by_the_head(case)), without_offset(by_definition(case))
    assert_same(got, want)
    assert_same(got, without_offset(by_definition(plain)))


def test_a_certain_token_has_no_entropy_and_an_even_vocabulary_has_all() -> None:
    weight_VD = torch.zeros(1000, 2)
    weight_VD[7, 0] = 200.0
    hidden_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logprob, entropy = linear_logprob_entropy(hidden_RD, weight_VD, torch.tensor([7, 7]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 6.9077554]), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprob, torch.tensor([0.0, -6.9077554]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("real", [1, 100, 255, 256])
def test_padding_of_the_vocabulary_has_neither_mass_nor_gradient(real: int) -> None:
    case = exact_case(rows=9, vocab=256)
    case["targets"] %= real
    case["weight"][real:] = 1e4  # would drown every real logit
    got = by_the_head(case, vocab_size=real)
    assert_same(got, by_definition(case, vocab_size=real))
    assert largest(torch.cat([got[3][real:], torch.zeros(1, case["weight"].shape[1])])) == 0


def test_no_rows_give_a_zero_that_backward_can_walk() -> None:
    case = exact_case(rows=0, vocab=50)
    logprob, entropy, d_hidden, d_weight = by_the_head(case)
    assert logprob.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, 16)
    torch.testing.assert_close(d_weight, torch.zeros(50, 16))


def test_bf16_inputs_are_computed_in_fp32_and_their_gradients_rounded_once() -> None:
    case = exact_case(rows=33, vocab=700)  # grids of 1/32 are exact in bf16
    low = case | {k: case[k].bfloat16() for k in ("hidden", "weight")}
    got, want = by_the_head(low), by_definition(case)
    assert_same((*got[:2], *want[2:]), want)
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert ours.dtype == torch.bfloat16
        rounding = exact.abs() * 2**-8 + 2e-6 * largest(exact)
        assert bool(((ours.double() - exact).abs() <= rounding).all())


def test_a_gradient_of_one_output_alone_needs_no_other() -> None:
    case = exact_case(rows=12, vocab=300)
    for name in ("d_logprob", "d_entropy"):
        alone = case | {name: torch.zeros(12)}
        assert_same(by_the_head(alone), by_definition(alone))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    case = exact_case(rows=2, vocab=5)
    with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
        by_the_head(case, temperature=temperature)


def peak_bytes(rows: int, vocab: int) -> int:
    """Most bytes alive at once that forward and backward allocate, the two gradients excepted."""
    case = exact_case(rows, vocab, dim=8)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        logprob, entropy = linear_logprob_entropy(hidden, weight, case["targets"])
        (logprob.sum() + entropy.sum()).backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive = peak = 0
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda e: int(e.start_ns())
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak - hidden.nbytes - weight.nbytes


def test_two_tiles_of_logits_are_alive_whatever_the_rows_and_the_vocabulary() -> None:
    tiles = 2 * 4 * ROW_TILE * VOCABULARY_TILE
    sizes = [(ROW_TILE, VOCABULARY_TILE), (ROW_TILE, 4 * VOCABULARY_TILE), (3 * ROW_TILE, 4096)]
    for rows, vocab in sizes:
        rest = 64 * rows + 2**20  # a dozen numbers a row, and copies of a tile's inputs
        assert tiles <= peak_bytes(rows, vocab) <= tiles + rest
