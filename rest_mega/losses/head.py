"""Hidden states + vocabulary shard -> log-prob and full-vocabulary entropy per row; the logits of
all rows are never stored.

For z = h W^T / temperature, p = softmax(z), H = -sum p log p (nats):

    d logp_y / d z_j = [j = y] - p_j            d H / d z_j = -p_j (log p_j + H)

Forward walks the vocabulary in tiles and keeps, per row, the running maximum m, s = sum e^(z-m) and
c = sum e^(z-m) (z-m); centring on the maximum keeps the entropy exact under any offset of the
logits. Shards of a tensor-parallel group are merged with ONE all-gather of four numbers a row, and
the gradient of the hidden states with ONE all-reduce; both in fp32, merged in rank order.

`linear_logprob_entropy` recomputes each tile in its backward: four matmuls, memory of two tiles,
any loss of both outputs. `linear_row_loss` takes the gradient in its forward: three matmuls, memory
of a chunk of rows times the shard, a loss of the token's own log-prob alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

ROW_TILE, VOCABULARY_TILE = 1024, 2048
"""One fp32 tile of logits is 8 MiB; two are alive at a time."""
ROW_CHUNK = 512
"""Rows whose logits of the whole shard `linear_row_loss` holds at once."""

RowLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logprob_C of a chunk of rows, which rows of R they are) -> (loss_C, d loss_C / d logprob_C)."""


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
    scale, real = _scale(temperature), _real_rows(weight_VD.shape[0], vocab_start, vocab_size)
    shard = (vocab_start, real, scale, group, reduce_hidden_grad)
    logprob_R, entropy_R = _Head.apply(hidden_RD, weight_VD, targets_R, shard)
    return logprob_R, entropy_R


def linear_row_loss(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_R: torch.Tensor,
    row_loss: RowLoss,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
    chunk_rows: int = ROW_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, logprob_R, entropy_R), fp32: the loss is the sum of the rows' losses, differentiable
    in hidden and weight; logprob_R and entropy_R carry no gradient.

    Use it where the loss is a closed form of the token's own log-prob, all else being known before
    (advantages, old log-probs, weights, the global denominator), and memory has room for
    chunk_rows x V fp32 logits and, from forward to backward, the fp32 gradients of both inputs. Use
    `linear_logprob_entropy` where the entropy is differentiated, where the loss of a row needs
    other rows (GSPO), where no gradient is wanted, or where memory is tight.

    `row_loss` must answer alike on every rank of `group`. There is one all-gather a chunk and one
    all-reduce in all.

    Args:
        row_loss: called once for each chunk, in order, without autograd.
        chunk_rows: fewer rows take less memory, and more passes over the gradient of the weights.

    The other arguments, and what they raise, are those of `linear_logprob_entropy`.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
    scale, real = _scale(temperature), _real_rows(weight_VD.shape[0], vocab_start, vocab_size)
    shard = (vocab_start, real, scale, group, reduce_hidden_grad)
    loss, logprob_R, entropy_R = _RowLossHead.apply(
        hidden_RD, weight_VD, targets_R, row_loss, shard, chunk_rows
    )
    return loss, logprob_R, entropy_R


def _scale(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature} must be positive; greedy scores have no finite log-prob"
        )
    return 1.0 / temperature


def _real_rows(rows: int, start: int, vocab_size: int | None) -> int:
    """How many of a shard's rows are no padding."""
    return rows if vocab_size is None else max(0, min(rows, vocab_size - start))


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
        d_hidden, d_weight = _no_gradients(hidden_RD, weight_VD)
        z_tile, e_tile = _scratch(hidden_RD, real), _scratch(hidden_RD, real)
        for rows in _slices(hidden_RD.shape[0], ROW_TILE):
            scaled = hidden_RD[rows].float() * scale
            for columns in _slices(real, VOCABULARY_TILE):
                weight = weight_VD[columns].float()
                g = _logit_gradient(
                    _logits(scaled, weight, z_tile),
                    _part(e_tile, scaled, weight),
                    targets_R[rows] - start - columns.start,
                    m_R[rows],
                    log_s_R[rows],
                    entropy_R[rows],
                    d_logprob_R[rows],
                    d_entropy_R[rows],
                )
                _add_gradients(d_hidden[rows], d_weight[columns], g, scaled, weight)
        _finish_hidden(d_hidden, scale, group if reduce_hidden_grad else None)
        return d_hidden.to(hidden_RD.dtype), d_weight.to(weight_VD.dtype), None, None


