"""The one kernel of sgl_kernel that SGLang runs on a CPU without AMX, in torch; the rest is
inert."""

from __future__ import annotations

import inert
import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Request i's next end[i] - start[i] entries of `out_cache_loc` go into row
    `req_pool_indices[i]` of `req_to_token`, from column start[i]."""
    taken = 0
    rows = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    for row, low, high in rows:
        req_to_token[row, low:high] = out_cache_loc[taken : taken + high - low]
        taken += high - low


inert.make_inert(__name__)
