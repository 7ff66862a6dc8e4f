"""The files of a run's checkpoints: names, manifest, what is intact, what is put in place and
removed.

    RUN/checkpoints/step_NNNNNNNN/          appears whole, by a rename
        *.distcp, .metadata, common.pt, ... Megatron's distributed checkpoint
        run_state.json                      what is not a tensor (step, prompt cursor, config, ...)
        episodes_R.jsonl                    what rank R's rollouts carry into the next step
        manifest.json                       size and CRC-32 of every other file, written last
    RUN/checkpoints/step_NNNNNNNN.partial-* being written, or left by a run that died
    RUN/checkpoints/step_NNNNNNNN.old       the same step's checkpoint before it was saved anew

A checkpoint whose files differ from its manifest is damaged: a run resumes from the one before it.
CRC-32 finds what a power cut or a full disk does to a file; it is no proof against forgery.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError

STATE, MANIFEST = "run_state.json", "manifest.json"
EPISODES = "episodes_{}.jsonl"
"""Of a rank."""
STATE_KEYS = ("step", "optimizer_steps", "verb", "config")

Sums = Mapping[str, tuple[int, int]]
"""File name -> (bytes, CRC-32)."""

_BLOCK = 2**24


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None for another folder."""
    match = re.fullmatch(r"step_(\d+)(\.old)?", folder.name)
    return int(match.group(1)) if match else None


def candidates(run_dir: Path) -> list[Path]:
    """The checkpoints of the run, the highest step first, damaged ones too; of a folder that is a
    checkpoint itself, it alone."""
    if (run_dir / MANIFEST).is_file():
        return [run_dir]
    found = {p: step_of(p) for p in (run_dir / "checkpoints").glob("step_*")}
    complete = [p for p, step in found.items() if step is not None]
    return sorted(complete, key=lambda p: (found[p] or 0, p.suffix != ".old"), reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The checkpoint with the highest step that looks intact (contents not read), or None."""
    return next((p for p in candidates(run_dir) if not damage(p)), None)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint as far as names and sizes tell; empty: nothing."""
    try:
        expected = read_manifest(folder)
        read_state(folder)
    except ConfigError as error:
        return str(error)
    for name, (size, _) in expected.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{folder / name} has {'no' if found is None else found} bytes, not {size}"
    return ""


def damaged_file(folder: Path, names: Iterable[str]) -> str:
    """The first of these files whose contents differ from the manifest; empty: none."""
    expected = read_manifest(folder)
    for name in names:
        if checksum(folder / name) != expected[name]:
            return f"{folder / name} does not have the contents that were written"
    return ""


def checksum(file: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with file.open("rb") as data:
        while block := data.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def read_manifest(folder: Path) -> Sums:
    """The manifest of a checkpoint; ConfigError when it is missing or damaged."""
    files = _read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise _unreadable(folder / MANIFEST, "it lists no files")
    try:
        return {name: (int(size), int(crc)) for name, (size, crc) in files.items()}
    except (TypeError, ValueError) as error:
        raise _unreadable(folder / MANIFEST, str(error)) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The run state kept in a checkpoint; ConfigError when it is missing or damaged."""
    state = _read_json(folder / STATE)
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise _unreadable(folder / STATE, f"it lacks {', '.join(missing)}")
    return state


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(file, str(error)) from error
    if not isinstance(tree, dict):
        raise _unreadable(file, f"it holds {type(tree).__name__}, no object")
    return tree


def _unreadable(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file} cannot be read ({why}); restore it, or set run.fresh=true")


def complete(partial: Path, folder: Path, state: Mapping[str, Any], sums: Sums, keep: int) -> None:
    """Write run state and manifest, put the checkpoint in its place and remove all but the newest
    `keep`; `sums`: of the files that other ranks wrote."""
    _write_json(partial / STATE, state)
    mine = {p.name: checksum(p) for p in partial.iterdir() if p.name not in sums}
    _write_json(partial / MANIFEST, {"files": {**sums, **mine}})
    _put_in_place(partial, folder)
    _prune(folder.parent, keep)


def _write_json(file: Path, tree: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(tree, indent=1))


def write_text(file: Path, text: str) -> None:
    """Write a file that lasts through a power cut."""
    with file.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def read_episodes(folder: Path) -> list[str]:
    """The lines of all ranks' unfinished episodes."""
    files = sorted(folder.glob(EPISODES.format("*")))
    return [line for file in files for line in file.read_text("utf-8").splitlines()]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what stood there is removed only afterwards."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    sync_to_disk(partial)
    os.replace(partial, folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_to_disk(path: Path) -> None:
    """Make a file's contents, or the renames in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what interrupted saves left behind."""
    ordered = candidates(checkpoints.parent)
    for old in [*ordered[keep:], *checkpoints.glob("step_*.partial*")]:
        shutil.rmtree(old, ignore_errors=True)