class _RowLossHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_R: torch.Tensor,
        row_loss: RowLoss,
        shard: tuple[Any, ...],
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, real, scale, group, reduce_hidden_grad = shard
        d_hidden, d_weight = _no_gradients(hidden_RD, weight_VD)
        logprob_R, entropy_R = d_hidden.new_empty(2, hidden_RD.shape[0])
        loss = d_hidden.new_zeros(())
        rooms = _rooms(min(chunk_rows, hidden_RD.shape[0]), real, d_hidden)
        for rows in _slices(hidden_RD.shape[0], chunk_rows):
            scaled, local_targets = hidden_RD[rows].float() * scale, targets_R[rows] - start
            stats_4C, tiles = _exponentials(scaled, weight_VD[:real], local_targets, rooms)
            logprob_R[rows], entropy_R[rows], m, log_s = _merge(_gather(stats_4C, group))
            loss_C, slope_C = row_loss(logprob_R[rows], rows)
            loss += loss_C.sum()
            for columns, e, centre in tiles:
                g = e.mul_((-slope_C * (centre - m).exp() * (-log_s).exp())[:, None])
                _add_at_targets(g, local_targets - columns.start, slope_C)
                weight = weight_VD[columns].float()
                _add_gradients(d_hidden[rows], d_weight[columns], g, scaled, weight)
        _finish_hidden(d_hidden, scale, group if reduce_hidden_grad else None)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(logprob_R, entropy_R)
        return loss, logprob_R, entropy_R

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: torch.Tensor) -> Any:
        # In place, as d_weight is large; autograd then refuses a second backward by itself.
        gradients = (d.mul_(d_loss) for d in ctx.saved_tensors)
        as_given = [d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*as_given, None, None, None, None)


class _Online:
    """Running maximum m, s = sum e^(z-m), c = sum e^(z-m) (z-m) and target logit of some rows."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.m = hidden.new_full(hidden.shape[:1], -torch.inf)
        self.s, self.c, self.target = (torch.zeros_like(self.m) for _ in range(3))

    def add(self, z: torch.Tensor, e: torch.Tensor, index: torch.Tensor) -> None:
        """Take in one tile of logits; overwrites `z`, leaves e^(z - m) in `e`."""
        here = _inside(index, z.shape[1])
        self.target[here] = z[here, index[here]]
        m = torch.maximum(self.m, z.amax(dim=1))
        shift = torch.where(self.m.isinf(), torch.zeros_like(m), self.m - m)
        keep = shift.exp()
        torch.exp(z.sub_(m[:, None]), out=e)
        self.c = keep * (self.c + self.s * shift) + z.mul_(e).sum(dim=1)
        self.s = keep * self.s + e.sum(dim=1)
        self.m = m

    def statistics(self) -> torch.Tensor:
        """[4, R]: maximum, log of the centred sum, entropy within the shard, target logit (0 when
        elsewhere)."""
        log_s = self.s.log()
        # A shard that is all padding has no mass: -inf here drops it from the merge.
        inside = log_s - self.c / self.s.clamp_min(1e-38)
        inside = torch.where(self.s > 0, inside, torch.zeros_like(log_s))
        return torch.stack([self.m, log_s, inside, self.target])


def _rooms(rows: int, columns: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Room for one tile of logits, then for each tile of a chunk; reused from chunk to chunk."""
    widths = [v.stop - v.start for v in _slices(columns, VOCABULARY_TILE)]
    return [like.new_empty(rows * width) for width in widths[:1] + widths]


