"""A bucket of weights as SGLang reads it: one flat tensor and the table of what lies in it.

Within a host the bytes stay on the GPU: a request carries CUDA IPC handles, each of which one
tensor rank of a server opens. Elsewhere the bytes are in the request. Either way it is what SGLang
0.5.23 calls a flattened bucket and reads with an allow-list of names; we never unpickle.
"""

from __future__ import annotations

import base64
import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch

from rest_mega.rollout.sglang_weights import Bucket

DEVICE = 6
"""Place of the device's index among the arguments of torch's rebuild_cuda_tensor."""


def flatten(bucket: Bucket, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tensors' bytes one after the other on `device`: uint8, one dimension, a storage of its
    own."""
    total = sum(tensor.nbytes for _, tensor in bucket)
    flat, offset = torch.empty(total, dtype=torch.uint8, device=device), 0
    for _, tensor in bucket:
        part = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        flat[offset : offset + tensor.nbytes].copy_(part)
        offset += tensor.nbytes
    return flat


def payload(bucket: Bucket, flat: torch.Tensor) -> str:
    """What /update_weights_from_tensor takes for one tensor rank, with load_format
    flattened_bucket: base64 of a pickle of `flat` and its table.

    A CPU tensor's bytes are inside. (SGLang's own pickler would pass file descriptors, which only
    work inside one process tree: on a CPU they kill the server.) Of a CUDA tensor there is a handle
    that must be opened exactly once: torch counts its readers, and frees the memory after the last.
    """
    written = io.BytesIO()
    _Pickler(written, protocol=4).dump({"flattened_tensor": flat, "metadata": _table(bucket)})
    return base64.b64encode(written.getbuffer()).decode("ascii")


def listed(bucket: Bucket) -> dict[str, list[Any]]:
    """What /update_weights_from_distributed takes for the broadcast of the flat tensor."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def _table(bucket: Bucket) -> list[SimpleNamespace]:
    """The fields of SGLang's FlattenedTensorMetadata, which the server copies one by one; `numel`
    and the offsets count bytes."""
    table, offset = [], 0
    for name, tensor in bucket:
        stop = offset + tensor.nbytes
        table.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype,
                start_idx=offset, end_idx=stop, numel=tensor.nbytes,
            )
        )  # fmt: skip
        offset = stop
    return table


class _Pickler(pickle.Pickler):
    """CUDA tensors as IPC handles that name their GPU by its UUID, as SGLang's patched torch does:
    the same GPU has another index where other GPUs are visible."""

    def reducer_override(self, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.is_cuda):
            return NotImplemented
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[DEVICE]).uuid)
        return rebuild, (*arguments[:DEVICE], uuid, *arguments[DEVICE + 1 :])
