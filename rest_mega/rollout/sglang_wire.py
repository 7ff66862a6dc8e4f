"""A bucket of weights as SGLang reads it: one flat tensor and the table of what lies in it.

Within a host the bytes stay on the GPU: a request carries CUDA IPC handles, each of which one
tensor rank of a server opens. Elsewhere the bytes are in the request. Either way it is what SGLang
0.5.23 calls a flattened bucket and reads with an allow-list of names; we never unpickle.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Entry:
    """What stands in the table of a flat tensor."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


def entries(bucket: Bucket) -> list[Entry]:
    """The table of a bucket; holds none of its tensors."""
    return [Entry(name, t.shape, t.dtype, t.nbytes) for name, t in bucket]


def payload(table: Sequence[Entry], flat: torch.Tensor) -> str:
    """What /update_weights_from_tensor takes for one tensor rank, with load_format
    flattened_bucket: base64 of a pickle of `flat` and its table.

    A CPU tensor's bytes are inside. (SGLang's own pickler would pass file descriptors, which only
    work inside one process tree: on a CPU they kill the server.) Of a CUDA tensor there is a handle
    that must be opened exactly once: torch counts its readers, and frees the memory after the last.
    """
    written = io.BytesIO()
    _Pickler(written, protocol=4).dump({"flattened_tensor": flat, "metadata": _metadata(table)})
    return base64.b64encode(written.getbuffer()).decode("ascii")


def listed(table: Sequence[Entry]) -> dict[str, list[Any]]:
    """What /update_weights_from_distributed takes for the broadcast of the flat tensor."""
    return {
        "names": [entry.name for entry in table],
        "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in table],
        "shapes": [list(entry.shape) for entry in table],
    }


def _metadata(table: Sequence[Entry]) -> list[SimpleNamespace]:
    """The fields of SGLang's FlattenedTensorMetadata, which the server copies one by one; `numel`
    and the offsets count bytes."""
    rows, offset = [], 0
    for entry in table:
        stop = offset + entry.nbytes
        rows.append(
            SimpleNamespace(
                name=entry.name, shape=entry.shape, dtype=entry.dtype,
                start_idx=offset, end_idx=stop, numel=entry.nbytes,
            )
        )  # fmt: skip
        offset = stop
    return rows


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
