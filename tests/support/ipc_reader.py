"""A process that reads buckets of weights as an SGLang server does, without SGLang.

    python -m tests.support.ipc_reader

Reads a payload a line from stdin; answers each with a line of JSON: for every tensor its name,
shape, dtype, device, and the sum of its bytes weighted by their places.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
from typing import Any

import torch
from torch.multiprocessing import reductions

KNOWN = {
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"), ("torch", "Size"),
    ("torch", "Tensor"), ("torch.storage", "TypedStorage"), ("torch.storage", "UntypedStorage"),
    ("types", "SimpleNamespace"), ("torch", "uint8"), ("torch", "bfloat16"), ("torch", "float32"),
}  # fmt: skip
"""All names that a handle may use; SGLang's SafeUnpickler has them in its list."""
DEVICE = 6


def rebuild(*arguments: Any) -> torch.Tensor:
    """torch's rebuild_cuda_tensor where the device is told by its UUID (SGLang's patch_torch)."""
    devices = range(torch.cuda.device_count())
    by_uuid = {str(torch.cuda.get_device_properties(d).uuid): d for d in devices}
    device = by_uuid[arguments[DEVICE]]
    return reductions.rebuild_cuda_tensor(*arguments[:DEVICE], device, *arguments[DEVICE + 1 :])


class Reader(pickle.Unpickler):
    """Refuses every name that is not KNOWN."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in KNOWN, f"{module}.{name} is not among the server's names"
        return rebuild if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def summed(tensor: torch.Tensor) -> int:
    """Changes with every byte and with their order; exact."""
    bytes_B = tensor.contiguous().reshape(-1).view(torch.uint8).long()
    return int((bytes_B * (torch.arange(len(bytes_B), device=bytes_B.device) % 8191 + 1)).sum())


def described(name: str, tensor: torch.Tensor) -> list[Any]:
    """What the two processes compare."""
    return [name, list(tensor.shape), str(tensor.dtype), str(tensor.device), summed(tensor)]


def read(text: str) -> list[list[Any]]:
    """The tensors of one payload; all of them are let go again before it returns."""
    found = Reader(io.BytesIO(base64.b64decode(text))).load()
    flat, answer = found["flattened_tensor"], []
    for part in found["metadata"]:
        assert part.numel == part.end_idx - part.start_idx
        tensor = flat[part.start_idx : part.end_idx].view(part.dtype).reshape(part.shape)
        answer.append(described(part.name, tensor))
    return answer


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(read(line)) + "\n")
        sys.stdout.flush()
