"""The checksums that the ranks of a server report once they hold the weights that we sent.

SGLang joins q, k, v and gate, up, cuts parameters among its tensor ranks and pads embeddings; this
file does the same to each tensor that is sent and sums the pieces (rules of SGLang 0.5.23's
layers/linear.py, vocab_parallel_embedding.py and moe/fused_moe_triton/layer.py). Whatever a server
rearranges for its kernels cannot be compared: experts on CUDA, and experts that are spread over
ranks whole (ep_size), are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rest_mega.rollout.sglang_hashes import Sha, cuda_checksum
from rest_mega.rollout.sglang_weights import Bucket

_FUSED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
"""Hugging Face's projection -> the server's joined matrix and the place in it."""
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
_EXPERT = {
    "gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0),
    "w1": ("w13_weight", 0), "w3": ("w13_weight", 1), "w2": ("w2_weight", 0),
}  # fmt: skip
"""An expert's projection -> the server's tensor of all experts and the place in an expert's
part."""
_EXPERT_PARTS = {"w13_weight": 2, "w2_weight": 1}
_INTO_FFN, _OUT_OF_FFN = {"gate_proj", "up_proj", "w1", "w3"}, {"down_proj", "w2"}
_VOCAB_MULTIPLE = 64
"""Embeddings are padded with rows of zeros to a multiple of these."""
_CPU_FFN_MULTIPLE = 32
"""On a CPU each tensor rank's part of a feed-forward layer is padded with zeros to a multiple of
these (srt/configs/update_config.py)."""


@dataclass(frozen=True)
class Kind:
    """Servers of one kind report the same checksums of the same weights."""

    device: str
    """cpu or cuda."""
    tensor_size: int
    expert_size: int = 1


@dataclass(frozen=True)
class Heads:
    """What the shapes of a checkpoint do not say."""

    kv: int
    """Key-value heads."""
    experts: int
    """Experts of a layer; 0 for dense models."""


def read_heads(path: str) -> Heads:
    """From a checkpoint folder's config.json."""
    config = json.loads((Path(path) / "config.json").read_text())
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    return Heads(int(config.get("num_key_value_heads") or config["num_attention_heads"]), experts)


