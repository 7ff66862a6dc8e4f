"""Hugging Face safetensors <-> Megatron distributed checkpoint (`torch_dist`), block by block,
verified.

Whatever the model's size, memory holds a few blocks of rows. Every Hugging Face tensor's bytes are
summed as they are read and as they are written; afterwards the result is read back through the
other direction's reader and must give the same sums: what would be converted back is bit for bit
what was written. Only then does the target appear under its name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rest_mega.config import ConfigError, require
from rest_mega.sync import manifest
from rest_mega.sync.byte_ranges import Extent, Rows, blocks
from rest_mega.sync.export import copy_side_files
from rest_mega.sync.load import open_rows
from rest_mega.sync.moving import ALGORITHM, Move, Mover, dtype_name, read_back
from rest_mega.sync.names import hf_names, hf_shape
from rest_mega.sync.places import Place, Places, find_places
from rest_mega.sync.safetensors_files import SHARD_BYTES, Entry, lay_out, plan, write_index
from rest_mega.sync.torch_dist import ITEM_BYTES, TorchDistRows, TorchDistWriter, is_torch_dist
from rest_mega.trainer.checkpoint_files import (
    STATE,
    damage,
    damaged_file,
    read_manifest,
    sync_to_disk,
)
from rest_mega.trainer.model import Architecture, read_architecture
from rest_mega.trainer.parallel import Parallel

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Full disk, quota, largest file."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One conversion, its inputs checked."""

    source: Path
    target: Path
    model: Path
    """The Hugging Face folder with config.json, tokenizer and chat template."""
    architecture: Architecture
    dtype: torch.dtype | None = None
    """Of the result; None: as the source has it."""
    verify: bool = True
    shard_bytes: int = SHARD_BYTES
    quiet: bool = False

    @property
    def to_torch_dist(self) -> bool:
        """The direction."""
        return not is_torch_dist(self.source)


def prepare(source: Path, target: Path, model: Path | None = None, **settings: Any) -> Job:
    """Find out what is to be done; ConfigError when folders are not what they should be."""
    require(source.is_dir(), f"{source} is no folder; name a checkpoint folder")
    require(
        not target.exists(),
        f"{target} exists already; move it away or name another folder",
    )
    model = model or model_folder(source)
    architecture = read_architecture(str(model))
    return Job(source, target, model, architecture, **settings)


def model_folder(source: Path) -> Path:
    """The folder with the config.json that belongs to a checkpoint: its own, or the `model.path` of
    the run that saved it."""
    if (source / "config.json").is_file():
        return source
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((source / "run_state.json").read_text())
        path = Path(state["config"]["model"]["path"])
        if (path / "config.json").is_file():
            return path
    raise ConfigError(
        f"{source} has no config.json, nor does it name a run's model that is here; give the "
        "Hugging Face folder of its architecture with --model"
    )


def convert(job: Job, parallel: Parallel) -> None:
    """Write the target, verify it, rename it into place; `parallel` is that of a single process.

    ConfigError when the source is damaged or holds other tensors than its config.json promises, or
    when the result does not read back as it was written or has no room.
    """
    known = _sums(job.source, manifest.check(job.source, job.architecture))
    if (job.source / STATE).is_file():
        _check_runs_own(job.source, contents=job.verify)
    places = find_places(job.architecture, parallel)
    rows = _open(job.source, job.architecture, places)
    with _appearing(job.target) as partial:
        lay = _lay_torch_dist if job.to_torch_dist else _lay_safetensors
        dtypes, tasks = lay(job, places, rows, partial)
        read, written = Mover(rows, job.architecture, job.quiet).run(tasks)
        if known is not None:
            _compare(job.source, "was damaged since its conversion", known, read)
        if job.verify:
            with _syncing(partial):
                result = _open(partial, job.architecture, places)
                back = read_back(result, job.architecture, job.quiet)
            _compare(job.target, "does not read back as it was written", written, back)
        tensors = {
            name: {
                "shape": list(hf_shape(name, job.architecture)),
                "source": {"dtype": dtype_name(rows.dtype(name)), "checksum": read[name]},
                "result": {"dtype": dtype_name(dtypes[name]), "checksum": written[name]},
            }
            for name in hf_names(job.architecture)
        }
        copy_side_files([job.model], partial, _main_dtype(dtypes))
        manifest.write(partial, job.source, job.architecture, tensors)


def check(folder: Path, parallel: Parallel, *, quiet: bool = False) -> int:
    """Compare every byte of a converted checkpoint with its manifest; the number of tensors."""
    architecture = read_architecture(str(folder))
    known = _sums(folder, manifest.check(folder, architecture))
    if known is None:
        raise ConfigError(f"{folder} has no {manifest.NAME}; only conversions can be checked")
    found = read_back(
        _open(folder, architecture, find_places(architecture, parallel)), architecture, quiet
    )
    _compare(folder, "was damaged since its conversion", known, found)
    return len(found)


