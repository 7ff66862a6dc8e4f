"""Packages and their versions, and the combinations that were tested."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from rest_mega.config import RunConfig
from rest_mega.diagnosis.findings import ERROR, OK, WARNING, Finding
from rest_mega.trainer import device

UNLIKE = Finding(
    ERROR,
    "versions",
    "ranks have different ones: see above",
    "give every machine the same environment, by one container image or lock file",
)
"""What it means where ranks see different ones."""


@dataclass(frozen=True)
class Tested:
    """A combination that a whole run was made with."""

    python: str
    torch: str
    mcore: str
    where: str


TESTED = (
    Tested("3.11", "2.13.0", "0.16.1", "CPU: the whole test suite, SGLang 0.5.23 (CPU build)"),
    Tested("3.11", "2.13.0", "0.19.2", "CPU: `make test-mcore-latest`"),
    Tested("3.12", "2.11.0", "0.19.2", "one H200, CUDA 13.0, local layers: tests/gpu (2026-11-27)"),
)
"""docs/doctor.md shows this table."""

_NAMED = ("torch", "megatron-core", "transformers", "transformer-engine", "sglang")


def look(config: RunConfig) -> list[Finding]:
    """Everything about packages; nothing is raised."""
    return [
        _versions(),
        *_requirements(),
        _tested(),
        _mcore(),
        _transformer_engine(config.model.layers),
        _apex(),
    ]


def version(name: str) -> str:
    """Of an installed distribution; empty where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _versions() -> Finding:
    named = [f"{name} {version(name)}" for name in _NAMED if version(name)]
    return Finding(OK, UNLIKE.check, ", ".join([f"Python {platform.python_version()}", *named]))


def _requirements() -> list[Finding]:
    """One error for each package that is missing or out of the range that rest-mega asks for."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("rest-mega") or []
    except importlib.metadata.PackageNotFoundError:
        text = "rest-mega itself is not installed, only imported: its requirements are not known"
        return [Finding(WARNING, "packages", text, "pip install -e .")]
    found, count = [], 0
    for one in map(Requirement, asked):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        count += 1
        there = version(one.name)
        if not there or not one.specifier.contains(there, prereleases=True):
            text = f"{one.name} is {there or 'not installed'}, needed: {one.specifier or 'any'}"
            found.append(Finding(ERROR, "packages", text, f"pip install '{one}'"))
    return found or [Finding(OK, "packages", f"all {count} required ones are in their ranges")]


def _tested() -> Finding:
    mine = (".".join(platform.python_version_tuple()[:2]), version("torch").split("+")[0])
    mcore = version("megatron-core")
    rows = [row for row in TESTED if (row.python, row.torch, row.mcore) == (*mine, mcore)]
    if rows:
        return Finding(OK, "combination", f"tested on {'; '.join(row.where for row in rows)}")
    known = "; ".join(f"{row.python} + {row.torch} + {row.mcore}" for row in TESTED)
    text = f"Python {mine[0]} + torch {mine[1]} + megatron-core {mcore} was not tested as a whole"
    return Finding(WARNING, "combination", text, f"`make test` shows if it works; tested: {known}")


def _mcore() -> Finding:
    try:
        device.adapt_mcore()
    except Exception as error:
        text = f"megatron-core cannot be imported: {_short(error)}"
        return Finding(ERROR, "megatron-core", text, "pip install --force-reinstall megatron-core")
    return Finding(OK, "megatron-core", "imports, and is adapted to this device")


def _transformer_engine(wanted: str) -> Finding:
    """`wanted`: model.layers."""
    check, on_gpu = "transformer-engine", torch.cuda.is_available()
    if not version(check):
        needed = wanted == "te"
        level = ERROR if needed else WARNING if on_gpu else OK
        text = "not installed: local layers are used" + (", but model.layers=te" * needed)
        remedy = "pip install 'transformer-engine[pytorch]' (needs CUDA), or model.layers=local"
        return Finding(level, check, text, remedy if level != OK else "")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        text = f"{version(check)} is installed and cannot be imported: {_short(error)}"
        remedy = "build it for this torch and CUDA (pip install --no-build-isolation), or remove it"
        return Finding(ERROR if on_gpu or wanted == "te" else WARNING, check, text, remedy)
    return Finding(OK, check, "imports" + ("" if on_gpu else "; not used: there is no GPU"))


def _apex() -> Finding:
    """NVIDIA's is not on PyPI, where another package has that name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(
            OK, "apex", "not installed: Transformer Engine's or torch's kernels are used"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
        text = f"NVIDIA's is installed, {'with' if fused else 'without'} fused weight gradients"
        return Finding(OK, "apex", text)
    text = "the package apex here is not NVIDIA's: PyPI has another of that name"
    return Finding(
        WARNING, "apex", text, "pip uninstall apex; build github.com/NVIDIA/apex from its source"
    )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
