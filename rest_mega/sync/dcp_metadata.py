"""The `.metadata` of a torch.distributed.checkpoint folder, read so that nothing foreign runs.

The file is a pickle. The sole unpickler of the package: it knows the classes that describe a
checkpoint and refuses every other name before anything of that name is called.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

from rest_mega.config import ConfigError

_CHECKPOINT = "torch.distributed.checkpoint."
_KNOWN = {
    _CHECKPOINT + "metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    _CHECKPOINT + "planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds only what a checkpoint's description is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no checkpoint")


def read_metadata(folder: Path) -> Any:
    """torch's Metadata of the checkpoint; ConfigError when it is damaged or names anything else."""
    from torch.distributed.checkpoint.metadata import Metadata

    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"a {type(metadata).__name__} instead of Metadata")
        if not (isinstance(metadata.state_dict_metadata, dict)):
            raise ValueError("no tensors are described")
        if not isinstance(metadata.storage_data, dict):
            raise ValueError("no files are described")
    except Exception as error:  # a damaged pickle raises almost anything
        raise ConfigError(
            f"{file} is missing, damaged or forged ({type(error).__name__}: {error}); fetch or "
            "convert the checkpoint anew"
        ) from error
    return metadata
