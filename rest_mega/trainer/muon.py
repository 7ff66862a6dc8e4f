"""Muon: momentum whose update is orthogonalised, for hidden matrices (Jordan et al., 2024).

The rule of torch.optim.Muon, but the Newton-Schulz iteration runs in the gradient's fp32 on a CPU:
torch's runs in bf16, whose fused multiply-add has no fast CPU path (20 ms a matrix of 512 x 192
against 1 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix, scaled by sqrt(max(1, rows / columns))."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "closures are not used by megatron-core"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffer.lerp_(grad, 1 - group["momentum"])
        direction = orthogonalise(grad.lerp(buffer, group["momentum"]))
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(
            direction.to(parameter.dtype), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5
        )


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of `matrix` [m, n]: five quintic Newton-Schulz steps push all
    singular values to ~1."""
    a, b, c = COEFFICIENTS
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
