"""mcore <-> Hugging Face names and layouts: one table, read in both directions.

Every parameter of a rank is the concatenation, along one axis, of *pieces*: slices of Hugging Face
tensors. Loading reads the pieces and joins them; exporting cuts the parameter and puts the pieces
back. Layouts:

- whole     the same on every tensor rank
- rows      cut along axis 0 (column-parallel layers); missing rows are vocabulary padding
- columns   cut along axis 1 (row-parallel layers)
- qkv       per key-value group its queries, key and value; the joined matrix is cut along axis 0
- gate_up   each rank's gate rows, then its up rows

An expert has its number among all of the layer's in its name, whatever mcore calls it on its rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rest_mega.trainer.model import Architecture
from rest_mega.trainer.parallel import Parallel


@dataclass(frozen=True)
class Piece:
    """`hf_name[start:stop]` along `axis`."""

    hf_name: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One kind of parameter: mcore's name, the layout, and the Hugging Face tensors in it."""

    mcore: str
    layout: str
    hf: tuple[str, ...]
    layers: str = "all"
    """all, or the layers whose feed-forward part is `dense` or a `mixture` of experts."""


_A, _M = "decoder.layers.{i}.self_attention.", "decoder.layers.{i}.mlp."
_HA, _HM = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
_QKV = (_HA + "q_proj.{p}", _HA + "k_proj.{p}", _HA + "v_proj.{p}")
_INPUT_NORM, _MLP_NORM = (
    ("model.layers.{i}.input_layernorm.weight",),
    ("model.layers.{i}.post_attention_layernorm.weight",),
)

TABLE = (
    Row("embedding.word_embeddings.weight", "rows", ("model.embed_tokens.weight",)),
    Row("decoder.layers.{i}.input_layernorm.weight", "whole", _INPUT_NORM),
    Row(_A + "linear_qkv.layer_norm_weight", "whole", _INPUT_NORM),
    Row(_A + "linear_qkv.weight", "qkv", tuple(name.replace("{p}", "weight") for name in _QKV)),
    Row(_A + "linear_qkv.bias", "qkv", tuple(name.replace("{p}", "bias") for name in _QKV)),
    Row(_A + "q_layernorm.weight", "whole", (_HA + "q_norm.weight",)),
    Row(_A + "k_layernorm.weight", "whole", (_HA + "k_norm.weight",)),
    Row(_A + "linear_proj.weight", "columns", (_HA + "o_proj.weight",)),
    Row("decoder.layers.{i}.pre_mlp_layernorm.weight", "whole", _MLP_NORM),
    Row(_M + "linear_fc1.layer_norm_weight", "whole", _MLP_NORM, "dense"),
    Row(
        _M + "linear_fc1.weight",
        "gate_up",
        (_HM + "gate_proj.weight", _HM + "up_proj.weight"),
        "dense",
    ),
    Row(_M + "linear_fc2.weight", "columns", (_HM + "down_proj.weight",), "dense"),
    Row("decoder.final_layernorm.weight", "whole", ("model.norm.weight",)),
    Row("output_layer.weight", "rows", ("lm_head.weight",)),
)


def _mixture(name: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts of a layer whose mixture is called `name`."""
    layer = f"model.layers.{{i}}.{name}."
    expert, ours = layer + "experts.{e}.", _M + "experts.{e}."
    parts = (f"{expert}{gate}.weight", f"{expert}{up}.weight")
    return (
        Row(_M + "router.weight", "whole", (layer + "gate.weight",), "mixture"),
        Row(ours + "linear_fc1.weight", "gate_up", parts, "mixture"),
        Row(ours + "linear_fc2.weight", "columns", (f"{expert}{down}.weight",), "mixture"),
    )


MIXTURES = {
    "": (),
    "mlp": _mixture("mlp", "gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": _mixture("block_sparse_moe", "w1", "w3", "w2"),
}
"""The rows that a family with experts (`Family.experts`) has beside TABLE."""


def rows(a: Architecture) -> tuple[Row, ...]:
    """The rows that may occur in this architecture."""
    return TABLE + MIXTURES[a.family.experts]


def hf_shape(name: str, a: Architecture) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor `name`."""
    kind = re.sub(r"^model\.layers\.\d+\.", "", name)
    if a.experts is not None and kind.startswith(f"{a.family.experts}.") and "gate." in kind:
        return (a.experts.count, a.hidden)
    if a.experts is not None and ".experts." in kind:
        down = kind.endswith(("down_proj.weight", "w2.weight"))
        return (a.hidden, a.experts.ffn) if down else (a.experts.ffn, a.hidden)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden),
        "lm_head.weight": (a.vocab_size, a.hidden),
        "model.norm.weight": (a.hidden,),
        "input_layernorm.weight": (a.hidden,),
        "post_attention_layernorm.weight": (a.hidden,),
        "self_attn.q_proj.weight": (q, a.hidden),
        "self_attn.k_proj.weight": (kv, a.hidden),
        "self_attn.v_proj.weight": (kv, a.hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.q_norm.weight": (a.head_dim,),
        "self_attn.k_norm.weight": (a.head_dim,),
        "self_attn.o_proj.weight": (a.hidden, q),
        "mlp.gate_proj.weight": (a.ffn, a.hidden),
        "mlp.up_proj.weight": (a.ffn, a.hidden),
        "mlp.down_proj.weight": (a.hidden, a.ffn),
    }
    return shapes[kind]


