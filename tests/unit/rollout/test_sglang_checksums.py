"""What the ranks of a server must report: parameters joined, cut and padded as SGLang does.

tests/engine/test_sglang_tensor_parallel.py compares with a real server's ranks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rest_mega.rollout.embedded_engine import named_as_files
from rest_mega.rollout.sglang_checksums import Checksums, Kind, read_heads
from rest_mega.rollout.sglang_hashes import cuda_checksum
from rest_mega.rollout.sglang_weights import Bucket
from tests.support.models import save_model

LAYER = "model.layers.1."
HEADS, KV, DIM, FFN, EXPERT = 8, 2, 16, 96, 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Bucket]]:
    from transformers import AutoModelForCausalLM

    made = {}
    for family in ("qwen3", "qwen2", "qwen3_moe", "mixtral"):
        path = save_model(tmp_path_factory.mktemp(family), family, num_hidden_layers=2)
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        made[family] = (path, [(n, p.detach()) for n, p in named_as_files(loaded).items()])
    return made


def sha(*parts: np.ndarray) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def sums_of(path: Path, stream: Bucket, size: int) -> Checksums:
    sums = Checksums(Kind("cpu", size), read_heads(str(path)))
    for pair in stream:
        sums.add([pair])
    return sums


def rows(matrix: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows, zeros where there are none."""
    filled = np.zeros((last - first, *matrix.shape[1:]), matrix.dtype)
    found = matrix[first:last]
    filled[: len(found)] = found
    return filled


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_each_rank_holds_its_heads_rows_columns_and_words(
    models: dict[str, tuple[Path, Bucket]], family: str, size: int
) -> None:
    path, stream = models[family]
    named = {name: tensor.numpy() for name, tensor in stream}
    for order in (stream, stream[::-1]):
        sums = sums_of(path, order, size)
        for rank in range(size):
            q = slice(rank * HEADS * (dim := q_dim(family)) // size, None)
            q = slice(q.start, q.start + HEADS * dim // size)
            held = [range(KV), range(rank, rank + 1), range(rank // 2, rank // 2 + 1)]
            heads = {1: held[0], 2: held[1], 4: held[2]}[size]
            kv = slice(heads.start * dim, heads.stop * dim)
            part = {1: FFN, 2: 64, 4: 32}[size]  # in 32s on a CPU
            first, last = rank * part, (rank + 1) * part
            words = 320 // size  # 300 words in 64s
            attention, mlp = f"{LAYER}self_attn.", f"{LAYER}mlp."
            want = {
                f"{attention}qkv_proj.weight": sha(
                    named[f"{attention}q_proj.weight"][q],
                    named[f"{attention}k_proj.weight"][kv],
                    named[f"{attention}v_proj.weight"][kv],
                ),
                f"{attention}o_proj.weight": sha(
                    np.ascontiguousarray(named[f"{attention}o_proj.weight"][:, q])
                ),
                f"{mlp}gate_up_proj.weight": sha(
                    rows(named[f"{mlp}gate_proj.weight"], first, last),
                    rows(named[f"{mlp}up_proj.weight"], first, last),
                ),
                f"{mlp}down_proj.weight": sha(
                    np.ascontiguousarray(rows(named[f"{mlp}down_proj.weight"].T, first, last).T)
                ),
                "model.norm.weight": sha(named["model.norm.weight"]),
                "model.embed_tokens.weight": sha(
                    rows(named["model.embed_tokens.weight"], rank * words, (rank + 1) * words)
                ),
            }
            if family == "qwen2":
                want[f"{attention}qkv_proj.bias"] = sha(
                    named[f"{attention}q_proj.bias"][q],
                    named[f"{attention}k_proj.bias"][kv],
                    named[f"{attention}v_proj.bias"][kv],
                )
            assert want.items() <= sums.ranks[rank].items()


def q_dim(family: str) -> int:
    return {"qwen3": DIM, "qwen2": 8}[family]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_experts_of_a_layer_lie_in_two_tensors_on_each_rank(
    models: dict[str, tuple[Path, Bucket]], family: str
) -> None:
    path, stream = models[family]
    named = {name: tensor.numpy() for name, tensor in stream}
    mixture = LAYER + ("mlp" if family == "qwen3_moe" else "block_sparse_moe")
    gate, up, down = {
        "qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")
    }[family]  # fmt: skip
    part = {"qwen3_moe": 32, "mixtral": 64}[family]  # of 32 and 96, in 32s for each of two ranks
    for order in (stream, stream[::-1]):
        sums = sums_of(path, order, 2)
        for rank in (0, 1):
            into, out = [], []
            for expert in range(4):
                one = f"{mixture}.experts.{expert}."
                for name in (gate, up):
                    matrix = named[f"{one}{name}.weight"]
                    into.append(rows(matrix, rank * part, (rank + 1) * part))
                columns = rows(named[f"{one}{down}.weight"].T, rank * part, (rank + 1) * part).T
                out.append(np.ascontiguousarray(columns))
            assert sums.ranks[rank][f"{mixture}.experts.w13_weight"] == sha(*into)
            assert sums.ranks[rank][f"{mixture}.experts.w2_weight"] == sha(*out)
            assert sums.ranks[rank][f"{mixture}.gate.weight"] == sha(
                named[f"{mixture}.gate.weight"]
            )


def test_a_value_that_differs_on_one_rank_is_named(models: dict[str, tuple[Path, Bucket]]) -> None:
    path, stream = models["qwen3"]
    sums = sums_of(path, stream, 2)
    assert sums.difference([*sums.ranks]) == []
    assert sums.difference([rank | {"lm_head.weight": "its own"} for rank in sums.ranks]) == []
    other = [sums.ranks[0], sums.ranks[1] | {"model.norm.weight": "?"}]
    assert sums.difference(other) == ["model.norm.weight"]
    assert sums.difference([{}, {}]) == sums.difference(sums.ranks[:1]) == sorted(sums.ranks[0])


@pytest.mark.parametrize(
    ("length", "want"),
    [(5, "321657ab05f5ac06"), (4096, "b102894d88f91a78"), (32772, "5468eaabd25a9a5f")],
)
def test_the_checksum_of_cuda_servers_is_that_of_sglangs_kernel(length: int, want: str) -> None:
    """Recorded from the kernel itself, which tests/engine/test_sglang_hashes.py runs again."""
    assert cuda_checksum((torch.arange(length) * 37 % 251).to(torch.uint8)) == want


def test_cuda_servers_experts_and_spread_experts_are_left_out(
    models: dict[str, tuple[Path, Bucket]],
) -> None:
    path, stream = models["qwen3_moe"]
    for kind in (Kind("cuda", 2), Kind("cpu", 2, expert_size=2)):
        sums = Checksums(kind, read_heads(str(path)))
        sums.add(stream)
        assert not [name for name in sums.ranks[0] if ".experts." in name]
        assert f"{LAYER}self_attn.qkv_proj.weight" in sums.ranks[1]
