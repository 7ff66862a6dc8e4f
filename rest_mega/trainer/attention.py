"""Leaf modules for runs without Transformer Engine: RMSNorm and packed SDPA attention.

- `RMSNorm` marks its weight `sequence_parallel`, so mcore all-reduces the gradient over the TP
  group (mcore's own torch norm refuses sequence parallelism).
- `PackedAttention` computes causal attention inside each packed sequence (`thd`) with torch's
  scaled dot product, grouped queries included. Under context parallelism each rank holds chunks r
  and 2C-1-r of every sequence (mcore's and Transformer Engine's zig-zag layout) and gathers keys
  and values over the CP group.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape [..., hidden_size]; same shape and dtype out."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention inside each packed sequence; mcore's core_attention interface."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        assert config.attention_dropout == 0, "attention dropout is not used in RL"
        self.scale = softmax_scale
        self.context = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]; T is this rank's
        tokens."""
        assert packed_seq_params is not None, "PackedAttention needs packed sequences"
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        attend = self._attend_context if self.context is not None else self._attend
        out = attend(query, key, value, bounds)
        return out.reshape(out.shape[0], -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]
    ) -> torch.Tensor:
        parts = [
            self._causal(query[a:b], key[a:b], value[a:b])
            for a, b in itertools.pairwise(bounds)
            if b > a
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The last len(query) positions of one sequence attend to its first len(key) positions."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        square = query.shape[0] == key.shape[0]
        mask = None if square else _lower_right(query.shape[0], key.shape[0], query.device)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=self.scale, enable_gqa=grouped
        )
        return out.squeeze(0).transpose(0, 1)

    def _attend_context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]
    ) -> torch.Tensor:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        assert self.context is not None
        size, rank = self.context.size(), self.context.rank()
        keys, values = (
            gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.context
            ).view(size, *x.shape)
            for x in (key, value)
        )
        parts = []
        for a, b in itertools.pairwise(bounds):
            low, chunk = a // size, (b - a) // (2 * size)
            whole_k, whole_v = (_unzigzag(x[:, low : low + 2 * chunk]) for x in (keys, values))
            for half, index in enumerate((rank, 2 * size - 1 - rank)):
                rows = slice(low + half * chunk, low + (half + 1) * chunk)
                reach = (index + 1) * chunk
                parts.append(self._causal(query[rows], whole_k[:reach], whole_v[:reach]))
        return torch.cat(parts)


def _lower_right(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)


def _unzigzag(parts: torch.Tensor) -> torch.Tensor:
    """[C, 2 chunks, ...] as the ranks hold it -> [2C chunks, ...] in the sequence's order."""
    first, second = parts.chunk(2, dim=1)
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])