def hf_names(a: Architecture) -> list[str]:
    """Every tensor that a checkpoint of this architecture holds, in the model's order."""
    names: dict[str, None] = {}
    for row in rows(a):
        if (".bias" in row.mcore and not a.family.qkv_bias) or (
            "k_norm" in row.hf[0] and not a.family.qk_norm
        ):
            continue
        if ("q_norm" in row.hf[0] and not a.family.qk_norm) or (
            row.mcore == "output_layer.weight" and a.tied
        ):
            continue
        names.update(dict.fromkeys(_numbered(row, a)))
    return list(names)


def _numbered(row: Row, a: Architecture) -> Iterator[str]:
    """The row's Hugging Face names, of every layer and expert that has them."""
    kinds = {"all": (False, True), "dense": (False,), "mixture": (True,)}[row.layers]
    layers = [i for i in range(a.layers) if a.is_mixture(i) in kinds] if "{i}" in row.mcore else [0]
    experts = range(a.experts.count) if a.experts and "{e}" in row.mcore else range(1)
    for i in layers:
        for e in experts:
            yield from (_fill(hf, i, e) for hf in row.hf)


_NUMBER = re.compile(r"\.(layers|experts)\.(\d+)\.")
_LETTER = {"layers": "{i}", "experts": "{e}"}


def _fill(hf: str, layer: int, expert: int) -> str:
    return hf.replace("{i}", str(layer)).replace("{e}", str(expert))


def pieces(mcore_name: str, a: Architecture, tensor_rank: int, tensor_size: int) -> list[Piece]:
    """What `mcore_name` (with global numbers of layer and expert) is made of on one of the ranks
    that it is cut over (see `cut`), in order."""
    numbers = {what: int(n) for what, n in _NUMBER.findall(mcore_name)}
    kind = _NUMBER.sub(lambda found: f".{found[1]}.{_LETTER[found[1]]}.", mcore_name)
    row = next((row for row in rows(a) if row.mcore == kind), None)
    if row is None:
        raise ValueError(
            f"parameter {mcore_name!r} has no row in rest_mega.sync.names.TABLE; add one"
        )
    names = [_fill(hf, numbers.get("layers", 0), numbers.get("experts", 0)) for hf in row.hf]
    if row.mcore == "output_layer.weight" and a.tied:
        names = ["model.embed_tokens.weight"]
    return _LAYOUTS[row.layout](names, a, tensor_rank, tensor_size)


def _whole(names: list[str], a: Architecture, rank: int, size: int) -> list[Piece]:
    return [Piece(names[0], 0, 0, hf_shape(names[0], a)[0])]


def _rows(names: list[str], a: Architecture, rank: int, size: int) -> list[Piece]:
    each = a.padded_vocab(size) // size
    start, stop = (min(r * each, a.vocab_size) for r in (rank, rank + 1))
    return [Piece(names[0], 0, start, stop)]


def _columns(names: list[str], a: Architecture, rank: int, size: int) -> list[Piece]:
    each = hf_shape(names[0], a)[1] // size
    return [Piece(names[0], 1, rank * each, (rank + 1) * each)]


def _gate_up(names: list[str], a: Architecture, rank: int, size: int) -> list[Piece]:
    each = hf_shape(names[0], a)[0] // size
    return [Piece(name, 0, rank * each, (rank + 1) * each) for name in names]


def _qkv(names: list[str], a: Architecture, rank: int, size: int) -> list[Piece]:
    """The joined matrix goes group by group; a rank's share may cut a group when KV heads < TP."""
    queries = a.heads // a.kv_heads * a.head_dim
    joined = [
        Piece(name, 0, g * width, (g + 1) * width)
        for g in range(a.kv_heads)
        for name, width in zip(names, (queries, a.head_dim, a.head_dim), strict=True)
    ]
    each = sum(p.stop - p.start for p in joined) // size
    return list(_cut(joined, rank * each, (rank + 1) * each))


def _cut(joined: list[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The part of the concatenation `joined` between rows `start` and `stop`."""
    offset = 0
    for piece in joined:
        length = piece.stop - piece.start
        low, high = max(start - offset, 0), min(stop - offset, length)
        if low < high:
            yield Piece(piece.hf_name, piece.axis, piece.start + low, piece.start + high)
        offset += length


_LAYOUTS: dict[str, Callable[[list[str], Architecture, int, int], list[Piece]]] = {
    "whole": _whole,
    "rows": _rows,
    "columns": _columns,
    "gate_up": _gate_up,
    "qkv": _qkv,
}


def named_parameters(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """(mcore name with global numbers of layer and expert, parameter) of this rank's chunks,
    unwrapped or not."""
    for wrapped in chunks:
        chunk = getattr(wrapped, "module", wrapped)
        for name, parameter in chunk.named_parameters():
            found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if found:
                layer = chunk.decoder.layers[int(found.group(1))]
                rest = _global_expert(found.group(2), layer.mlp)
                name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
            yield name, parameter


_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.)?(?P<part>linear_fc[12])\.weight(?P<all>\d*)"
)
"""An expert's weight, of mcore's SequentialMLP or of Transformer Engine's grouped linear layers."""


def _global_expert(name: str, mlp: Any) -> str:
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name
    number = mlp.local_expert_indices[int(found["one"] or found["all"])]
    return f"mlp.experts.{number}.{found['part']}.weight"


def is_expert(name: str) -> bool:
    """Whether the mcore parameter `name` belongs to one expert."""
    return ".mlp.experts." in name


def cut(name: str, parallel: Parallel) -> tuple[int, int]:
    """(rank, size) among the ranks that the parameter `name` of this rank is cut over, for
    `pieces`."""
    return (0, 1) if is_expert(name) else (parallel.tensor_rank, parallel.config.tensor)
