"""`rest-mega doctor`: can this machine, and can these ranks together, carry a run?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega import launch
from rest_mega.cli import read
from rest_mega.config import ConfigError, RunConfig
from rest_mega.diagnosis import ERROR, OK, WARNING, Finding, findings
from rest_mega.environments import load_modules

TRIES_S = 120.0
"""Deadline of process groups and of all collectives together, besides their own seconds."""


def main(words: Sequence[str]) -> int:
    """Look at packages, GPUs, limits, run.dir, SGLang and, under torchrun, the links between the
    ranks. Exit code 1: at least one error; 70: ranks did not arrive, or one hung."""
    parser = argparse.ArgumentParser(
        "rest-mega doctor",
        usage="rest-mega doctor [CONFIG [section.key=value ...]] [--seconds N] [--wait N]\n"
        "       torchrun ... -m rest_mega doctor ...",
        description=main.__doc__,
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of trying links (10)")
    parser.add_argument("--wait", type=float, default=60.0, help="for all ranks, seconds (60)")
    known, rest = parser.parse_known_args(list(words))
    config = read(["train", *rest])[1] if rest else RunConfig()
    return examine(config, known.seconds, known.wait, folder=bool(rest))


def examine(config: RunConfig, seconds: float, wait: float, *, folder: bool) -> int:
    """What `main` does. `seconds`: of trying links; `wait`: until all ranks must have arrived;
    `folder`: whether run.dir is looked at."""
    mine = alone(config, folder=folder)
    if launch.world_size() == 1:
        text = "not tried: there is one rank; start it under torchrun as you would start the run"
        return _print({finding: [0] for finding in [*mine, Finding(OK, "links", text)]}, 1)
    from rest_mega.trainer import parallel
    from rest_mega.watchdog import HUNG, Watchdog

    rank, size = launch.rank(), launch.world_size()
    deadlines = {"join": wait, "start": wait + TRIES_S + seconds}
    try:
        store = parallel.meet(wait)
        watchdog = Watchdog(store, rank, size, Path(config.run.dir) / "hang", deadlines)
        watchdog.arrive()
    except (TimeoutError, ConnectionError) as error:
        text = f"not all ranks arrived within {wait:.0f} s: {error}"
        remedy = "look at the output of those that are missing, and at docs/troubleshooting.md"
        if launch.local_rank() == 0:
            _print({f: [rank] for f in [*mine, Finding(ERROR, "ranks", text, remedy)]}, size)
        return HUNG
    watchdog.start()
    try:
        return _together(config, mine, store, seconds, folder)
    except BaseException as error:
        watchdog.tell(error)
        raise
    finally:
        watchdog.close()


def alone(config: RunConfig, *, folder: bool) -> list[Finding]:
    """What this rank finds without the others."""
    from rest_mega.diagnosis import folder as folders
    from rest_mega.diagnosis import machine, servers, software

    needed = _needed(config)  # on every rank: what is wrong with the model stops all of them
    found = [*software.look(config), *machine.look(config)]
    if launch.local_rank() == 0:
        found += servers.look(config)
        found += folders.look(Path(config.run.dir), needed) if folder else []
    return found


def _needed(config: RunConfig) -> float:
    """Bytes that a run of this config keeps in run.dir; 0 where it has no model."""
    from rest_mega.planning.storage import storage
    from rest_mega.trainer.model import read_architecture

    if not config.model.path:
        return 0.0
    load_modules(config.environment.modules)  # they may add the model's family
    replicas = max(1, launch.world_size() // config.parallel.replica_size)
    return float(storage(read_architecture(config.model.path), config, replicas).total)


def _together(
    config: RunConfig, mine: list[Finding], store: Any, seconds: float, folder: bool
) -> int:
    """All ranks are there: exchange what they found, and where that is no error, try the links."""
    from rest_mega.diagnosis import folder as folders
    from rest_mega.diagnosis import links, machine, software
    from rest_mega.trainer import parallel

    rank, size = launch.rank(), launch.world_size()
    if folder:
        mine = [*mine, folders.shared(Path(config.run.dir), store, rank, size, seconds)]
    try:
        config.check_world(size)
    except ConfigError as error:
        mine = [*mine, Finding(ERROR, "ranks", str(error), "see parallel.* of the config")]
    store.set(f"doctor/{rank}", f"{launch.machine()}\n{findings.dumps(mine)}")
    texts = [store.get(f"doctor/{r}").decode().partition("\n") for r in range(size)]
    found = findings.merged([findings.loads(text) for _, _, text in texts])
    for answer in findings.disagreements(found, (software.UNLIKE, machine.UNLIKE)):
        found[answer] = list(range(size))
    if rank == 0:
        _say_where([name for name, _, _ in texts])
    if _code(found):
        text = "not tried: errors above would stop or hang them"
        found[Finding(OK, "links", text)] = list(range(size))
    else:
        place = parallel.start(config.parallel, config.run.device, config.deadlines, store)
        found |= {finding: list(range(size)) for finding in links.look(place, seconds)}
        parallel.stop()
    if rank == 0:
        _print(found, size)
        store.set("doctor/told", "1")
    store.get("doctor/told")  # torchrun ends all when the first of them fails
    return _code(found)


def _say_where(machines: Sequence[str]) -> None:
    for name in dict.fromkeys(machines):
        ranks = [rank for rank, one in enumerate(machines) if one == name]
        sys.stdout.write(f"{findings.told(ranks)} on {name}\n")


def _print(found: Mapping[Finding, Sequence[int]], size: int) -> int:
    """Print findings and their count; returns the exit code."""
    levels = [finding.level for finding in found]
    sys.stdout.write("\n".join(findings.lines(found, size)) + "\n")
    sys.stdout.write(f"{levels.count(ERROR)} errors, {levels.count(WARNING)} warnings\n")
    sys.stdout.flush()
    return _code(found)


def _code(found: Mapping[Finding, Sequence[int]]) -> int:
    return int(any(finding.level == ERROR for finding in found))
