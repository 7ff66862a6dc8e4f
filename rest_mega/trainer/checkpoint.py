"""Checkpoints: parameters and optimizer state as a Megatron distributed checkpoint, plus the run's
own state.

Saving costs the loop a plan (a collective) and a fork: the child writes memory as it was, while
training goes on. Every rank checksums what it wrote; the head puts the checkpoint in its place when
all have written (see checkpoint_files). It loads at any TP, PP, VPP, EP and DP.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from rest_mega.config import ConfigError
from rest_mega.trainer.background import Background
from rest_mega.trainer.checkpoint_files import (
    EPISODES,
    candidates,
    checksum,
    complete,
    damage,
    damaged_file,
    folder_of,
    read_manifest,
    read_state,
    write_text,
)
from rest_mega.trainer.checkpoint_pickles import refuse_foreign
from rest_mega.trainer.device import results_queue
from rest_mega.trainer.parallel import Parallel
from rest_mega.trainer.trainer import Trainer

T = TypeVar("T")


# ------------------------------------------------------------------ saving


class Saver:
    """Saves checkpoints while training goes on, one at a time; every method is called by all ranks
    together."""

    def __init__(self, trainer: Trainer, run_dir: Path, keep: int) -> None:
        """`keep`: how many checkpoints stay."""
        self._trainer, self._run_dir, self._keep = trainer, run_dir, keep
        self._pending: _Pending | None = None

    def begin(self, step: int, state: Mapping[str, Any], episodes: str = "") -> Path | None:
        """Start writing the checkpoint of `step`, parameters and optimizer as they are now; an
        earlier one is completed first and returned. `episodes`: lines that this rank adds (see
        `read_episodes`)."""
        earlier = self.finish()
        whole = dict(state) | {"step": step, "optimizer_steps": self._trainer.optimizer_steps}
        folder = folder_of(self._run_dir, step)
        self._pending = _Pending(self._trainer, folder, whole, episodes)
        return earlier

    def poll(self) -> Path | None:
        """The checkpoint, if it became complete since the last call; does not wait."""
        return self.finish() if self._pending is not None and self._pending.ready() else None

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written and put it in its place; None when there
        was none.

        OSError on all ranks when one could not write: the checkpoints before it stay.
        """
        pending, self._pending = self._pending, None
        return pending.finish(self._keep) if pending else None


class _Pending:
    """One checkpoint that is being written."""

    def __init__(
        self, trainer: Trainer, folder: Path, state: Mapping[str, Any], episodes: str
    ) -> None:
        from megatron.core import dist_checkpointing

        self._episodes = episodes
        self._parallel, self._folder, self._state = trainer.parallel, folder, state
        self._partial = self._make_partial()
        self._request = dist_checkpointing.save(
            _sharded(trainer, is_loading=False),
            str(self._partial),
            async_sharded_save=True,
            **_mcore_strategy(dist_checkpointing.save),
        )
        self._writer = Background(self._write_call())

    def _make_partial(self) -> Path:
        """A folder that no other save writes to, made by the head."""

        def make() -> str:
            name = f"{self._folder.name}.partial-{secrets.token_hex(4)}"
            self._folder.parent.mkdir(exist_ok=True)  # not its parents: a lost run.dir is an error
            self._folder.with_name(name).mkdir()
            return name

        name = _agreed(self._parallel, lambda: make() if self._parallel.is_head else "")
        return self._folder.with_name(self._parallel.gather_text(name)[0])

    def _write_call(self) -> Callable[[], tuple[Any, dict[str, tuple[int, int]]]]:
        """What the child does: mcore's own writing; returns mcore's result and the sums of this
        rank's files."""
        request, partial, rank = self._request, self._partial, self._parallel.rank
        episodes, own = self._episodes, partial / EPISODES.format(rank)
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # to host memory

        def write() -> tuple[Any, dict[str, tuple[int, int]]]:
            sums: dict[str, tuple[int, int]] = {}
            if episodes:
                write_text(own, episodes)
                sums[own.name] = checksum(own)
            if request.async_fn is None:
                return None, sums
            request.async_fn(*arguments, **request.async_fn_kwargs)
            result = results_queue().get_nowait()
            if isinstance(result, Exception):
                free = shutil.disk_usage(partial).free / 2**20
                raise OSError(f"{result} ({free:.0f} MiB are free in {partial.parent})")
            return result, sums | {f.name: checksum(f) for f in partial.glob(f"__{rank}_*")}

        return write

    def ready(self) -> bool:
        """True when every rank has written its part."""
        return self._parallel.sum_one(self._writer.ready()) == self._parallel.world_size

    def finish(self, keep: int) -> Path:
        """Wait for all ranks, then let the head complete the checkpoint."""
        result, sums = _agreed(self._parallel, self._writer.result)
        if result is not None:
            results_queue().put(result)
        for finalize in self._request.finalize_fns:
            finalize()
        texts = self._parallel.gather_text(json.dumps(sums))
        everyone = {k: (v[0], v[1]) for text in texts for k, v in json.loads(text).items()}

        def end() -> None:
            complete(self._partial, self._folder, self._state, everyone, keep)

        _agreed(self._parallel, end if self._parallel.is_head else lambda: None)
        return self._folder