class Checksums:
    """Of one kind of server; takes the tensors in any order."""

    def __init__(self, kind: Kind, heads: Heads, device: str = "cpu") -> None:
        """`device`: where sums for CUDA servers are computed, many times faster on a GPU."""
        self._kind, self._heads, self._device = kind, heads, device
        self.ranks: list[dict[str, str]] = [{} for _ in range(kind.tensor_size)]
        """Per tensor rank: the server's name of a parameter -> its checksum."""
        self._waiting: dict[str, dict[int, torch.Tensor]] = {}
        self._experts: dict[str, _InOrder] = {}

    def add(self, bucket: Bucket) -> None:
        """Parts of a joined matrix wait for each other, an expert for those before it."""
        for name, tensor in bucket:
            if ".experts." in name:
                self._add_expert(name, tensor)
            else:
                self._add(name, tensor)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        head, _, last = name.rpartition(".")
        module, _, projection = head.rpartition(".")
        if projection not in _FUSED:
            self._sum(name, [(name, tensor)])
            return
        joined, place = _FUSED[projection]
        whole = f"{module}.{joined}.{last}"
        parts = self._waiting.setdefault(whole, {})
        parts[place] = tensor
        if len(parts) == _PARTS[joined]:
            del self._waiting[whole]
            names = [n for n, (matrix, _) in _FUSED.items() if matrix == joined]
            pairs = zip(names, (parts[i] for i in sorted(parts)), strict=True)
            self._sum(whole, [(f"{module}.{n}.{last}", part) for n, part in pairs])

    def _sum(self, whole: str, parts: Sequence[tuple[str, torch.Tensor]]) -> None:
        for rank, sums in enumerate(self.ranks):
            sums[whole] = self._checksum([self._cut(n, t, rank) for n, t in parts])

    def _checksum(self, pieces: Sequence[torch.Tensor]) -> str:
        if self._kind.device == "cuda":
            return cuda_checksum(torch.cat([piece.to(self._device) for piece in pieces]))
        sha = Sha()
        for piece in pieces:
            sha.add(piece)
        return sha.result()

    def _add_expert(self, name: str, tensor: torch.Tensor) -> None:
        if self._kind.device == "cuda" or self._kind.expert_size > 1:
            return
        layer, _, tail = name.partition(".experts.")
        number, projection, _ = tail.split(".")
        tensors, place = _EXPERT[projection]
        whole = f"{layer}.experts.{tensors}"
        parts, size = _EXPERT_PARTS[tensors], self._kind.tensor_size
        order = self._experts.setdefault(whole, _InOrder(self._heads.experts * parts, size))
        pieces = [self._cut(name, tensor, rank) for rank in range(size)]
        if order.add(int(number) * parts + place, pieces):
            del self._experts[whole]
            for sums, found in zip(self.ranks, order.results(), strict=True):
                sums[whole] = found

    def _cut(self, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a tensor that a tensor rank holds."""
        projection, last = name.split(".")[-2:]
        size = self._kind.tensor_size
        if projection in ("embed_tokens", "lm_head"):
            return _padded(tensor, size).chunk(size)[rank]
        if projection in ("k_proj", "v_proj"):
            return _kv(tensor, self._heads.kv, rank, size)
        if projection in _INTO_FFN:
            return _filled(tensor, 0, self._ffn_multiple).chunk(size)[rank]
        if projection in _OUT_OF_FFN and last == "weight":
            return _filled(tensor, 1, self._ffn_multiple).chunk(size, dim=1)[rank]
        if projection == "q_proj":
            return tensor.chunk(size)[rank]
        if projection == "o_proj" and last == "weight":
            return tensor.chunk(size, dim=1)[rank]
        return tensor

    @property
    def _ffn_multiple(self) -> int:
        size = self._kind.tensor_size
        return size * _CPU_FFN_MULTIPLE if self._kind.device == "cpu" else size

    def difference(self, ranks: Sequence[Mapping[str, str]]) -> list[str]:
        """Parameters whose checksum is not the server's on some rank, or that it lacks. What it has
        besides (a tied head, buffers) does not count."""
        if len(ranks) != len(self.ranks):
            return sorted(self.ranks[0])
        pairs = zip(self.ranks, ranks, strict=True)
        return sorted({n for own, its in pairs for n, s in own.items() if its.get(n) != s})


class _InOrder:
    """SHA-256, for each tensor rank, of the experts' parts in the experts' order."""

    def __init__(self, count: int, ranks: int) -> None:
        """`count`: parts in all."""
        self._count, self._next = count, 0
        self._digests = [Sha() for _ in range(ranks)]
        self._early: dict[int, list[torch.Tensor]] = {}

    def add(self, place: int, pieces: list[torch.Tensor]) -> bool:
        """What each rank holds of a part; True once all parts have been summed."""
        self._early[place] = pieces
        while (now := self._early.pop(self._next, None)) is not None:
            for digest, piece in zip(self._digests, now, strict=True):
                digest.add(piece)
            self._next += 1
        return self._next == self._count

    def results(self) -> list[str]:
        """Per rank."""
        return [digest.result() for digest in self._digests]


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    rows = len(tensor)
    fits = (rows + -rows % _VOCAB_MULTIPLE) % size == 0
    return _filled(tensor, 0, _VOCAB_MULTIPLE if fits else _VOCAB_MULTIPLE * size)


def _filled(tensor: torch.Tensor, axis: int, multiple: int) -> torch.Tensor:
    """Zeros after the last row (`axis` 0) or column (1), up to a multiple."""
    after = [0, 0] * (tensor.ndim - 1 - axis) + [0, -tensor.shape[axis] % multiple]
    return torch.nn.functional.pad(tensor, after)


def _kv(tensor: torch.Tensor, heads: int, rank: int, size: int) -> torch.Tensor:
    """Ranks beyond the number of heads hold a head again: ranks 0 and 1 the first, and so on."""
    if size <= heads:
        return tensor.chunk(size)[rank]
    return tensor.chunk(heads)[rank // (size // heads)]
