"""Packed attention is a dense softmax under a block-causal mask; the norm is its formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rest_mega.trainer.attention import PackedAttention, RMSNorm


def attention(**more: Any) -> PackedAttention:
    config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)
    return PackedAttention(config, 1, None, "self", **more)


def packed(bounds: list[int]) -> Any:
    cu = torch.tensor(bounds, dtype=torch.int32)
    return SimpleNamespace(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Every score is computed, those outside a sequence's own past are masked; fp64."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    sequence = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    allowed = (sequence[:, None] == sequence) & torch.ones(bounds[-1], bounds[-1]).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v).flatten(1)


def qkv(tokens: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, h, 8, generator=make).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("bounds", [[0, 17], [0, 1, 2, 9, 24], [0, 5, 5, 12]])
def test_output_and_gradients_are_those_of_the_masked_softmax(
    bounds: list[int], heads: int, kv_heads: int
) -> None:
    q, k, v = qkv(bounds[-1], heads, kv_heads)
    weight = torch.randn(bounds[-1], heads * 8, generator=torch.Generator().manual_seed(1))
    out = attention()(q, k, v, attention_mask=None, packed_seq_params=packed(bounds))
    want = dense(q, k, v, bounds)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    exact = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_scale_of_ones_own_replaces_the_square_root() -> None:
    q, k, v = qkv(9, 2, 2)
    out = attention(softmax_scale=0.25)(q, k, v, None, packed_seq_params=packed([0, 9]))
    want = dense(q * 0.25 * 8**0.5, k, v, [0, 9])
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    q, k, v = qkv(30, 4, 2)
    alone = attention()(q[10:20], k[10:20], v[10:20], None, packed_seq_params=packed([0, 10]))
    among = attention()(q, k, v, None, packed_seq_params=packed([0, 10, 20, 30]))
    assert torch.equal(among[10:20], alone)


def test_the_norm_is_its_formula() -> None:
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    norm = RMSNorm(config, 12, eps=1e-2)
    assert norm.weight.sequence_parallel  # mcore sums its gradient over the tensor ranks
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 12))
    x = torch.randn(5, 1, 12, generator=torch.Generator().manual_seed(0)) * 0.3
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), want, rtol=1e-6, atol=1e-6)
