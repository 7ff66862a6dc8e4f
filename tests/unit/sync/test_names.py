"""The table of names and layouts: every tensor of a checkpoint is somewhere, once, in its place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rest_mega.sync.names import Piece, hf_names, hf_shape, is_expert, pieces, rows
from rest_mega.trainer.experts import Experts
from rest_mega.trainer.model import Architecture, Family

TE_ONLY = ("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight")
"""Where Transformer Engine's layers keep the two norms; local layers, and the second before a
mixture, have modules of their own."""


@st.composite
def cuts(draw: Any) -> tuple[Architecture, int]:
    """A decoder and a tensor-parallel size that may cut it; KV heads fewer than ranks too."""
    kv_heads, per_group = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    heads, head_dim = kv_heads * per_group, 2 * draw(st.integers(1, 4))
    size = draw(st.sampled_from([s for s in (1, 2, 3, 4, 6, 8) if heads % s == 0]))
    assume(kv_heads % size == 0 or size % kv_heads == 0)
    assume((heads + 2 * kv_heads) * head_dim % size == 0)
    layers, mixture = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["", "mlp", "block_sparse_moe"])),
    )
    kinds = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    experts = Experts(draw(st.integers(1, 3)), 1, draw(st.integers(1, 4)), False, tuple(kinds))
    architecture = Architecture(
        family=Family(qkv_bias=draw(st.booleans()), qk_norm=draw(st.booleans()), experts=mixture),
        layers=layers,
        experts=experts if mixture else None,
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
        row.mcore.replace("{i}", str(layer)).replace("{e}", str(expert))
        for row in rows(a)
        for layer in (range(a.layers) if "{i}" in row.mcore else range(1))
        for expert in (range(a.experts.count) if a.experts and "{e}" in row.mcore else range(1))
        if (
            not row.mcore.endswith(unused)
            or (a.is_mixture(layer) and row.mcore.endswith("pre_mlp_layernorm.weight"))
        )
        and (a.family.qkv_bias or not row.mcore.endswith(".bias"))
        and (a.family.qk_norm or not re.search("[qk]_layernorm", row.mcore))
        and (not a.tied or row.mcore != "output_layer.weight")
        and row.layers in ("all", "mixture" if a.is_mixture(layer) else "dense")
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
        ranks = 1 if is_expert(name) else size
        shards = [shard(name, a, rank, ranks, tensors) for rank in range(ranks)]
        kind = re.sub(r"layers\.\d+", "layers.{i}", re.sub(r"experts\.\d+", "experts.{e}", name))
        whole = next(row.layout for row in rows(a) if row.mcore == kind) == "whole"
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
    if not a.is_mixture(0):
        gate, up = (
            tensors[f"model.layers.0.mlp.{x}_proj.weight"].chunk(size) for x in ("gate", "up")
        )
        down = tensors["model.layers.0.mlp.down_proj.weight"].chunk(size, dim=1)
    rows = torch.zeros(a.padded_vocab(size), a.hidden, dtype=torch.int64)
    rows[: a.vocab_size] = tensors["model.embed_tokens.weight"]
    for rank in range(size):
        want = {
            "decoder.layers.0.self_attention.linear_qkv.weight": qkv[rank],
        }
        if not a.is_mixture(0):
            want["decoder.layers.0.mlp.linear_fc1.weight"] = torch.cat([gate[rank], up[rank]])
            want["decoder.layers.0.mlp.linear_fc2.weight"] = down[rank]
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
    dense = Architecture(
        Family(), layers=4, hidden=4, ffn=4, heads=1, kv_heads=1, head_dim=4, vocab_size=4,
        tied=True, norm_eps=1e-6, max_positions=8, rope_inv_freq=(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'decoder.layers.3.mlp.router.weight' has no row.*add"):
        pieces("decoder.layers.3.mlp.router.weight", dense, 0, 1)


@pytest.mark.parametrize(
    ("mixture", "names"),
    [
        ("mlp", ("mlp.gate", "mlp.experts.7.gate_proj", "up_proj", "down_proj")),
        (
            "block_sparse_moe",
            ("block_sparse_moe.gate", "block_sparse_moe.experts.7.w1", "w3", "w2"),
        ),
    ],
)
def test_an_expert_is_its_gate_over_its_up_projection_and_never_cut(
    mixture: str, names: tuple[str, ...]
) -> None:
    a = Architecture(
        Family(experts=mixture), layers=3, hidden=5, ffn=4, heads=1, kv_heads=1, head_dim=4,
        vocab_size=4, tied=True, norm_eps=1e-6, max_positions=8, rope_inv_freq=(),
        experts=Experts(8, 2, 6, True, (True,) * 3),
    )  # fmt: skip
    router, gate, up, down = (f"model.layers.2.{n}.weight" for n in names)
    folder = gate.rpartition("7.")[0] + "7."
    up, down = folder + names[2] + ".weight", folder + names[3] + ".weight"
    assert pieces("decoder.layers.2.mlp.router.weight", a, 1, 2) == [Piece(router, 0, 0, 8)]
    assert pieces("decoder.layers.2.mlp.experts.7.linear_fc1.weight", a, 0, 1) == [
        Piece(gate, 0, 0, 6), Piece(up, 0, 0, 6)
    ]  # fmt: skip
    assert pieces("decoder.layers.2.mlp.experts.7.linear_fc2.weight", a, 0, 1) == [
        Piece(down, 1, 0, 6)
    ]
    assert (hf_shape(router, a), hf_shape(up, a), hf_shape(down, a)) == ((8, 5), (6, 5), (5, 6))
