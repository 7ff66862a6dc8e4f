"""A bucket in the form that SGLang reads: nothing but names it allows, and every tensor comes out
as it went in. tests/engine/test_sglang_wire.py asks SGLang itself."""

from __future__ import annotations

import base64
import pickle
import pickletools

import torch
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.rollout.sglang_weights import Bucket
from rest_mega.rollout.sglang_wire import entries, flatten, listed, payload

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=6)


def drawn(shapes: list[list[int]], dtype: torch.dtype) -> Bucket:
    draw = torch.Generator().manual_seed(0)
    return [(f"{n}.weight", torch.randn(s, generator=draw).to(dtype)) for n, s in enumerate(shapes)]


def read(text: str) -> Bucket:
    """As a server cuts a flattened bucket (weight_sync/tensor_bucket.py)."""
    found = pickle.loads(base64.b64decode(text))
    flat = found["flattened_tensor"]
    return [
        (m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape))
        for m in found["metadata"]
    ]


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_read_is_what_was_sent(shapes: list[list[int]], dtype: torch.dtype) -> None:
    sent = drawn(shapes, dtype)
    got = read(payload(entries(sent), flatten(sent)))
    assert [name for name, _ in got] == [name for name, _ in sent]
    for (_, x), (_, y) in zip(got, sent, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


@given(SHAPES)
def test_a_broadcast_is_told_what_lies_in_the_flat_tensor(shapes: list[list[int]]) -> None:
    sent = drawn(shapes, torch.bfloat16)
    told, flat, offset = listed(entries(sent)), flatten(sent), 0
    for name, dtype, shape in zip(told["names"], told["dtypes"], told["shapes"], strict=True):
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        part = flat[offset : offset + size].view(getattr(torch, dtype)).reshape(shape)
        assert torch.equal(part, dict(sent)[name])
        offset += size
    assert offset == len(flat)


def test_a_transposed_tensor_is_sent_by_its_values() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    assert torch.equal(
        read(payload(entries([("t", tensor)]), flatten([("t", tensor)])))[0][1], tensor
    )


def test_a_payload_names_no_code_of_ours() -> None:
    sent = drawn([[2, 3]], torch.bfloat16)
    data = base64.b64decode(payload(entries(sent), flatten(sent)))
    words = {arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)}
    assert not {word for word in words if word.startswith(("rest_mega", "tests", "sglang"))}
