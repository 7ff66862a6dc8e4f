"""Triton kernels of the head over the vocabulary: statistics of a row's logits, and the gradient of
the loss with respect to them; no logits are stored.

A program owns one block of rows. For `statistics` it walks the tiles of one split of `SPLIT`
columns of the shard; for `gradients` it computes one tile again and stores d loss / d logit, for as
many columns at a time as `GRADIENT_BYTES` holds, and two matmuls turn them into gradients of the
inputs. Nothing is added with atomics: results do not depend on which program runs first.

Logits stay in the units of h W^T: centred on the row's maximum (an exact difference, whatever the
offset), then scaled by log2(e) / temperature for exp2. Columns beyond the shard have probability
zero and are masked before the maximum is taken.
"""

# No `from __future__ import annotations`: triton reads the annotations of its kernels.
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from rest_mega.kernels.matmul import add_product, product

SPLIT = 2048
"""Columns that one program walks: the partial sums of a row do not depend on how many rows, ranks
or processors there are."""
GRADIENT_BYTES = 64 * 2**20
"""Room for the gradient of the logits of some columns, all rows; and for that of their weights."""
_GROUP = 16
"""Row blocks that run next to each other on the same columns, so that these stay in the L2
cache."""
_LOG2E = math.log2(math.e)


# fmt: off
@triton.jit
def _place(program, row_blocks, tiles, GROUP: tl.constexpr):
    """(row block, tile): groups of row blocks; inside a group tiles are outermost."""
    group = program // (GROUP * tiles)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program % (GROUP * tiles)
    return first + inside % size, inside // size


@triton.jit
def _logits(
    hidden, weight, row, column, dim, hidden_stride, weight_stride,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):
    """[BLOCK_R, BLOCK_V] of h W^T in fp32."""
    along = tl.arange(0, BLOCK_D)
    h = hidden + row.to(tl.int64)[:, None] * hidden_stride + along[None, :]
    w = weight + column.to(tl.int64)[None, :] * weight_stride + along[:, None]
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, dim, BLOCK_D):
        inside = along < dim - start
        a = tl.load(h, mask=inside[None, :], other=0.0)
        b = tl.load(w, mask=inside[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
        h += BLOCK_D
        w += BLOCK_D
    return z


@triton.jit
def _statistics_kernel(
    hidden, weight, targets, stats,
    rows, columns, dim, hidden_stride, weight_stride, scale_log2e,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """stats[split, 0..3, row] = maximum m, s = sum e^(z-m), c = sum e^(z-m) (z-m), target logit (0
    when elsewhere); z in c without the temperature."""
    row_block, split = _place(
        tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, SPLIT), GROUP
    )
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    near = tl.minimum(row, rows - 1)
    target = tl.load(targets + near)
    target = tl.where(target < columns, target, -1)
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    c = tl.zeros((BLOCK_R,), tl.float32)
    t = tl.zeros((BLOCK_R,), tl.float32)
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, columns), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        real = (column < columns)[None, :]
        z = _logits(
            hidden, weight, near, tl.minimum(column, columns - 1), dim,
            hidden_stride, weight_stride, BLOCK_R, BLOCK_V, BLOCK_D, WIDEN,
        )
        owned = (target >= start) & (target < start + BLOCK_V)
        if tl.max(owned.to(tl.int32), axis=0) > 0:
            t += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)
        z = tl.where(real, z, float("-inf"))
        higher = tl.maximum(m, tl.max(z, axis=1))
        shift = tl.where(m == float("-inf"), 0.0, m - higher)
        keep = tl.exp2(shift * scale_log2e)
        z -= higher[:, None]
        e = tl.exp2(z * scale_log2e)
        c = keep * (c + s * shift) + tl.sum(tl.where(real, e * z, 0.0), axis=1)
        s = keep * s + tl.sum(e, axis=1)
        m = higher
    out = stats + split.to(tl.int64) * 4 * rows + row
    tl.store(out, m, mask=row < rows)
    tl.store(out + rows, s, mask=row < rows)
    tl.store(out + 2 * rows, c, mask=row < rows)
    tl.store(out + 3 * rows, t, mask=row < rows)