def _agreed(parallel: Parallel, call: Callable[[], T]) -> T:
    """What `call()` returns; where it raises OSError on some ranks, all ranks raise it."""
    value: T | None = None
    problem = ""
    try:
        value = call()
    except OSError as error:
        problem = f"rank {parallel.rank}: {error}"
    problems = [text for text in parallel.gather_text(problem) if text]
    if problems:
        raise OSError(
            f"the checkpoint cannot be written; the ones before it are intact. {problems[0]}"
        )
    return cast(T, value)


def _mcore_strategy(save_function: Any) -> dict[str, Any]:
    """mcore 0.17 and later choose an asynchronous strategy that needs another package unless told
    otherwise."""
    return (
        {"async_strategy": "mcore"}
        if "async_strategy" in inspect.signature(save_function).parameters
        else {}
    )


# ------------------------------------------------------------------ loading


def find_intact(parallel: Parallel, run_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint whose files are what was written, what is wrong with the newer ones),
    the same on every rank. All ranks read: each checks its share of the files."""
    problems: list[str] = []
    for name in parallel.gather_text("\n".join(map(str, candidates(run_dir))))[0].splitlines():
        problem = _find_damage(parallel, Path(name))
        if not problem:
            return Path(name), problems
        problems.append(problem)
    return None, problems


def _find_damage(parallel: Parallel, folder: Path) -> str:
    """What is wrong with a checkpoint, found by all ranks together; empty: nothing."""
    problem = parallel.gather_text(damage(folder) if parallel.is_head else "")[0]
    if problem:
        return problem
    mine = sorted(read_manifest(folder))[parallel.rank :: parallel.world_size]
    return next(filter(None, parallel.gather_text(damaged_file(folder, mine))), "")


@torch.no_grad()
def load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Set parameters, optimizer state and step count from `folder`; returns the run state. Any
    layout loads any.

    ConfigError when files are missing, truncated, or of another model.
    """
    from megatron.core import dist_checkpointing

    state = read_state(folder)
    with _refusing(folder):
        refuse_foreign(folder)
        loaded = dist_checkpointing.load(_sharded(trainer, is_loading=True), str(folder))
        _set_parameters(trainer, loaded)
        trainer.optimizer.load_state_dict(_with_empty_states(loaded["optimizer"]))
    trainer.optimizer_steps = int(state["optimizer_steps"])
    return state


def _with_empty_states(loaded: dict[Any, Any]) -> dict[Any, Any]:
    """The optimizer's state, or those of its parts by number. mcore leaves an empty `state` out:
    that of the experts' part on a stage without experts."""
    for part in loaded.values() if 0 in loaded else (loaded,):
        inner = part.get("optimizer", part)
        if "param_groups" in inner and "param_state" not in part:  # not DistributedOptimizer's
            inner.setdefault("state", {})
    return loaded


@torch.no_grad()
def load_parameters(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Set the parameters alone, of a trainer without optimizer; returns the run state."""
    from megatron.core import dist_checkpointing

    state = read_state(folder)
    with _refusing(folder):
        refuse_foreign(folder)
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
    """The first rank's own error, cut to a line unless it is ours: mcore lists every tensor of the
    checkpoint."""
    if isinstance(error, ConfigError):
        return str(error)
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
