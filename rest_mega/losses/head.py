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
of a chunk of rows times the shard, a loss of the token's own log-prob alone. What walks the tiles
of the former is a name in `FORMS`: torch's operations on any device, or kernels on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from rest_mega.config import one_of, require
from rest_mega.losses import chunked

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
    form: str = "auto",
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
        form: auto, or one of `FORMS`.

    Raises:
        ValueError: temperature not positive, or a form that is not known or cannot take the inputs.
    """
    scale, real = _scale(temperature), _real_rows(weight_VD.shape[0], vocab_start, vocab_size)
    walk = _choose(form, hidden_RD, weight_VD)
    shard = (vocab_start, real, scale, group, reduce_hidden_grad, walk)
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
    chunk_rows: int | None = None,
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
        chunk_rows: fewer rows take less memory, and more passes over the gradient of the weights;
            None: `chunked.TILES` of the device.

    The other arguments, and what they raise, are those of `linear_logprob_entropy`.
    """
    if chunk_rows is None:
        chunk_rows = chunked.TILES[hidden_RD.device.type].chunk
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
    scale, real = _scale(temperature), _real_rows(weight_VD.shape[0], vocab_start, vocab_size)
    shard = (vocab_start, real, scale, group, reduce_hidden_grad)
    loss, logprob_R, entropy_R = _RowLossHead.apply(
        hidden_RD, weight_VD, targets_R, row_loss, shard, chunk_rows
    )
    return loss, logprob_R, entropy_R


def _chunked() -> ModuleType:
    return chunked


def _triton() -> ModuleType:
    from rest_mega.kernels import head

    return head


FORMS: dict[str, Callable[[], ModuleType]] = {"chunked": _chunked, "triton": _triton}
"""Name -> what loads its `statistics` and `gradients`. chunked: torch's operations, any device and
dtype; triton: kernels for a GPU, inputs both bf16 or both fp32. auto takes them for bf16 alone
(docs/design/0007)."""


def check_form(name: str) -> None:
    """ConfigError where `model.head` = `name` cannot run here; loads no kernel."""
    one_of("model.head", name, ("auto", *FORMS))
    require(
        name != "triton" or (torch.cuda.is_available() and _has_triton()),
        "model.head=triton needs a CUDA device and the package triton, which comes with torch's "
        "CUDA builds: install one of these or set model.head=auto",
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _choose(form: str, hidden: torch.Tensor, weight: torch.Tensor) -> ModuleType:
    """The module of `form`."""
    one_of("form", form, ("auto", *FORMS))
    same = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float32)
    if form == "auto":
        narrow = hidden.is_cuda and same and hidden.dtype == torch.bfloat16
        form = "triton" if narrow and _has_triton() else "chunked"
    require(
        form != "triton" or same,
        f"form=triton takes inputs that are both bf16 or both fp32, not {hidden.dtype} and "
        f"{weight.dtype}: use form=chunked",
    )
    return FORMS[form]()


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
        start, real, scale, group, _, form = shard
        stats_P4R, unit = form.statistics(hidden_RD, weight_VD[:real], targets_R - start, scale)
        logprob_R, entropy_R, m_R, log_s_R = _merge(_gather(_whole(stats_P4R, unit), group), unit)
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, m_R, log_s_R, entropy_R)
        ctx.shard = shard
        return logprob_R, entropy_R

    @staticmethod
    def backward(ctx: Any, d_logprob_R: torch.Tensor, d_entropy_R: torch.Tensor) -> Any:
        hidden_RD, weight_VD, targets_R, m_R, log_s_R, entropy_R = ctx.saved_tensors
        start, real, scale, group, reduce_hidden_grad, form = ctx.shard
        d_weight = torch.empty_like(weight_VD)
        d_weight[real:].zero_()
        d_hidden = form.gradients(
            hidden_RD,
            weight_VD[:real],
            targets_R - start,
            (m_R, log_s_R, entropy_R, d_logprob_R, d_entropy_R),
            scale,
            d_weight[:real],
        )
        _sum(d_hidden, group if reduce_hidden_grad else None)
        return d_hidden.to(hidden_RD.dtype), d_weight, None, None


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
        zeros = functools.partial(torch.zeros_like, dtype=torch.float32)
        d_hidden, d_weight = zeros(hidden_RD), zeros(weight_VD)
        logprob_R, entropy_R = d_hidden.new_empty(2, hidden_RD.shape[0])
        loss = d_hidden.new_zeros(())
        walk = chunked.Chunks(min(chunk_rows, hidden_RD.shape[0]), weight_VD[:real], scale)
        for rows in chunked.slices(hidden_RD.shape[0], chunk_rows):
            local_targets = targets_R[rows] - start
            stats_4C = walk.forward(hidden_RD[rows], local_targets)
            logprob_R[rows], entropy_R[rows], m, log_s = _merge(_gather(stats_4C, group))
            loss_C, slope_C = row_loss(logprob_R[rows], rows)
            loss += loss_C.sum()
            walk.backward(local_targets, m, log_s, slope_C, d_hidden[rows], d_weight)
        _sum(d_hidden.mul_(scale), group if reduce_hidden_grad else None)
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


def _whole(stats_P4R: torch.Tensor, unit: float) -> torch.Tensor:
    """[4, R] of the shard from those of its parts; a shard without real rows has no parts."""
    if len(stats_P4R) == 1:
        return stats_P4R[0]
    if len(stats_P4R) == 0:
        nothing = stats_P4R.new_zeros(stats_P4R.shape[1:])
        nothing[:2] = -torch.inf
        return nothing
    _, entropy_R, m_R, log_s_R = _merge(stats_P4R, unit)
    return torch.stack([m_R, log_s_R, entropy_R, stats_P4R[:, 3].sum(dim=0)])


def _gather(stats_4R: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[P, 4, R] of all shards, in rank order."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return stats_4R[None]
    parts = torch.empty(size * 4, stats_4R.shape[1], device=stats_4R.device)
    dist.all_gather_into_tensor(parts, stats_4R, group=group)
    return parts.view(size, 4, -1)


def _merge(stats_P4R: torch.Tensor, unit: float = 1.0) -> tuple[torch.Tensor, ...]:
    """(logprob_R, entropy_R, maximum_R, log of the centred sum_R) of the whole vocabulary from the
    statistics of its parts.

    Maxima and target logits are in a unit of `unit`: their differences are exact, and scaled
    afterwards.
    """
    m_PR, log_s_PR, inside_PR, target_PR = stats_P4R.unbind(1)
    m_R = m_PR.amax(dim=0)
    log_mass_PR = (m_PR - m_R) * unit + log_s_PR
    log_s_R = torch.logsumexp(log_mass_PR, dim=0)
    share_PR = log_mass_PR - log_s_R
    w_PR = share_PR.exp()
    entropy_R = (
        w_PR * (inside_PR - torch.where(w_PR > 0, share_PR, torch.zeros_like(share_PR)))
    ).sum(dim=0)
    logprob_R = (target_PR.sum(dim=0) - m_R) * unit - log_s_R
    return logprob_R, entropy_R.clamp_min(0.0), m_R, log_s_R


def _sum(d_hidden: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(d_hidden, group=group)
