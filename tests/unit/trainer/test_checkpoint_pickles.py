"""A checkpoint's pickles are read as torch reads them, and nothing else in them is ever called."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from rest_mega.config import ConfigError
from rest_mega.trainer.checkpoint_pickles import read_metadata, refuse_foreign


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


def append_object(folder: Path, key: str, value: Any) -> None:
    """`key` is `value` from here on."""
    metadata, file = read_metadata(folder), sorted(folder.glob("*.distcp"))[0]
    begin = file.stat().st_size
    with file.open("ab") as stream:
        torch.save(value, stream)
        length = stream.tell() - begin
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file.name, begin, length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_archives_that_hold_values_alone_pass(saved: Path) -> None:
    torch.save({"optimizer": {"step": 3, "betas": (0.9, 0.99)}}, saved / "common.pt")
    append_object(saved, "c", [None, 3, "text", torch.ones(2)])
    refuse_foreign(saved)


@pytest.mark.parametrize("function", [os.mkdir, eval, torch.load, torch.hub.load])
@pytest.mark.parametrize("where", ["common.pt", "an object"])
def test_a_forged_archive_is_refused_before_anything_runs(
    saved: Path, where: str, function: Any
) -> None:
    victim = saved / "made by the forger"
    forged = [Call(function, str(victim))]
    if where == "common.pt":
        torch.save(forged, saved / where)
    else:
        append_object(saved, "c", forged)
    with pytest.raises(ConfigError, match=rf"forged .*GLOBAL \S*{function.__name__} .*anew"):
        refuse_foreign(saved)
    assert not victim.exists()


@pytest.mark.parametrize("length", [0, 1, 100, 500])
def test_a_cut_archive_is_refused(saved: Path, length: int) -> None:
    torch.save({"optimizer": 3}, saved / "common.pt")
    refuse_foreign(saved)
    data = (saved / "common.pt").read_bytes()
    (saved / "common.pt").write_bytes(data[:length])
    with pytest.raises(ConfigError, match=r"common\.pt is damaged or forged .*anew"):
        refuse_foreign(saved)


@pytest.mark.parametrize("name", ["", "../elsewhere", "/etc/passwd"])
def test_an_object_outside_the_folder_is_refused(saved: Path, name: str) -> None:
    metadata = read_metadata(saved)
    metadata.storage_data[MetadataIndex("c")] = _StorageInfo(name, 0, 10)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="c has no place in a file of the folder"):
        refuse_foreign(saved)
