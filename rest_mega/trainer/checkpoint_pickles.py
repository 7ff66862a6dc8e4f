"""The pickles in a checkpoint folder, read so that nothing foreign runs.

`.metadata` describes the tensors; `common.pt` and the objects between the tensors in *.distcp are
archives of torch.save. mcore and torch unpickle `.metadata` and those objects without a look at
what they name. The sole unpickler of the package: it knows the classes that describe a checkpoint
and refuses every other name before anything of that name is called.
"""

from __future__ import annotations

import importlib
import io
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


def refuse_foreign(folder: Path) -> None:
    """ConfigError when a pickle of the checkpoint is damaged or names anything that no checkpoint
    holds. To be called before mcore reads the folder."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    metadata = read_metadata(folder)
    if (folder / "common.pt").exists():
        _refuse(folder / "common.pt", 0, -1)
    for key, kind in metadata.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata):
            item = metadata.storage_data.get(MetadataIndex(key))
            name = getattr(item, "relative_path", "")
            if not name or Path(name).name != name:
                raise ConfigError(f"{folder}/.metadata: {key} has no place in a file of the folder")
            _refuse(folder / name, int(item.offset), int(item.length))


def _refuse(file: Path, begin: int, length: int) -> None:
    """By torch's own restricted unpickler, with the classes that mcore adds to it."""
    try:
        with file.open("rb") as stream:
            stream.seek(begin)
            torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        why = error.__context__ or error  # torch wraps it into advice to trust the file
        text = str(why).strip().partition("\n")[0].partition(". Please use")[0]
        raise ConfigError(
            f"{file} is damaged or forged ({type(why).__name__}: {text}); fetch or convert the "
            "checkpoint anew"
        ) from error
