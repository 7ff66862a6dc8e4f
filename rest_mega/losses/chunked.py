"""The head's walk over tiles of fp32 logits, by torch's own operations alone: on any device.

A tile is a block of rows times a block of the vocabulary. `statistics` keeps, per row, the running
maximum m, s = sum e^(z-m) and c = sum e^(z-m) (z-m); `gradients` computes every tile again.

Where the matmul units take bf16 and sum in fp32 (`TILES`), bf16 inputs stay bf16 and so does the
gradient of a tile, which is thus rounded once more; elsewhere all is fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rest_mega.kernels.matmul import add_product, product


@dataclass(frozen=True)
class Tiles:
    """Sizes of blocks on one kind of device."""

    rows: int
    columns: int
    chunk: int
    """Rows whose logits of the whole shard the form with its gradient in the forward pass holds."""
    narrow: bool
    """Whether bf16 inputs enter the matmuls as they are."""


TILES = {
    "cpu": Tiles(rows=1024, columns=2048, chunk=512, narrow=False),
    "cuda": Tiles(rows=4096, columns=8192, chunk=2048, narrow=True),
}
"""Kind of device -> its sizes. One fp32 tile is 8 MiB on a CPU and 128 MiB on a GPU, which needs
large matmuls; two are alive at a time."""


@dataclass(frozen=True)
class Factor:
    """Some rows of the hidden states as they enter the matmuls."""

    rows: torch.Tensor
    scale: float
    """What the logits are still to be multiplied by."""


def factor(hidden: torch.Tensor, scale: float, tiles: Tiles) -> Factor:
    """Hidden states times `scale`, which bf16 rows leave to the logits: it would round them."""
    if tiles.narrow and hidden.dtype == torch.bfloat16:
        return Factor(hidden, scale)
    return Factor(hidden.float() * scale, 1.0)


def columns_of(weight: torch.Tensor, like: Factor) -> torch.Tensor:
    """A block of the vocabulary as it enters the matmuls with `like`."""
    return weight.to(like.rows.dtype)


def statistics(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, local_targets_R: torch.Tensor, scale: float
) -> tuple[torch.Tensor, float]:
    """([1, 4, R] of `Online.statistics`, what its maximum and target are still to be multiplied by:
    1)."""
    tiles = TILES[hidden_RD.device.type]
    stats_4R = hidden_RD.new_empty(4, hidden_RD.shape[0], dtype=torch.float32)
    z_tile, e_tile = (_scratch(hidden_RD, weight_VD.shape[0], tiles) for _ in range(2))
    for rows in slices(hidden_RD.shape[0], tiles.rows):
        scaled = factor(hidden_RD[rows], scale, tiles)
        online = Online(scaled.rows)
        for columns in slices(weight_VD.shape[0], tiles.columns):
            weight = columns_of(weight_VD[columns], scaled)
            z, e = logits(scaled, weight, z_tile), _part(e_tile, scaled.rows, weight)
            online.add(z, e, local_targets_R[rows] - columns.start)
        stats_4R[:, rows] = online.statistics()
    return stats_4R[None], 1.0


def gradients(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    local_targets_R: torch.Tensor,
    per_row: tuple[torch.Tensor, ...],
    scale: float,
    d_weight_VD: torch.Tensor,
) -> torch.Tensor:
    """d_hidden_RD, fp32; d_weight goes into `d_weight_VD` (any dtype, no padding).

    `per_row`: maximum of the logits, log of the centred sum, entropy, d_logprob, d_entropy of every
    row, over the whole vocabulary.
    """
    tiles = TILES[hidden_RD.device.type]
    d_hidden = torch.zeros_like(hidden_RD, dtype=torch.float32)
    d_weight = d_weight_VD.zero_().float()  # the same tensor where that is fp32
    z_tile, e_tile = (_scratch(hidden_RD, weight_VD.shape[0], tiles) for _ in range(2))
    for rows in slices(hidden_RD.shape[0], tiles.rows):
        scaled = factor(hidden_RD[rows], scale, tiles)
        for columns in slices(weight_VD.shape[0], tiles.columns):
            weight = columns_of(weight_VD[columns], scaled)
            g = _logit_gradient(
                logits(scaled, weight, z_tile),
                _part(e_tile, scaled.rows, weight),
                local_targets_R[rows] - columns.start,
                *(x[rows] for x in per_row),
            )
            add_gradients(d_hidden[rows], d_weight[columns], g, scaled, weight)
    if d_weight is not d_weight_VD:
        d_weight_VD.copy_(d_weight)
    return d_hidden.mul_(scale)


class Online:
    """Running maximum m, s = sum e^(z-m), c = sum e^(z-m) (z-m) and target logit of some rows."""

    def __init__(self, hidden: torch.Tensor) -> None:
        rows = hidden.shape[:1]
        self.m = hidden.new_full(rows, -torch.inf, dtype=torch.float32)
        self.s, self.c, self.target = (torch.zeros_like(self.m) for _ in range(3))

    def add(self, z: torch.Tensor, e: torch.Tensor, index: torch.Tensor) -> None:
        """Take in one tile of logits; overwrites `z`, leaves e^(z - m) in `e`."""
        here, at = _inside(index, z.shape[1])
        self.target = torch.where(here, z.gather(1, at)[:, 0], self.target)
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


class Chunks:
    """Chunks of rows one after the other, the logits of the whole shard kept from a chunk's forward
    to its backward in room that all chunks share."""

    def __init__(self, rows: int, weight_VD: torch.Tensor, scale: float) -> None:
        """`rows`: of the largest chunk."""
        self._weight_VD, self._scale = weight_VD, scale
        self._tiles = TILES[weight_VD.device.type]
        widths = [v.stop - v.start for v in self._columns()]
        like = functools.partial(weight_VD.new_empty, dtype=torch.float32)
        self._z_room, self._e_rooms = (
            like(rows * max(widths, default=0)),
            [like(rows * w) for w in widths],
        )

    def _columns(self) -> Iterator[slice]:
        return slices(self._weight_VD.shape[0], self._tiles.columns)

    def forward(self, hidden: torch.Tensor, local_targets: torch.Tensor) -> torch.Tensor:
        """[4, C] of `Online.statistics`; keeps e^(z - centre) of each tile, whose centre is the
        maximum up to there."""
        self._scaled = factor(hidden, self._scale, self._tiles)
        online = Online(self._scaled.rows)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for columns, room in zip(self._columns(), self._e_rooms, strict=True):
            weight = columns_of(self._weight_VD[columns], self._scaled)
            e = _part(room, hidden, weight)
            online.add(logits(self._scaled, weight, self._z_room), e, local_targets - columns.start)
            self._kept.append((e, online.m))
        return online.statistics()

    def backward(
        self,
        local_targets: torch.Tensor,
        m: torch.Tensor,
        log_s: torch.Tensor,
        slope: torch.Tensor,
        d_hidden: torch.Tensor,
        d_weight_VD: torch.Tensor,
    ) -> None:
        """Add the gradients of the last chunk, d loss / d logprob being `slope`; that of the hidden
        states is still without the temperature."""
        for columns, (e, centre) in zip(self._columns(), self._kept, strict=True):
            g = e.mul_((-slope * (centre - m).exp() * (-log_s).exp())[:, None])
            add_at_targets(g, local_targets - columns.start, slope)
            weight = columns_of(self._weight_VD[columns], self._scaled)
            add_gradients(d_hidden, d_weight_VD[columns], g, self._scaled, weight)


def slices(count: int, size: int) -> Iterator[slice]:
    """[0, count) cut into parts of `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _scratch(hidden_RD: torch.Tensor, columns: int, tiles: Tiles) -> torch.Tensor:
    """Room for one fp32 tile."""
    size = min(hidden_RD.shape[0], tiles.rows) * min(columns, tiles.columns)
    return hidden_RD.new_empty(size, dtype=torch.float32)


def _part(room: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The front of `room`, shaped as the tile of these rows and columns."""
    rows, columns = hidden.shape[0], weight.shape[0]
    return room[: rows * columns].view(rows, columns)


def logits(scaled: Factor, weight: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """One tile in fp32, at the front of `room`."""
    z = product(scaled.rows, weight.T, out=_part(room, scaled.rows, weight))
    return z if scaled.scale == 1.0 else z.mul_(scaled.scale)


def _inside(index: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether the row's target is in the tile, [R, 1] a column to look at). Without a list of the
    rows, for whose length the host would wait."""
    return (index >= 0) & (index < columns), index.clamp(0, columns - 1)[:, None]


def add_at_targets(g: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add a value per row to its target's entry, where the tile has it."""
    here, at = _inside(index, g.shape[1])
    added = torch.where(here, values, torch.zeros_like(values))
    g.scatter_(1, at, g.gather(1, at) + added[:, None])


def add_gradients(
    d_hidden: torch.Tensor,
    d_weight: torch.Tensor,
    g: torch.Tensor,
    scaled: Factor,
    weight: torch.Tensor,
) -> None:
    """The share of one tile; that of the hidden states is still without the temperature."""
    g = g.to(scaled.rows.dtype)
    add_product(d_hidden, g, weight)
    add_product(d_weight, g.T, scaled.rows, scaled.scale)


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
    add_at_targets(g, index, d_logprob)
    return g