def _check_runs_own(folder: Path, *, contents: bool) -> None:
    """ConfigError when a run's checkpoint differs from the manifest that the run wrote."""
    problem = damage(folder)
    if not problem and contents:
        problem = damaged_file(folder, read_manifest(folder))
    require(not problem, f"{problem}; convert the checkpoint before it")


def _open(folder: Path, architecture: Architecture, places: Places) -> Rows:
    return (
        TorchDistRows(folder, places) if is_torch_dist(folder) else open_rows(folder, architecture)
    )


@contextlib.contextmanager
def _syncing(folder: Path) -> Iterator[None]:
    """Its files go to the disk meanwhile."""
    with ThreadPoolExecutor(1, "sync") as worker:
        done = worker.submit(_sync, folder)
        yield
        done.result()


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        sync_to_disk(path)


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all went well and is removed otherwise."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        sync_to_disk(target.parent)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ConfigError(
            f"there is no room for {target} ({error.strerror}); make some, or name a folder on "
            "another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sums(folder: Path, known: Mapping[str, Any] | None) -> dict[str, str] | None:
    if known is None:
        return None
    require(
        known["checksum"] == ALGORITHM,
        f"{folder / manifest.NAME} has {known['checksum']} sums, this version compares "
        f"{ALGORITHM}; convert the checkpoint anew, or remove that file to go without",
    )
    return {name: tensor["result"]["checksum"] for name, tensor in known["tensors"].items()}


def _compare(folder: Path, what: str, want: Mapping[str, str], found: Mapping[str, str]) -> None:
    wrong = [n for n in sorted(want.keys() | found.keys()) if want.get(n) != found.get(n)]
    if wrong:
        raise ConfigError(
            f"{folder} {what}: {wrong[:5]} ({len(wrong)} tensors in all) differ; "
            f"{manifest.REMEDY}; should it happen again, test the disk and the memory"
        )


def _main_dtype(dtypes: Mapping[str, torch.dtype]) -> str:
    names = [dtype_name(dtype) for dtype in dtypes.values()]
    return max(set(names), key=names.count)


# ------------------------------------------------------------------ the two directions

Laid = tuple[dict[str, torch.dtype], list[list[Move]]]
"""Files with room for everything: (the result's dtype of each Hugging Face tensor, the moves that
fill them)."""


def _lay_torch_dist(job: Job, places: Places, rows: Rows, folder: Path) -> Laid:
    """Room for every parameter."""
    dtypes = _key_dtypes(places, rows, job.dtype)
    writer, tasks = TorchDistWriter(folder), []
    for place in places.parameters:
        dtype, moves = dtypes[place.key], list[Move]()
        for start, stop in blocks(place.shape, dtype, ITEM_BYTES):
            moves += _moves(place, start, stop, writer.add(place, start, stop, dtype))
        tasks.append(moves)
    for key, value in places.objects:
        writer.add_object(key, value)
    writer.finish()
    return {
        p.hf_name: dtypes[place.key] for place in places.parameters for p in place.pieces
    }, tasks


def _key_dtypes(places: Places, rows: Rows, wanted: torch.dtype | None) -> dict[str, torch.dtype]:
    """A key's tensor has one dtype: the wanted one, or one that holds all its pieces exactly."""
    parts: dict[str, list[torch.dtype]] = {}
    for place in places.parameters:
        parts.setdefault(place.key, []).extend(rows.dtype(p.hf_name) for p in place.pieces)
    return {
        key: wanted or functools.reduce(torch.promote_types, dtypes)
        for key, dtypes in parts.items()
    }


def _moves(place: Place, first: int, last: int, target: Extent) -> Iterator[Move]:
    """What fills `target` with a parameter's rows from `first` to `last`: parts of its pieces. Rows
    beyond them are padding."""
    row, width = 0, target.nbytes // (last - first)
    for piece in place.pieces:
        length = piece.stop - piece.start
        low, high = max(first, row), min(last, row + length)
        if low < high:
            start, stop = piece.start + low - row, piece.start + high - row
            offset = target.offset + (low - first) * width
            yield Move(piece.hf_name, start, stop, target.file, offset, target.dtype)
        row += length


def _lay_safetensors(job: Job, places: Places, rows: Rows, folder: Path) -> Laid:
    """Room for every tensor."""
    dtypes = {name: job.dtype or rows.dtype(name) for name in rows.names()}
    entries = [Entry(n, hf_shape(n, job.architecture), dtype) for n, dtype in dtypes.items()]
    files, tasks = plan(entries, job.shard_bytes), []
    for name, group in files.items():
        for tensor, extent in lay_out(folder / name, group).items():
            target = (extent.file, extent.offset, extent.dtype)
            tasks.append([Move(tensor, 0, extent.shape[0], *target)])
    names = {file: [entry.name for entry in group] for file, group in files.items()}
    write_index(folder, names, sum(entry.nbytes for entry in entries))
    return dtypes, tasks
