"""mcore's forward_step: unpack a micro-batch, run the chunk, pick the trained rows, hand them to a
loss closure.

The only place that meets mcore's `[s, b, h]`. Rows whose loss mask is 0 (prompts, tool outputs,
padding) never reach the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rest_mega.losses.head import linear_logprob_entropy
from rest_mega.records import Microbatch
from rest_mega.trainer.model import head_weight
from rest_mega.trainer.parallel import Parallel

MicrobatchLoss = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(index of the micro-batch, logprob_R, entropy_R) -> scalar, already divided by the global
denominator."""


def local_part(batch: Microbatch, parallel: Parallel) -> Microbatch:
    """The tokens of `batch` that this context-parallel rank computes; `lengths_S` stays that of
    whole sequences.

    Every sequence is padded to a multiple of 2 C and cut into 2 C chunks, of which rank r takes r
    and 2C-1-r (mcore's zig-zag: equal work under a causal mask). Without context parallelism:
    `batch` itself.
    """
    size, rank = parallel.config.context, parallel.context_rank
    if size == 1:
        return batch
    unit = 2 * size * (parallel.config.tensor if parallel.config.sequence else 1)
    lengths = [-(-int(n) // unit) * unit for n in batch.lengths_S]
    starts = np.concatenate([[0], np.cumsum(batch.lengths_S)])
    keep: list[np.ndarray[Any, Any]] = []
    for start, true, padded in zip(starts, batch.lengths_S, lengths, strict=False):
        index = np.full(padded, -1)
        index[:true] = np.arange(start, start + true)
        chunks = index.reshape(2 * size, -1)
        keep += [chunks[rank], chunks[2 * size - 1 - rank]]
    return _select(batch, np.concatenate(keep), lengths)


def _select(batch: Microbatch, index: np.ndarray[Any, Any], lengths: list[int]) -> Microbatch:
    padding = index < 0

    def take(array: Any, fill: float) -> Any:
        return np.where(padding, np.asarray(fill, array.dtype), array[index])

    return replace(
        batch,
        ids_T=take(batch.ids_T, 0),
        targets_T=take(batch.targets_T, 0),
        positions_T=take(batch.positions_T, 0),
        lengths_S=np.array(lengths, dtype=np.int32),
        sample_T=take(batch.sample_T, -1),
        mask_T=take(batch.mask_T, False),
        regions_T=take(batch.regions_T, 0),
        advantages_T=take(batch.advantages_T, 0),
        drift_T=take(batch.drift_T, 0),
        logprobs_T=take(batch.logprobs_T, 0),
    )


@dataclass(frozen=True)
class Runner:
    """Runs mcore's schedule over micro-batches; every rank of the run calls it together."""

    chunks: Sequence[Any]
    parallel: Parallel
    vocab_size: int
    temperature: float
    head: str
    """model.head."""

    def train(self, batches: Sequence[Microbatch], loss: MicrobatchLoss) -> None:
        """Forward and backward of all micro-batches, gradients reduced and ready for the
        optimizer."""
        self._schedule(batches, loss, forward_only=False)

    @torch.no_grad()
    def score(
        self, batches: Sequence[Microbatch], keep: Callable[[int, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Forward only; `keep(index, logprob_R, entropy_R)` is called for every micro-batch on the
        last stage."""

        def loss(index: int, logprob_R: torch.Tensor, entropy_R: torch.Tensor) -> torch.Tensor:
            keep(index, logprob_R, entropy_R)
            return logprob_R.sum()

        self._schedule(batches, loss, forward_only=True)

    def _schedule(
        self, batches: Sequence[Microbatch], loss: MicrobatchLoss, *, forward_only: bool
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        iterators = [iter(enumerate(batches)) for _ in self.chunks]

        def forward_step(
            iterator: Iterator[tuple[int, Microbatch]], chunk: Any
        ) -> tuple[torch.Tensor, Any]:
            index, batch = next(iterator)
            hidden = run_chunk(chunk, batch, self.parallel.device)
            return hidden, lambda output: self._loss(index, batch, output, chunk, loss)

        many = len(self.chunks) > 1
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=list(self.chunks) if many else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=1,  # unused: micro-batches have their own lengths
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _loss(
        self, index: int, batch: Microbatch, hidden: torch.Tensor, chunk: Any, loss: MicrobatchLoss
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """mcore's (loss, tokens, report): zero tokens keep mcore from dividing, the loss has its
        denominator."""
        logprob_R, entropy_R = self._rows(batch, hidden, unwrap(chunk))
        value = loss(index, logprob_R, entropy_R)
        return value, torch.zeros((), dtype=torch.int, device=hidden.device), {}

    def _rows(
        self, batch: Microbatch, hidden: torch.Tensor, model: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        tensor, sequence = self.parallel.groups.tp, self.parallel.config.sequence
        if sequence:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=tensor
            )
        rows = torch.from_numpy(np.flatnonzero(batch.mask_T)).to(hidden.device)
        targets_R = torch.from_numpy(batch.targets_T[batch.mask_T].astype(np.int64)).to(
            hidden.device
        )
        weight_VD = head_weight(model)
        return linear_logprob_entropy(
            hidden.squeeze(1).index_select(0, rows),
            weight_VD,
            targets_R,
            group=tensor if self.parallel.config.tensor > 1 else None,
            temperature=self.temperature,
            vocab_start=self.parallel.tensor_rank * weight_VD.shape[0],
            vocab_size=self.vocab_size,
            reduce_hidden_grad=not sequence,
            form=self.head,
        )


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside mcore's DDP wrapper."""
    return getattr(chunk, "module", chunk)


def run_chunk(chunk: Any, batch: Microbatch, device: torch.device) -> torch.Tensor:
    """What the chunk makes of a micro-batch: hidden states [T, 1, D] (on the last stage after the
    final norm)."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.zeros(len(batch.lengths_S) + 1, dtype=torch.int32, device="cpu")
    bounds[1:] = torch.from_numpy(np.cumsum(batch.lengths_S))
    longest = int(batch.lengths_S.max())
    if device.type != "meta":  # whose tensors hold no numbers: a dry run
        bounds = bounds.to(device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    ids, positions = (
        torch.from_numpy(x.astype(np.int64)).unsqueeze(0).to(device)
        for x in (batch.ids_T, batch.positions_T)
    )
    return chunk(
        input_ids=ids, position_ids=positions, attention_mask=None, packed_seq_params=packed
    )
