"""Our reader and writer of safetensors agree with the format's own library, and cut files are
refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rest_mega.config import ConfigError
from rest_mega.sync import byte_ranges
from rest_mega.sync.byte_ranges import Buffer, Files, blocks
from rest_mega.sync.safetensors_files import (
    DTYPES,
    Entry,
    SafetensorsRows,
    lay_out,
    plan,
    read_header,
)


@pytest.fixture
def held() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, odd sizes and no rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (1, 1), (0, 4), (2, 3, 2), (5, 1)]
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    named = zip(DTYPES.items(), drawn, strict=True)
    return {code: tensor.to(dtype) for (code, dtype), tensor in named}


def entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype)


def test_what_we_write_in_blocks_the_library_reads(
    held: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ((name, group),) = plan([entry(n, t) for n, t in held.items()], 10**6).items()
    files = Files(os.O_WRONLY)
    for written, place in lay_out(tmp_path / name, group).items():
        width = place.nbytes // max(place.shape[0], 1)
        for start in reversed(range(0, place.shape[0], 2)):
            rows = held[written][start : start + 2]
            files.write(place.file, place.offset + start * width, rows)
    found = load_file(tmp_path / name)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_what_the_library_writes_we_read_in_any_portion(
    held: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(held, tmp_path / "model.safetensors")
    rows, buffer = SafetensorsRows(tmp_path), Buffer()
    assert sorted(rows.names()) == sorted(held)
    for name, tensor in held.items():
        assert rows.extent(name).shape == tuple(tensor.shape)
        for start in range(tensor.shape[0]):
            for stop in range(start + 1, tensor.shape[0] + 1):
                out = buffer.take((stop - start, *tensor.shape[1:]), tensor.dtype)
                rows.read(name, start, out)
                want = tensor[start:stop]
                assert torch.equal(out.view(torch.uint8), want.view(torch.uint8))


def test_a_file_cut_at_any_byte_is_refused(held: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(held, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"truncated .*fetch it anew"):
            read_header(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match=r"bytes instead of"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    rows = SafetensorsRows(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors ends before byte .*fetch it anew"):
        rows.read("a", 0, torch.empty(100))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "I64"}, "dtype I64, known: F64"),
        ({"shape": [4]}, "12 bytes for shape"),
        ({"shape": [-3]}, "12 bytes for shape"),
        ({"data_offsets": [4, 16]}, "gap or overlap at byte"),
        ({"data_offsets": None}, "no safetensors file"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    change: dict[str, object], why: str, tmp_path: Path
) -> None:
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | change}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ConfigError, match=why):
        read_header(file)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"a stands in .*1\.safetensors and in .*2\.safetensors"):
        SafetensorsRows(tmp_path)


def test_shards_hold_at_most_the_limit_or_one_tensor() -> None:
    sizes = [3, 4, 10, 1, 1, 6]
    entries = [Entry(str(n), (size,), torch.float16) for n, size in enumerate(sizes)]
    files = plan(entries, 14)
    assert [[e.shape[0] for e in group] for group in files.values()] == [[3, 4], [10], [1, 1], [6]]
    assert next(iter(files)) == "model-00001-of-00004.safetensors"


@pytest.mark.parametrize("shape", [(10, 7), (10,), (1, 100), (3, 2, 5), (4, 0)])
def test_blocks_cover_all_rows_once_and_hold_the_limit_or_one_row(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_ranges, "BLOCK_BYTES", 60)
    cut = list(blocks(shape, torch.float32))
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(shape[0]))
    row = torch.empty(shape[1:]).numel() * 4
    assert all(stop - start == 1 or (stop - start) * row <= 60 for start, stop in cut)
