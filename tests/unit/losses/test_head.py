"""The head equals autograd through the fp64 softmax, and stores no logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rest_mega.config import ConfigError
from rest_mega.losses.chunked import TILES, Tiles
from rest_mega.losses.head import check_form, linear_logprob_entropy, linear_row_loss

Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""logprob_R, entropy_R, d_hidden_RD, d_weight_VD"""
ROW_TILE, VOCABULARY_TILE, ROW_CHUNK = (
    TILES["cpu"].rows,
    TILES["cpu"].columns,
    TILES["cpu"].chunk,
)


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


def assert_same(got: Answer, want: Answer, gradient: float = 2e-6, entropy: float = 2e-6) -> None:
    assert largest(got[0] - want[0]) <= 1e-5
    assert largest(got[1] - want[1]) <= entropy
    assert float(got[1].min()) >= 0
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert largest(ours - exact) <= gradient * largest(exact)


def without_offset(answer: Answer) -> Answer:
    """Without the hidden gradient's first column: terms of the offset's size, whose sum cancels."""
    return answer[0], answer[1], answer[2][:, 1:], answer[3]


def in_bf16(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The case with bf16 inputs; its grids of 1/32 are exact in it."""
    return case | {k: case[k].bfloat16() for k in ("hidden", "weight")}


def assert_rounded_twice(
    got: Answer,
    case: dict[str, torch.Tensor],
    temperature: float = 1.0,
    entropy: float = 2e-6,
) -> None:
    """Outputs to fp32, gradients to bf16's 2^-8 of each logit's gradient G and of their sum: with
    dH = G W / temperature, |error| <= 2^-8 (|G| |W| / temperature + |dH|)."""
    want = by_definition(case, temperature)
    assert_same((*got[:2], *want[2:]), want, entropy=entropy)
    for ours, exact, sizes in zip(
        got[2:], want[2:], gradient_sizes(case, temperature), strict=True
    ):
        bound = 2**-8 * (sizes + exact.abs()) + 2e-6 * largest(exact)
        assert bool(((ours.double() - exact).abs() <= bound).all())


def gradient_sizes(
    case: dict[str, torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """|G| |W| and |G|^T |H|, both over the temperature, with G = d loss / d logit in fp64."""
    hidden, weight = case["hidden"].double(), case["weight"].double()
    logits = (hidden @ weight.T / temperature).requires_grad_()
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprob = logprobs.gather(1, case["targets"][:, None])[:, 0]
    ((logprob * case["d_logprob"]).sum() + (entropy * case["d_entropy"]).sum()).backward()
    assert logits.grad is not None
    g = logits.grad.abs() / temperature
    return g @ weight.abs(), g.T @ hidden.abs()


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
    case = exact_case(rows=33, vocab=700)
    got, want = by_the_head(in_bf16(case)), by_definition(case)
    assert_same((*got[:2], *want[2:]), want)
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert ours.dtype == torch.bfloat16
        rounding = exact.abs() * 2**-8 + 2e-6 * largest(exact)
        assert bool(((ours.double() - exact).abs() <= rounding).all())


def test_bf16_that_enters_the_matmuls_as_it_is_has_its_gradients_rounded_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TILES, "cpu", Tiles(rows=16, columns=256, chunk=8, narrow=True))
    case = exact_case(rows=33, vocab=700)
    got = by_the_head(in_bf16(case), temperature=2.0)
    assert_rounded_twice(got, case, temperature=2.0)
    alone = case | {"d_entropy": torch.zeros(33)}
    assert_rounded_twice(by_linear_rows(in_bf16(alone), temperature=2.0), alone, temperature=2.0)


def test_a_cpu_takes_the_walk_in_torch_and_refuses_the_kernels() -> None:
    case = exact_case(rows=5, vocab=40)
    for auto, chunked in zip(by_the_head(case), by_the_head(case, form="chunked"), strict=True):
        assert torch.equal(auto, chunked)
    with pytest.raises(ValueError, match=r"form='trito' is not known.*nearest: triton"):
        by_the_head(case, form="trito")
    with pytest.raises(ConfigError, match=r"model\.head=triton needs a CUDA device.*head=auto"):
        check_form("triton")
    check_form("auto")


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


def general_form(case: dict[str, torch.Tensor]) -> None:
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    logprob, entropy = linear_logprob_entropy(hidden, weight, case["targets"])
    (logprob.sum() + entropy.sum()).backward()


def gradient_in_forward(case: dict[str, torch.Tensor]) -> None:
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    linear_row_loss(hidden, weight, case["targets"], lambda lp, _: (lp, lp.sign()))[0].backward()


def peak_bytes(run: Callable[[dict[str, torch.Tensor]], None], rows: int, vocab: int) -> int:
    """Most bytes alive at once that forward and backward allocate, the two gradients excepted."""
    case = exact_case(rows, vocab, dim=8)
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run(case)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive = peak = 0
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda e: int(e.start_ns())
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak - case["hidden"].nbytes - case["weight"].nbytes


def test_two_tiles_of_logits_are_alive_whatever_the_rows_and_the_vocabulary() -> None:
    tiles = 2 * 4 * ROW_TILE * VOCABULARY_TILE
    sizes = [(ROW_TILE, VOCABULARY_TILE), (ROW_TILE, 4 * VOCABULARY_TILE), (3 * ROW_TILE, 4096)]
    for rows, vocab in sizes:
        rest = 64 * rows + 2**20  # a dozen numbers a row, and copies of a tile's inputs
        assert tiles <= peak_bytes(general_form, rows, vocab) <= tiles + rest


def surrogate(
    case: dict[str, torch.Tensor], logprob: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """A PPO-like row loss, a * e^(logp - old), and its slope; `d_logprob` is the advantage."""
    ratio = torch.exp(logprob - case["d_entropy"][rows].to(logprob.dtype))
    loss = case["d_logprob"][rows].to(logprob.dtype) * ratio
    return loss, loss


def by_rows(case: dict[str, torch.Tensor], **settings: Any) -> tuple[float, Answer]:
    """The loss and what the form with its gradient in the forward pass answers."""
    hidden, weight = (case[k].clone().requires_grad_() for k in ("hidden", "weight"))
    loss, logprob, entropy = linear_row_loss(
        hidden, weight, case["targets"], lambda lp, rows: surrogate(case, lp, rows), **settings
    )
    (3 * loss).backward()
    assert not logprob.requires_grad
    assert not entropy.requires_grad
    assert hidden.grad is not None
    assert weight.grad is not None
    return float(loss), (logprob, entropy, hidden.grad, weight.grad)


def rows_by_definition(
    case: dict[str, torch.Tensor], temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[float, Answer]:
    """The same by autograd through the fp64 softmax."""
    hidden, weight = (case[k].double().requires_grad_() for k in ("hidden", "weight"))
    logprobs = torch.log_softmax((hidden @ weight[:vocab_size].T) / temperature, dim=-1)
    logprob = logprobs.gather(1, case["targets"][:, None])[:, 0]
    loss = surrogate(case, logprob, slice(None))[0].sum()
    (3 * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return float(loss), (logprob.detach(), entropy.detach(), hidden.grad, weight.grad)


def likely_case(rows: int, vocab: int, offset: float = 0.0) -> dict[str, torch.Tensor]:
    """An exact case whose old log-probs are near the new ones, as in training."""
    case = exact_case(rows, vocab, offset=offset)
    logprobs = torch.log_softmax(case["hidden"].double() @ case["weight"].double().T, dim=-1)
    chosen = logprobs.gather(1, case["targets"][:, None])[:, 0].float()
    return case | {"d_entropy": chosen + 0.1 * case["d_entropy"]}


def assert_same_rows(got: tuple[float, Answer], want: tuple[float, Answer]) -> None:
    assert got[0] == pytest.approx(want[0], abs=2e-4, rel=2e-5)
    # the ratio carries the error of the log-prob, relatively: 1e-5 of every gradient
    assert_same(got[1], want[1], gradient=1.2e-5)


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 100])
@pytest.mark.parametrize("vocab", [1, 129, VOCABULARY_TILE + 1, 5003])
def test_a_gradient_taken_in_the_forward_pass_is_that_of_the_loss(
    vocab: int, chunk_rows: int
) -> None:
    case = likely_case(rows=37, vocab=vocab)
    assert_same_rows(by_rows(case, chunk_rows=chunk_rows), rows_by_definition(case))


def test_a_gradient_taken_in_the_forward_pass_knows_the_temperature() -> None:
    case = likely_case(rows=15, vocab=300)
    assert_same_rows(by_rows(case, temperature=1.5), rows_by_definition(case, temperature=1.5))


def by_linear_rows(case: dict[str, torch.Tensor], **settings: Any) -> Answer:
    """The form with its gradient in the forward pass, under the loss sum of d_logprob * logprob."""
    hidden, weight = (case[k].clone().requires_grad_() for k in ("hidden", "weight"))
    g = case["d_logprob"]
    loss, logprob, entropy = linear_row_loss(
        hidden, weight, case["targets"], lambda lp, rows: (lp * g[rows], g[rows]), **settings
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logprob, entropy, hidden.grad, weight.grad


def test_a_linear_row_loss_has_the_gradients_of_the_general_form() -> None:
    case = exact_case(rows=40, vocab=5003) | {"d_entropy": torch.zeros(40)}
    got = by_linear_rows(case, chunk_rows=16)
    assert_same(got, by_definition(case))
    torch.testing.assert_close(got[:2], by_the_head(case)[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_an_offset_of_all_logits_changes_no_row_loss(offset: float) -> None:
    case = likely_case(rows=24, vocab=2 * VOCABULARY_TILE + 7, offset=offset)
    got, want = by_rows(case), rows_by_definition(case)
    assert_same_rows((got[0], without_offset(got[1])), (want[0], without_offset(want[1])))


@pytest.mark.parametrize("lead", [8.0, 150.0])
def test_a_maximum_in_the_last_tile_takes_the_mass_of_the_first_ones(lead: float) -> None:
    case = exact_case(rows=11, vocab=2 * VOCABULARY_TILE + 1) | {"d_entropy": torch.zeros(11)}
    case["hidden"][:, 1], case["weight"][-1, 1] = 1.0, lead  # e^-150 is below fp32
    assert_same(by_linear_rows(case), by_definition(case))


@pytest.mark.parametrize("real", [1, 100, 255, 256])
def test_padding_of_the_vocabulary_has_no_part_in_a_row_loss(real: int) -> None:
    case = exact_case(rows=9, vocab=256) | {"d_entropy": torch.full((9,), -5.0)}
    case["targets"] %= real
    case["weight"][real:] = 1e4
    got = by_rows(case, vocab_size=real, chunk_rows=4)
    assert_same_rows(got, rows_by_definition(case, vocab_size=real))
    assert largest(torch.cat([got[1][3][real:], torch.zeros(1, 16)])) == 0


def test_no_rows_have_no_loss_and_a_zero_that_backward_can_walk() -> None:
    loss, (logprob, entropy, d_hidden, d_weight) = by_rows(exact_case(rows=0, vocab=50))
    assert loss == 0
    assert logprob.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, 16)
    torch.testing.assert_close(d_weight, torch.zeros(50, 16))


def test_gradients_of_bf16_inputs_taken_in_the_forward_pass_are_rounded_once() -> None:
    case = likely_case(rows=33, vocab=700)
    got, want = by_rows(in_bf16(case), chunk_rows=10)[1], by_rows(case, chunk_rows=10)[1]
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=1e-6)
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, exact.bfloat16())


def test_a_second_backward_through_a_row_loss_is_refused() -> None:
    case = exact_case(rows=3, vocab=20)
    hidden = case["hidden"].clone().requires_grad_()
    loss = linear_row_loss(hidden, case["weight"], case["targets"], lambda lp, _: (lp, lp.sign()))
    loss[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss[0].backward()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_row_loss_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
        by_rows(exact_case(rows=2, vocab=5), temperature=temperature)


def test_a_chunk_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_rows=-1 must be at least 1"):
        by_rows(exact_case(rows=2, vocab=5), chunk_rows=-1)


def test_a_row_loss_holds_one_chunk_of_logits_whatever_the_rows() -> None:
    for rows, vocab in ((ROW_CHUNK, 4096), (4 * ROW_CHUNK, 4096), (2 * ROW_CHUNK, 8192)):
        chunk = 4 * ROW_CHUNK * (vocab + VOCABULARY_TILE)  # and the tile that fills it
        rest = 128 * rows + 2**20
        assert chunk <= peak_bytes(gradient_in_forward, rows, vocab) <= chunk + rest
