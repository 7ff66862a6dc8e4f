"""Hidden states + vocabulary shard -> log-prob and full-vocabulary entropy per row; logits are
never stored.

For z = h W^T / temperature, p = softmax(z), H = -sum p log p (nats):

    d logp_y / d z_j = [j = y] - p_j            d H / d z_j = -p_j (log p_j + H)

Forward walks the vocabulary in tiles and keeps, per row, the running maximum m, s = sum e^(z-m) and
c = sum e^(z-m) (z-m); centring on the maximum keeps the entropy exact under any offset of the
logits. Backward recomputes each tile. Shards of a tensor-parallel group are merged with ONE
all-gather of four numbers a row, and the gradient of the hidden states with ONE all-reduce; both in
fp32, merged in rank order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

ROW_TILE, VOCABULARY_TILE = 1024, 2048
"""One fp32 tile of logits is 8 MiB; two are alive at a time."""


def linear_logprob_entropy(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob_R of the targets, entropy_R in nats), fp32, differentiable in hidden and weight.

    Args:
        hidden_RD: trained rows only; the same on every rank of `group`.
        weight_VD: this rank's rows of the LM head, global ids [vocab_start, vocab_start + V).
        targets_R: int64 global token ids below `vocab_size`.
        group: ranks that share the vocabulary; None: this rank holds all of it. Shards may differ
            in size.
        temperature: logits are divided by it.
        vocab_size: ids from here on are padding and have no probability; None: there is no padding.
        reduce_hidden_grad: False where the caller's own backward sums d_hidden over `group`.

    Raises:
        ValueError: temperature not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature} must be positive; greedy scores have no finite log-prob"
        )
    real = (
        weight_VD.shape[0]
        if vocab_size is None
        else max(0, min(weight_VD.shape[0], vocab_size - vocab_start))
    )
    shard = (vocab_start, real, 1.0 / temperature, group, reduce_hidden_grad)
    logprob_R, entropy_R = _Head.apply(hidden_RD, weight_VD, targets_R, shard)
    return logprob_R, entropy_R


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_R: torch.Tensor,
        shard: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, real, scale, group, _ = shard
        stats_4R = _local_statistics(hidden_RD, weight_VD[:real], targets_R - start, scale)
        logprob_R, entropy_R, m_R, log_s_R = _merge(_gather(stats_4R, group))
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, m_R, log_s_R, entropy_R)
        ctx.shard = shard
        return logprob_R, entropy_R

    @staticmethod
    def backward(ctx: Any, d_logprob_R: torch.Tensor, d_entropy_R: torch.Tensor) -> Any:
        hidden_RD, weight_VD, targets_R, m_R, log_s_R, entropy_R = ctx.saved_tensors
        start, real, scale, group, reduce_hidden_grad = ctx.shard
        d_hidden = torch.zeros(hidden_RD.shape, dtype=torch.float32, device=hidden_RD.device)
        d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for rows, columns in _tiles(hidden_RD.shape[0], real):
            hidden, weight = hidden_RD[rows].float(), weight_VD[columns].float()
            g = _logit_gradient(
                _logits(hidden, weight, scale),
                targets_R[rows] - start - columns.start,
                m_R[rows],
                log_s_R[rows],
                entropy_R[rows],
                d_logprob_R[rows],
                d_entropy_R[rows],
            )
            d_hidden[rows].addmm_(g, weight, alpha=scale)
            d_weight[columns].addmm_(g.T, hidden, alpha=scale)
            del g  # or the next tile would be the third alive
        if group is not None and reduce_hidden_grad and dist.get_world_size(group) > 1:
            dist.all_reduce(d_hidden, group=group)
        return d_hidden.to(hidden_RD.dtype), d_weight.to(weight_VD.dtype), None, None


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for r in range(0, rows, ROW_TILE):
        for v in range(0, columns, VOCABULARY_TILE):
            yield slice(r, min(r + ROW_TILE, rows)), slice(v, min(v + VOCABULARY_TILE, columns))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    return (hidden * scale) @ weight.T


def _local_statistics(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, local_targets_R: torch.Tensor, scale: float
) -> torch.Tensor:
    """[4, R]: maximum, log of the centred sum, entropy within the shard, target logit (0 when
    elsewhere)."""
    rows = hidden_RD.shape[0]
    m = torch.full((rows,), -torch.inf, device=hidden_RD.device)
    s, c, target = (torch.zeros(rows, device=hidden_RD.device) for _ in range(3))
    for r, v in _tiles(rows, weight_VD.shape[0]):
        z = _logits(hidden_RD[r].float(), weight_VD[v].float(), scale)
        _take_targets(target[r], z, local_targets_R[r] - v.start)
        m_new = torch.maximum(m[r], z.amax(dim=1))
        shift = torch.where(m[r].isinf(), torch.zeros_like(m_new), m[r] - m_new)
        z -= m_new[:, None]
        e = z.exp()
        mass = e.sum(dim=1)
        c[r] = shift.exp() * (c[r] + s[r] * shift) + e.mul_(z).sum(dim=1)
        s[r] = shift.exp() * s[r] + mass
        m[r] = m_new
        del z, e  # or the next tile would be the third alive
    log_s = s.log()
    # A shard that is all padding has no mass: -inf here drops it from the merge.
    inside = torch.where(s > 0, log_s - c / s.clamp_min(1e-38), torch.zeros_like(s))
    return torch.stack([m, log_s, inside, target])


def _take_targets(target: torch.Tensor, z: torch.Tensor, index: torch.Tensor) -> None:
    here = ((index >= 0) & (index < z.shape[1])).nonzero()[:, 0]
    target[here] = z[here, index[here]]


def _gather(stats_4R: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[P, 4, R] of all shards, in rank order."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return stats_4R[None]
    parts = torch.empty(size * 4, stats_4R.shape[1], device=stats_4R.device)
    dist.all_gather_into_tensor(parts, stats_4R, group=group)
    return parts.view(size, 4, -1)


def _merge(stats_P4R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(logprob_R, entropy_R, maximum_R, log of the centred sum_R) of the whole vocabulary from the
    shards' statistics."""
    m_PR, log_s_PR, inside_PR, target_PR = stats_P4R.unbind(1)
    m_R = m_PR.amax(dim=0)
    log_mass_PR = m_PR - m_R + log_s_PR
    log_s_R = torch.logsumexp(log_mass_PR, dim=0)
    share_PR = log_mass_PR - log_s_R
    w_PR = share_PR.exp()
    entropy_R = (
        w_PR * (inside_PR - torch.where(w_PR > 0, share_PR, torch.zeros_like(share_PR)))
    ).sum(dim=0)
    logprob_R = (target_PR.sum(dim=0) - m_R) - log_s_R
    return logprob_R, entropy_R.clamp_min(0.0), m_R, log_s_R


def _logit_gradient(
    z: torch.Tensor,
    index: torch.Tensor,
    m: torch.Tensor,
    log_s: torch.Tensor,
    entropy: torch.Tensor,
    d_logprob: torch.Tensor,
    d_entropy: torch.Tensor,
) -> torch.Tensor:
    """d loss / d z of one tile: g_l [j = y] - p_j (g_l + g_h (log p_j + H)); overwrites `z`.

    `m` and `log_s` stay apart: their sum would round p_j by the offset of the logits.
    """
    z -= m[:, None]
    e = z.exp()
    g = z.add_((entropy - log_s)[:, None]).mul_(d_entropy[:, None]).add_(d_logprob[:, None])
    g.mul_(e).mul_(-(-log_s).exp()[:, None])
    here = ((index >= 0) & (index < g.shape[1])).nonzero()[:, 0]
    g[here, index[here]] += d_logprob[here]
    return g
