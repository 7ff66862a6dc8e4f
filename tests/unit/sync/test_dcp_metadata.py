"""A checkpoint's description is read as torch reads it, and nothing else in it is ever called."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from rest_mega.config import ConfigError
from rest_mega.sync.dcp_metadata import read_metadata


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": 7}
    checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_it_is_what_torch_itself_reads(saved: Path) -> None:
    ours, torchs = read_metadata(saved), FileSystemReader(saved).read_metadata()
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data


def test_a_description_cut_at_any_byte_is_refused(saved: Path) -> None:
    file = saved / ".metadata"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"\.metadata is missing, damaged or forged.*anew"):
            read_metadata(saved)


class Call:
    """Unpickled by calling `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "function",
    [os.mkdir, eval, getattr, __import__, torch.load, torch.save, torch.hub.load, pickle.loads],
)
def test_a_forged_description_is_refused_before_anything_runs(
    saved: Path, function: Any, protocol: int
) -> None:
    victim = saved / "made by the forger"
    forged = Metadata({"a": Call(function, str(victim))})  # type: ignore[dict-item]
    (saved / ".metadata").write_bytes(pickle.dumps(forged, protocol))
    with pytest.raises(ConfigError, match=r"forged \(UnpicklingError: it names .*no checkpoint"):
        read_metadata(saved)
    assert not victim.exists()


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, torch.float32, Metadata([])])  # type: ignore[arg-type]
def test_another_thing_than_a_description_is_refused(saved: Path, value: Any) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(ConfigError, match="missing, damaged or forged"):
        read_metadata(saved)


def test_a_folder_without_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.metadata is missing"):
        read_metadata(tmp_path)
