"""SGLang's two checksums of a tensor, bit for bit, as 16 hexadecimal digits.

On a CPU the first 8 bytes of the SHA-256 of its bytes (srt/managers/mm_utils.py), on CUDA a 64-bit
mix of its 32-bit words (kernels/ops/memory/gpu_tensor_hash.py), both of SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

TILE = 8192
"""Words that are summed before they are mixed once more."""
_TILES_AT_A_TIME = 512
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
"""Per half of the result: the factor and the rotation of a word's place."""
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


class Sha:
    """SHA-256 of parts in their order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, part: torch.Tensor) -> None:
        """The next bytes."""
        flat: Any = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._digest.update(memoryview(flat))

    def result(self) -> str:
        """Of all parts so far."""
        return self._digest.hexdigest()[:16]


def cuda_checksum(tensor: torch.Tensor) -> str:
    """What a server on CUDA reports for these values; computed where `tensor` is."""
    bytes_B = tensor.contiguous().reshape(-1).view(torch.uint8)
    bytes_B = torch.nn.functional.pad(bytes_B, (0, -len(bytes_B) % 4))
    words_N = bytes_B.view(torch.int32)
    total = 0
    for start in range(0, len(words_N), TILE * _TILES_AT_A_TIME):
        part_N = words_N[start : start + TILE * _TILES_AT_A_TIME]
        high, low = (_tile_sums(part_N, start, len(words_N), half) for half in (0, 1))
        total += sum((h << 32) + lo for h, lo in zip(high, low, strict=True))
    return f"{_splitmix(total & _MASK64):016x}"


def _tile_sums(words_N: torch.Tensor, start: int, count: int, half: int) -> list[int]:
    """One half of each tile's value. Arithmetic is modulo 2^32 in int32, which wraps."""
    factor, rotation = _PLACES[half]
    place_N = torch.arange(start, start + len(words_N), device=words_N.device)
    place_N = _wrapped(place_N & _MASK32)
    rotated_N = (place_N << rotation) | _shifted(place_N, 32 - rotation)
    mixed_N = _mixed(words_N ^ ((place_N * factor + _signed(_SEEDS[half])) ^ rotated_N))
    padded_N = torch.nn.functional.pad(mixed_N, (0, -len(mixed_N) % TILE))
    sums = padded_N.view(-1, TILE).sum(1, dtype=torch.int64) & _MASK32
    tiles = _mixed(_wrapped(sums) ^ _signed(4 * count & _MASK32))
    return [value & _MASK32 for value in tiles.tolist()]


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ _shifted(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shifted(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shifted(x, 16)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros from the left."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _wrapped(x: torch.Tensor) -> torch.Tensor:
    """int64 of 0 to 2^32 - 1 -> the int32 of the same bits."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _splitmix(x: int) -> int:
    """splitmix64's finaliser."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