def _exponentials(
    scaled: torch.Tensor,
    weight_VD: torch.Tensor,
    local_targets: torch.Tensor,
    rooms: list[torch.Tensor],
) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor, torch.Tensor]]]:
    """Statistics [4, C] of a chunk of rows, and (columns, e^(z - centre), centre_C) of each tile:
    its centre is the maximum up to there."""
    online, tiles = _Online(scaled), []
    for columns, room in zip(_slices(weight_VD.shape[0], VOCABULARY_TILE), rooms[1:], strict=True):
        weight = weight_VD[columns].float()
        e = _part(room, scaled, weight)
        online.add(_logits(scaled, weight, rooms[0]), e, local_targets - columns.start)
        tiles.append((columns, e, online.m))
    return online.statistics(), tiles


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _scratch(hidden_RD: torch.Tensor, columns: int) -> torch.Tensor:
    """Room for one fp32 tile."""
    size = min(hidden_RD.shape[0], ROW_TILE) * min(columns, VOCABULARY_TILE)
    return hidden_RD.new_empty(size, dtype=torch.float32)


def _part(room: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The front of `room`, shaped as the tile of these rows and columns."""
    rows, columns = hidden.shape[0], weight.shape[0]
    return room[: rows * columns].view(rows, columns)


def _logits(scaled: torch.Tensor, weight: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    return torch.mm(scaled, weight.T, out=_part(room, scaled, weight))


def _local_statistics(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, local_targets_R: torch.Tensor, scale: float
) -> torch.Tensor:
    """[4, R] of `_Online.statistics`."""
    stats_4R = hidden_RD.new_empty(4, hidden_RD.shape[0], dtype=torch.float32)
    z_tile, e_tile = (_scratch(hidden_RD, weight_VD.shape[0]) for _ in range(2))
    for rows in _slices(hidden_RD.shape[0], ROW_TILE):
        scaled = hidden_RD[rows].float() * scale
        online = _Online(scaled)
        for columns in _slices(weight_VD.shape[0], VOCABULARY_TILE):
            weight = weight_VD[columns].float()
            z, e = _logits(scaled, weight, z_tile), _part(e_tile, scaled, weight)
            online.add(z, e, local_targets_R[rows] - columns.start)
        stats_4R[:, rows] = online.statistics()
    return stats_4R


def _inside(index: torch.Tensor, columns: int) -> torch.Tensor:
    """The rows whose target is in the tile."""
    return ((index >= 0) & (index < columns)).nonzero()[:, 0]


def _add_at_targets(g: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    here = _inside(index, g.shape[1])
    g[here, index[here]] += values[here]


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


def _no_gradients(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 zeros to add gradients to."""
    zeros = functools.partial(torch.zeros_like, dtype=torch.float32)
    return zeros(hidden), zeros(weight)


def _add_gradients(
    d_hidden: torch.Tensor,
    d_weight: torch.Tensor,
    g: torch.Tensor,
    scaled: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """The share of one tile; that of the hidden states is still without the temperature."""
    d_hidden.addmm_(g, weight)
    d_weight.addmm_(g.T, scaled)


def _finish_hidden(d_hidden: torch.Tensor, scale: float, group: dist.ProcessGroup | None) -> None:
    d_hidden.mul_(scale)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(d_hidden, group=group)


def _logit_gradient(
    z: torch.Tensor,
    e: torch.Tensor,
    index: torch.Tensor,
    m: torch.Tensor,
    log_s: torch.Tensor,
    entropy: torch.Tensor,
    d_logprob: torch.Tensor,
    d_entropy: torch.Tensor,
) -> torch.Tensor:
    """d loss / d z of one tile: g_l [j = y] - p_j (g_l + g_h (log p_j + H)); overwrites `z`, `e`.

    `m` and `log_s` stay apart: their sum would round p_j by the offset of the logits.
    """
    torch.exp(z.sub_(m[:, None]), out=e)
    k = -(-log_s).exp()
    g = z.add_((entropy - log_s)[:, None]).mul_((k * d_entropy)[:, None])
    g.add_((k * d_logprob)[:, None]).mul_(e)
    _add_at_targets(g, index, d_logprob)
    return g
