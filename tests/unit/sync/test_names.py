"""The table of names and layouts: every tensor of a checkpoint is somewhere, once, in its place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rest_mega.sync.names import TABLE, hf_names, hf_shape, pieces
from rest_mega.trainer.model import Architecture, Family

TE_ONLY = ("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight")
"""Where Transformer Engine's layers keep the two norms; local layers have modules of their own."""


@st.composite
def cuts(draw: Any) -> tuple[Architecture, int]:
    """A decoder and a tensor-parallel size that may cut it; KV heads fewer than ranks too."""
    kv_heads, per_group = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    heads, head_dim = kv_heads * per_group, 2 * draw(st.integers(1, 4))
    size = draw(st.sampled_from([s for s in (1, 2, 3, 4, 6, 8) if heads % s == 0]))
    assume(kv_heads % size == 0 or size % kv_heads == 0)
    assume((heads + 2 * kv_heads) * head_dim % size == 0)
    architecture = Architecture(
        family=Family(qkv_bias=draw(st.booleans()), qk_norm=draw(st.booleans())),
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 5)),
        ffn=size * draw(st.integers(1, 4)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 400)),
        tied=draw(st.booleans()),
        norm_eps=1e-6,
        max_positions=8,
        rope_inv_freq=(),
    )
    return architecture, size


def mcore_names(a: Architecture, unused: tuple[str, ...]) -> list[str]:
    """Every parameter of a model, over all pipeline stages."""
    return [
        row.mcore.replace("{i}", str(layer))
        for row in TABLE
        for layer in (range(a.layers) if "{i}" in row.mcore else range(1))
        if not row.mcore.endswith(unused)
        and (a.family.qkv_bias or not row.mcore.endswith(".bias"))
        and (a.family.qk_norm or not re.search("[qk]_layernorm", row.mcore))
        and (not a.tied or row.mcore != "output_layer.weight")
    ]


def numbered(a: Architecture) -> dict[str, torch.Tensor]:
    """A checkpoint in which no two numbers are equal."""
    tensors, start = {}, 1
    for name in hf_names(a):
        count = int(torch.Size(hf_shape(name, a)).numel())
        tensors[name] = torch.arange(start, start + count).reshape(hf_shape(name, a))
        start += count
    return tensors


def shard(name: str, a: Architecture, rank: int, size: int, tensors: Any) -> torch.Tensor:
    """The parameter as loading joins it."""
    parts = pieces(name, a, rank, size)
    return torch.cat(
        [tensors[p.hf_name].narrow(p.axis, p.start, p.stop - p.start) for p in parts], parts[0].axis
    )


@settings(deadline=None)
@given(cut=cuts(), te=st.booleans())
def test_every_number_of_a_checkpoint_lies_on_one_tensor_rank_or_whole_on_all(
    cut: tuple[Architecture, int], te: bool
) -> None:
    a, size = cut
    tensors = numbered(a)
    local = tuple(n for n in ("input_layernorm.weight", "pre_mlp_layernorm.weight") if te)
    found: list[torch.Tensor] = []
    for name in mcore_names(a, local or TE_ONLY):
        shards = [shard(name, a, rank, size, tensors) for rank in range(size)]
        kind = re.sub(r"layers\.\d+", "layers.{i}", name)
        whole = next(row.layout for row in TABLE if row.mcore == kind) == "whole"
        if whole:
            assert all(torch.equal(s, shards[0]) for s in shards)
        found += [s.flatten() for s in (shards[:1] if whole else shards)]
    total = sum(t.numel() for t in tensors.values())
    assert torch.equal(torch.cat(found).sort().values, torch.arange(1, total + 1))


@settings(deadline=None)
@given(cut=cuts())
def test_the_layouts_are_megatrons(cut: tuple[Architecture, int]) -> None:
    a, size = cut
    tensors = numbered(a)
    q, k, v = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    groups = [x.reshape(a.kv_heads, -1, a.hidden) for x in (q, k, v)]
    qkv = torch.cat(groups, dim=1).reshape(-1, a.hidden).chunk(size)
    gate, up = (tensors[f"model.layers.0.mlp.{x}_proj.weight"].chunk(size) for x in ("gate", "up"))
    down = tensors["model.layers.0.mlp.down_proj.weight"].chunk(size, dim=1)
    rows = torch.zeros(a.padded_vocab(size), a.hidden, dtype=torch.int64)
    rows[: a.vocab_size] = tensors["model.embed_tokens.weight"]
    for rank in range(size):
        want = {
            "decoder.layers.0.self_attention.linear_qkv.weight": qkv[rank],
            "decoder.layers.0.mlp.linear_fc1.weight": torch.cat([gate[rank], up[rank]]),
            "decoder.layers.0.mlp.linear_fc2.weight": down[rank],
        }
        for name, expected in want.items():
            assert torch.equal(shard(name, a, rank, size, tensors), expected), name
        real = shard("embedding.word_embeddings.weight", a, rank, size, tensors)
        padded = rows.chunk(size)[rank]
        assert torch.equal(real, padded[: len(real)])
        assert not padded[len(real) :].any()


@settings(deadline=None)
@given(cut=cuts())
def test_padded_vocabularies_hold_the_real_one_and_divide_by_the_ranks(
    cut: tuple[Architecture, int],
) -> None:
    a, size = cut
    padded = a.padded_vocab(size)
    assert a.vocab_size <= padded < a.vocab_size + 128 * size
    assert padded % 128 == padded % size == 0


def test_a_parameter_without_a_row_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'decoder.layers.3.mlp.router.weight' has no row.*add"):
        pieces("decoder.layers.3.mlp.router.weight", None, 0, 1)  # type: ignore[arg-type]