@triton.jit
def _gradient_kernel(
    hidden, weight, targets, m_R, constant_R, linear_R, at_target_R, gradient,
    rows, columns, dim, hidden_stride, weight_stride, scale_log2e,
    GROUP: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """gradient[row, column] = e^(z-m) (constant + linear (z-m)) + at_target [j = y]."""
    row_block, tile = _place(
        tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_V), GROUP
    )
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    near = tl.minimum(row, rows - 1)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits(
        hidden, weight, near, tl.minimum(column, columns - 1), dim,
        hidden_stride, weight_stride, BLOCK_R, BLOCK_V, BLOCK_D, WIDEN,
    )
    z -= tl.load(m_R + near)[:, None]
    constant, linear = tl.load(constant_R + near), tl.load(linear_R + near)
    g = tl.exp2(z * scale_log2e) * (constant[:, None] + linear[:, None] * z)
    hit = column[None, :] == tl.load(targets + near)[:, None]
    g += tl.where(hit, tl.load(at_target_R + near)[:, None], 0.0)
    out = gradient + (row[:, None] * columns + column[None, :])  # 32 bits: a slice is small
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out, g.to(gradient.dtype.element_ty), mask=inside)


# fmt: on
def _blocks(rows: int, columns: int, dim: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_R": rows, "BLOCK_V": columns, "BLOCK_D": dim}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


_CONFIGS = {
    torch.bfloat16: [
        _blocks(128, 256, 64, 8, 3),
        _blocks(128, 128, 64, 8, 3),
        _blocks(128, 128, 32, 8, 4),
        _blocks(64, 128, 64, 4, 3),
        _blocks(64, 128, 32, 4, 3),
    ],
    torch.float32: [_blocks(64, 64, 32, 4, 2), _blocks(64, 64, 16, 4, 3)],
}
"""Blocks to choose from. fp32 has no tensor cores that keep its digits: larger blocks of it do not
fit the registers, and take a minute each to compile."""
_INTERPRETED = [_blocks(64, 256, 64, 1, 1)]


def _tuned(kernel: Any) -> dict[torch.dtype, Any]:
    """dtype -> `kernel` with the fastest blocks for a hidden size, whatever the number of rows; a
    pick is kept in triton's cache on disk."""
    tune = functools.partial(triton.autotune, key=["dim"], cache_results=True)
    compiled = is_compiled(kernel)
    return {
        dtype: tune(configs=configs if compiled else _INTERPRETED)(kernel)
        for dtype, configs in _CONFIGS.items()
    }


def is_compiled(kernel: Any = _statistics_kernel) -> bool:
    """Whether kernels are compiled for a GPU, not run by triton's interpreter."""
    return isinstance(kernel, triton.JITFunction)


_statistics = _tuned(_statistics_kernel)
_gradient = _tuned(_gradient_kernel)


def statistics(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, local_targets_R: torch.Tensor, scale: float
) -> tuple[torch.Tensor, float]:
    """([splits, 4, R] fp32: maximum, log of the centred sum, entropy within the split, target logit
    (0 when elsewhere); `scale`, by which maximum and target are still to be multiplied).

    Args:
        hidden_RD, weight_VD: both bf16 or both fp32, each row contiguous; no padding.
        local_targets_R: int64, column of this shard; outside [0, V): on another one.

    Raises:
        ValueError: rows that are not contiguous; inputs on a CPU, but kernels compiled for a GPU.
    """
    if (hidden_RD.stride(1), weight_VD.stride(1)) != (1, 1):
        raise ValueError(
            f"strides {hidden_RD.stride()} and {weight_VD.stride()}: the kernels take rows whose "
            "numbers are next to each other; call contiguous() or use form=chunked"
        )
    if is_compiled() and not hidden_RD.is_cuda:
        raise ValueError(f"the kernels take CUDA tensors, not {hidden_RD.device}: use form=chunked")
    rows, columns = hidden_RD.shape[0], weight_VD.shape[0]
    splits = triton.cdiv(columns, SPLIT)
    stats_S4R = hidden_RD.new_empty(splits, 4, rows, dtype=torch.float32)

    def grid(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, blocks["BLOCK_R"]) * splits,)

    if stats_S4R.numel() > 0:
        _statistics[hidden_RD.dtype][grid](
            hidden_RD, weight_VD, local_targets_R, stats_S4R,
            *_sizes(hidden_RD, weight_VD, scale),
            SPLIT=SPLIT, GROUP=_GROUP, WIDEN=_widen(hidden_RD),
        )  # fmt: skip
    stats_S4R[:, 2].div_(stats_S4R[:, 1]).mul_(-scale)
    stats_S4R[:, 2].add_(stats_S4R[:, 1].log_())
    return stats_S4R, scale


