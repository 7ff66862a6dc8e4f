"""The zig-zag cut of context parallelism: every token on one rank, equal work on all."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ParallelConfig
from rest_mega.records import Microbatch
from rest_mega.trainer.forward import local_part
from rest_mega.trainer.packing import pack
from tests.support.models import random_samples

COLUMNS = [f.name for f in fields(Microbatch) if f.name.endswith("_T")]


def parts(batch: Microbatch, context: int, **more: Any) -> list[Microbatch]:
    config = ParallelConfig(context=context, **more)
    return [
        local_part(batch, SimpleNamespace(config=config, context_rank=rank))  # type: ignore[arg-type]
        for rank in range(context)
    ]


@settings(deadline=None)
@given(count=st.integers(1, 6), context=st.integers(1, 4), sequence=st.booleans())
def test_the_ranks_parts_put_back_are_the_micro_batch_and_padding(
    count: int, context: int, sequence: bool
) -> None:
    (batch,) = pack(random_samples(count, seed=count), 4096)
    cut = parts(batch, context, tensor=3, sequence=sequence)
    unit = 2 * context * (3 if sequence else 1)
    if context == 1:
        assert cut == [batch]
        return
    start = taken = 0
    for true, padded in zip(batch.lengths_S, cut[0].lengths_S, strict=True):
        assert padded % unit == 0
        assert 0 <= padded - true < unit
        chunk = padded // (2 * context)
        for name in COLUMNS:
            mine = [getattr(part, name)[taken : taken + 2 * chunk] for part in cut]
            # Rank r holds chunks r and 2C-1-r of the sequence.
            whole = np.concatenate([*(x[:chunk] for x in mine), *(x[chunk:] for x in mine[::-1])])
            np.testing.assert_array_equal(whole[:true], getattr(batch, name)[start : start + true])
            fill = -1 if name == "sample_T" else 0
            assert (whole[true:] == fill).all()
            assert whole.dtype == getattr(batch, name).dtype
        start, taken = start + true, taken + 2 * chunk
    assert {len(part.ids_T) for part in cut} == {taken}
    trained = sum(int(part.mask_T.sum()) for part in cut)
    assert trained == batch.mask_T.sum()
