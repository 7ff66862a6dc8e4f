"""Matmuls whose result and sums are fp32, whatever the factors' dtype.

The product of two bf16 numbers is exact in fp32. On CUDA the factors stay bf16 and the tensor cores
sum in fp32 (`out_dtype`, torch 2.8 or newer, CUDA alone); elsewhere they are made fp32 first.
"""

from __future__ import annotations

import torch


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`left @ right` into the fp32 tensor `out`, which it returns."""
    if left.dtype != torch.float32 and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0
) -> None:
    """Add `factor * (left @ right)` to the fp32 tensor `total`."""
    if left.dtype != torch.float32 and left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=factor, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=factor)
