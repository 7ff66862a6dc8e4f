"""`rest-mega replay`: trains on a step of a run once more, from its kept episodes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega import launch, train
from rest_mega.cli import lay_over, overrides
from rest_mega.config import ConfigError, RunConfig, require
from rest_mega.telemetry.rows import METRICS, RUN, read_rows
from rest_mega.trainer.checkpoint_files import candidates, damage, step_of

UNTOLD = ("time/", "tokens/s", "eval/")
"""Metrics that depend on the clock, or that a replay does not take."""


def main(words: Sequence[str]) -> int:
    """Replay, and compare with what the run reported; returns the exit code: 0 when every metric of
    the step is the same to the last digit, 1 when one is not. ConfigError says what is missing."""
    given, more = _parser().parse_known_args(list(words))
    config = read(given.run, given.step, more)
    inputs = train.read(config)
    code = train.run(config, inputs)
    if code or launch.rank():
        return code
    return _compare(given.run, Path(config.run.dir), given.step)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest-mega replay",
        description="Train on step N of a run once more, from its checkpoint before N and its kept "
        "episodes (rollout.record=true, or a dump of the step), into RUN/replays/step_N. On CPUs "
        "and at the run's own layout the numbers are the same to the last digit. Under torchrun as "
        "train is.",
        epilog="What follows is laid over the run's config: section.key=value ...",
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--step", type=int, required=True, help="the step, from 1")
    return parser


def read(run: Path, step: int, words: Sequence[str] = ()) -> RunConfig:
    """The config of the replay."""
    try:
        tree: dict[str, Any] = json.loads((run / RUN).read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{run} is no run directory: its {RUN} says {error!r}") from error
    first, bank = _source(run, step)
    replayed: dict[str, Any] = {
        "run.dir": str(run / "replays" / f"step_{step}"), "run.fresh": True, "run.load": first,
        "run.until": step, "run.save_every": 0, "run.export": False, "run.export_every": 0,
        "rollout.engine": "replay", "rollout.replay": str(bank), "rollout.record": False,
        "data.held_out": "", "guard.mean": None, "guard.p99": None, "guard.max": None,
    }  # fmt: skip
    for key, value in [*replayed.items(), *overrides(list(words))]:
        lay_over(tree, key, value)
    return RunConfig.from_dict(tree)


def _source(run: Path, step: int) -> tuple[str, Path]:
    """(checkpoint to begin from, bank that has every step from there)."""
    require(step >= 1, f"--step {step}: steps count from 1")
    intact = {step_of(folder) or 0: str(folder) for folder in candidates(run) if not damage(folder)}
    start = max((saved for saved in intact if saved < step), default=0)
    for bank in (run / "bank", run / "dumps" / f"step_{step}" / "bank"):
        needed = [f"step_{number:08d}" for number in range(start + 1, step + 1)]
        missing = [name for name in needed if not list(bank.glob(f"{name}.*.jsonl"))]
        if not missing:
            return intact.get(start, ""), bank
    raise ConfigError(
        f"step {step} of {run} cannot be replayed: the checkpoint before it is of step {start}, "
        f"and {run / 'bank'} does not have all of {needed[0]} to {needed[-1]}. Runs keep them with "
        "rollout.record=true; a step that the guard refused is in RUN/dumps"
    )


def _compare(run: Path, replay: Path, step: int) -> int:
    """Print what differs."""
    was, now = (_row(folder, step) for folder in (run, replay))
    if not was:
        sys.stdout.write(f"step {step} replayed into {replay}; the run has not reported it\n")
        return 0
    differing = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    for name in differing:
        sys.stdout.write(f"{name:32} {was.get(name)} in the run, {now.get(name)} in the replay\n")
    same = "every metric is the same to the last digit" if not differing else "see above"
    sys.stdout.write(f"step {step} replayed into {replay}: {same}\n")
    return int(bool(differing))


def _row(folder: Path, step: int) -> Mapping[str, Any]:
    rows = [r for r in read_rows(folder / METRICS) if r["step"] == step and "train/loss" in r]
    kept = rows[-1] if rows else {}
    return {name: value for name, value in kept.items() if not name.startswith(UNTOLD)}