def gradients(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    local_targets_R: torch.Tensor,
    per_row: tuple[torch.Tensor, ...],
    scale: float,
    d_weight_VD: torch.Tensor,
) -> torch.Tensor:
    """d_hidden_RD, fp32; d_weight goes into `d_weight_VD` (any dtype, no padding).

    `per_row`: maximum of the unscaled logits, log of the centred sum, entropy, d_logprob, d_entropy
    of every row, over the whole vocabulary.

    The gradient of the logits is stored in the dtype of the inputs, all rows of some columns at a
    time; each row of d_weight is hence rounded once.
    """
    rows, columns = hidden_RD.shape[0], weight_VD.shape[0]
    d_hidden_RD = torch.zeros_like(hidden_RD, dtype=torch.float32)
    bytes_a_column = max(hidden_RD.element_size() * rows, 4 * hidden_RD.shape[1])
    width = max(256, GRADIENT_BYTES // bytes_a_column // 256 * 256)
    terms = _terms(per_row, scale)
    dtype = torch.float32 if _widen(hidden_RD) else hidden_RD.dtype
    room = hidden_RD.new_empty(rows * min(width, columns), dtype=dtype)
    sums = d_hidden_RD.new_empty(min(width, columns), hidden_RD.shape[1])
    for start in range(0, columns, width):
        weight = weight_VD[start : start + width]
        g = room[: rows * len(weight)].view(rows, len(weight))
        _store_gradient(g, hidden_RD, weight, local_targets_R - start, terms, scale)
        g = g.to(hidden_RD.dtype)
        add_product(d_hidden_RD, g, weight)
        part = d_weight_VD[start : start + width]
        part.copy_(product(g.T, hidden_RD, out=sums[: len(weight)]))
    return d_hidden_RD


def _terms(per_row: tuple[torch.Tensor, ...], scale: float) -> tuple[torch.Tensor, ...]:
    """(m, constant, linear, at_target) per row, with which the gradient with respect to h W^T,
    scale (g_l [j = y] - p_j (g_l + g_h (log p_j + H))), is what `_gradient_kernel` stores."""
    m_R, log_s_R, entropy_R, d_logprob_R, d_entropy_R = per_row
    k = -scale * (-log_s_R).exp()
    linear = k * d_entropy_R
    constant = k * d_logprob_R + linear * (entropy_R - log_s_R)
    return m_R, constant, linear * scale, d_logprob_R * scale


def _store_gradient(
    g: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    terms: tuple[torch.Tensor, ...],
    scale: float,
) -> None:
    if g.numel() == 0:
        return
    rows, columns = g.shape

    def grid(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, blocks["BLOCK_R"]) * triton.cdiv(columns, blocks["BLOCK_V"]),)

    _gradient[hidden.dtype][grid](
        hidden, weight, targets, *terms, g,
        *_sizes(hidden, weight, scale), GROUP=_GROUP, WIDEN=_widen(hidden),
    )  # fmt: skip


def _sizes(hidden: torch.Tensor, weight: torch.Tensor, scale: float) -> tuple[int | float, ...]:
    """What both kernels know of their inputs."""
    (rows, dim), columns = hidden.shape, weight.shape[0]
    return rows, columns, dim, hidden.stride(0), weight.stride(0), scale * _LOG2E


def _widen(hidden: torch.Tensor) -> bool:
    """Whether bf16 is made fp32 around the kernel: the interpreter's dot takes it for integers, and
    its stores cut the digits off instead of rounding."""
    return not is_compiled() and hidden.dtype == torch.bfloat16
