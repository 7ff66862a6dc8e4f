"""Checkpoints: parameters and optimizer state as a Megatron distributed checkpoint, plus the run's
own state.

A checkpoint is a folder RUN/checkpoints/step_NNNNNNNN that appears whole: it is written under
another name and renamed when every rank has written its part. It loads at any TP, PP, VPP and DP.
`run_state.json` holds what is not a tensor (step, version, prompt cursor, entropy statistics,
config) as plain JSON.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rest_mega.config import ConfigError
from rest_mega.trainer.trainer import Trainer

_STATE = "run_state.json"
_KEYS = ("step", "optimizer_steps", "verb", "config")


def newest(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step in `run_dir`, or None."""
    found = [
        p
        for p in (run_dir / "checkpoints").glob("step_*")
        if (p / _STATE).is_file() and _step(p) is not None
    ]
    return max(found, key=lambda p: _step(p) or 0, default=None)


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match.group(1)) if match else None


def read_state(folder: Path) -> dict[str, Any]:
    """The run state kept in a checkpoint; ConfigError when it is damaged."""
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    missing = [key for key in _KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise _damaged(folder, f"it lacks {', '.join(missing)}")
    return dict(state)


def _damaged(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder / _STATE} cannot be read ({why}); move {folder} away to resume from the "
        "checkpoint before it, or start anew with run.fresh=true"
    )


def save(trainer: Trainer, run_dir: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`; every rank calls it
    together."""
    from megatron.core import dist_checkpointing

    parallel = trainer.parallel
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    if parallel.is_head:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    dist_checkpointing.save(
        _sharded(trainer, is_loading=False), str(partial), **_sync_options(dist_checkpointing.save)
    )
    parallel.barrier()
    if parallel.is_head:
        whole = dict(state) | {"step": step, "optimizer_steps": trainer.optimizer_steps}
        (partial / _STATE).write_text(json.dumps(whole, indent=1))
        _put_in_place(partial, folder)
        _prune(folder.parent, keep)
    parallel.barrier()
    return folder


def _sync_options(save_function: Any) -> dict[str, Any]:
    """mcore 0.17 and later choose an asynchronous strategy that needs another package unless told
    otherwise."""
    return (
        {"async_strategy": "mcore"}
        if "async_strategy" in inspect.signature(save_function).parameters
        else {}
    )


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what stood there is removed only afterwards."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what interrupted saves left behind."""
    complete = sorted(
        (p for p in folder.glob("step_*") if _step(p) is not None), key=lambda p: _step(p) or 0
    )
    for old in [*complete[:-keep], *folder.glob("step_*.partial"), *folder.glob("step_*.old")]:
        shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Set parameters, optimizer state and step count from `folder`; returns the run state. Any
    layout loads any.

    ConfigError when files are missing, truncated, or of another model.
    """
    from megatron.core import dist_checkpointing

    state = read_state(folder)
    with _refusing(folder):
        loaded = dist_checkpointing.load(_sharded(trainer, is_loading=True), str(folder))
        _set_parameters(trainer, loaded)
        trainer.optimizer.load_state_dict(loaded["optimizer"])
    trainer.optimizer_steps = int(state["optimizer_steps"])
    return state


@torch.no_grad()
def load_parameters(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Set the parameters alone, of a trainer without optimizer; returns the run state."""
    from megatron.core import dist_checkpointing

    state = read_state(folder)
    with _refusing(folder):
        _set_parameters(trainer, dist_checkpointing.load(_sharded_models(trainer), str(folder)))
    return state


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read becomes a ConfigError."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but its base

    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ConfigError(f"{what} ({_cause(error)}); {remedy}") from error


def _refusing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return refusing(
        f"checkpoint {folder} does not load",
        "if files are damaged, move it away to resume from the one before; if the model or the "
        "optimizer changed, use another run.dir or run.fresh=true",
    )


def _cause(error: BaseException) -> str:
    """The first rank's own error, cut to a line: mcore lists every tensor of the checkpoint."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


def _set_parameters(trainer: Trainer, loaded: Mapping[str, Any]) -> None:
    for index, module in enumerate(trainer.modules):
        module.load_state_dict(loaded[f"model{index}"])


def _sharded(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    models = _sharded_models(trainer)
    optimizer = trainer.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=_metadata(trainer)
    )
    return {**models, "optimizer": optimizer}


def _sharded_models(trainer: Trainer) -> dict[str, Any]:
    metadata = _metadata(trainer)
    return {
        f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(trainer.modules)
    }


def _metadata(trainer: Trainer) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": trainer.parallel.groups.dp_cp,
        "chained_optim_avoid_prefix": True,
    }
