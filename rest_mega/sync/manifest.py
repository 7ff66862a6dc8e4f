"""conversion.json, the manifest of a converted checkpoint: what was read and written, whether it
still fits.

`check` is quick (sizes, small files, the architecture): it runs before every load. Every byte is
compared by `rest-mega convert FOLDER`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError
from rest_mega.sync.moving import ALGORITHM
from rest_mega.trainer.model import Architecture

NAME = "conversion.json"
REMEDY = "convert the checkpoint anew, or fetch the folder again"
_PACKAGES = ("rest-mega", "torch", "megatron-core")
_DATA = (".safetensors", ".distcp")
_SMALL = (".metadata", "common.pt", "metadata.json", "model.safetensors.index.json")


def write(
    folder: Path, source: Path, architecture: Architecture, tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """Describe the finished `folder`; `tensors` has shape, dtypes and checksums by Hugging Face
    name."""
    content = {
        "made_from": str(source),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "checksum": ALGORITHM,
        "architecture": _plain(architecture),
        "tensors": dict(tensors),
        "files": {file.name: _describe(file) for file in _described(folder)},
    }
    content["digest"] = _digest(content)
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n")


def check(folder: Path, architecture: Architecture | None) -> dict[str, Any] | None:
    """The manifest of `folder`, None when it has none; ConfigError when it is damaged, speaks of
    other files, or of another architecture than the one that will be loaded."""
    if not (folder / NAME).is_file():
        return None
    content = _read(folder / NAME)
    described, there = content["files"], {file.name: file for file in _described(folder)}
    for name in sorted(described.keys() | there.keys()):
        want, file = described.get(name), there.get(name)
        found = _describe(file) if file else None
        if found != want:
            raise ConfigError(
                f"{folder / name} is not the file of {NAME}: {found or 'missing'} instead of "
                f"{want or 'no such file'}; {REMEDY}"
            )
    if architecture is not None:
        _check_architecture(folder, content["architecture"], _plain(architecture))
    return content


def _read(file: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(file.read_text()))
        if content.pop("digest") != _digest(content):
            raise ValueError("its digest does not fit")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}); {REMEDY}") from error
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in _DATA or f.name in _SMALL)


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if file.name not in _SMALL:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _plain(architecture: Architecture) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(architecture)))


def _check_architecture(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was converted with {key}={_short(was.get(key))}, config.json now says "
                f"{_short(now.get(key))}; restore config.json or {REMEDY}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
