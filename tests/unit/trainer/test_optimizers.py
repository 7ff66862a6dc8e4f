"""AdamW, Muon and the schedule equal their published rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rest_mega.config import OptimizerConfig
from rest_mega.trainer.adam import GroupStepAdam
from rest_mega.trainer.muon import COEFFICIENTS, STEPS, Muon, orthogonalise
from rest_mega.trainer.optimizer import lr_factor


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (3, 7), (5, 5)]
    return [torch.nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in shapes]


def walk(optimizer: torch.optim.Optimizer, steps: int = 12) -> None:
    """Steps along gradients that are the same for every optimizer; the last parameter starts
    late."""
    make = torch.Generator().manual_seed(1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for n, parameter in enumerate(held):
            gradient = torch.randn(parameter.shape, generator=make) * 10.0 ** (n - 1)
            parameter.grad = gradient.to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9 if step % 3 else 1.5
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999)])
def test_adam_with_a_step_per_group_is_torchs_adamw(
    weight_decay: float, betas: tuple[float, float]
) -> None:
    settings: dict[str, Any] = {
        "lr": 1e-2, "betas": betas, "eps": 1e-6, "weight_decay": weight_decay,
    }  # fmt: skip
    ours, theirs = parameters(), parameters()
    walk(GroupStepAdam(ours, **settings))
    walk(torch.optim.AdamW(theirs, **settings))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


def test_adams_state_survives_a_round_trip_of_its_dictionary() -> None:
    whole, halves = parameters(), parameters()
    first, rest = GroupStepAdam(halves, lr=1e-2), GroupStepAdam(halves, lr=1e-2)
    walk(first, steps=5)
    rest.load_state_dict(first.state_dict())
    assert rest.param_groups[0]["step"] == 5
    walk(rest, steps=5)
    once = GroupStepAdam(whole, lr=1e-2)
    walk(once, steps=5)
    walk(once, steps=5)
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one, other)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    for kind in (GroupStepAdam, Muon):
        moved, still = parameters()[:2]
        before = still.detach().clone()
        moved.grad = torch.ones_like(moved)
        kind([moved, still], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(still, before)
        assert not torch.equal(moved, parameters()[0])


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (200, 8), (1, 5)])
def test_orthogonalising_keeps_the_directions_and_brings_singular_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    result = orthogonalise(matrix)
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = u.T @ result.double() @ vt.T  # diagonal: same singular vectors
    off = inside - torch.diag(inside.diagonal())
    assert float(off.abs().max()) < 1e-4
    # The coefficients trade exactness for speed: small values lag, others lie in (0.68, 1.13).
    strong = torch.linalg.svdvals(matrix) > 0.05 * float(torch.linalg.matrix_norm(matrix))
    assert float(inside.diagonal()[strong].min()) > 0.65
    assert float(inside.diagonal().max()) < 1.15
    torch.testing.assert_close(orthogonalise(1000 * matrix), result, rtol=1e-3, atol=1e-4)


def test_the_orthogonal_factor_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))


class ExactMuon:
    """Muon by its definition, in fp64: the quintic acts on the singular values."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, wd: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params, "lr": lr}]
        self._wd, self._buffers = wd, [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for parameter, buffer in zip(group["params"], self._buffers, strict=True):
            buffer += 0.05 * (parameter.grad - buffer)
            nesterov = 0.05 * parameter.grad + 0.95 * buffer
            u, s, vt = torch.linalg.svd(nesterov, full_matrices=False)
            s = s / s.square().sum().sqrt()
            a, b, c = COEFFICIENTS
            for _ in range(STEPS):
                s = a * s + b * s**3 + c * s**5
            rows, columns = parameter.shape
            parameter *= 1 - group["lr"] * self._wd
            parameter -= group["lr"] * math.sqrt(max(1, rows / columns)) * (u * s) @ vt


def test_muon_is_its_definition() -> None:
    ours, exact = parameters(), parameters(torch.float64)
    walk(Muon(ours, lr=0.02, weight_decay=0.1))
    walk(ExactMuon(exact, lr=0.02, wd=0.1))  # type: ignore[arg-type]
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_torchs_up_to_its_bf16_iteration() -> None:
    ours, theirs = parameters(), parameters()
    walk(Muon(ours, lr=0.02, weight_decay=0.1), steps=1)
    walk(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1), steps=1)
    for one, other, start in zip(ours, theirs, parameters(), strict=True):
        moved = float((one - start).norm())
        assert float((one - other).norm()) < 0.03 * moved


FIRST, LAST = 4, 20


@pytest.mark.parametrize(
    ("decay", "midway"), [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)]
)
def test_the_schedule_warms_up_then_decays_to_its_floor(decay: str, midway: float) -> None:
    config = OptimizerConfig(decay=decay, warmup_steps=FIRST, min_lr_ratio=0.1)
    factors = [lr_factor(config, step, LAST) for step in range(1, LAST + 2)]
    assert factors[:FIRST] == [0.25, 0.5, 0.75, 1.0]
    assert factors[FIRST] == 1.0  # the peak is held for the first step after the warm-up
    assert factors[FIRST + 8] == pytest.approx(midway)
    end = 1.0 if decay == "constant" else 0.1
    assert factors[LAST] == pytest.approx(end)
    assert lr_factor(config, 10 * LAST, LAST) == pytest.approx(end)  # a run that goes on
    assert factors[FIRST:] == sorted(factors[FIRST:], reverse=True)


def test_cosine_is_the_half_wave_between_peak_and_floor() -> None:
    config = OptimizerConfig(decay="cosine", min_lr_ratio=0.2)
    for step in range(1, 12):
        angle = math.pi * (step - 1) / 11
        assert lr_factor(config, step, 11) == pytest.approx(0.2 + 0.4 * (1 + math.cos(angle)))


def test_without_warm_up_the_first_step_is_at_the_peak_even_of_a_run_of_one_step() -> None:
    for total in (1, 2, 50):
        assert lr_factor(OptimizerConfig(decay="linear", min_lr_ratio=0.0), 1, total) == 1.0
    shorter = OptimizerConfig(decay="linear", warmup_steps=9)
    assert [lr_factor(shorter, s, 3) for s in (1, 2, 3)] == [s / 9 for s in (1, 2, 3)]
