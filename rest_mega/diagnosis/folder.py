"""The run directory: can it be written and locked, how fast, and do all machines see the same?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from rest_mega.diagnosis.findings import ERROR, OK, WARNING, Finding

CHECK = "run.dir"
PROBE_BYTES = 64 * 2**20
"""Written to measure the speed."""
_CHOOSE = "set run.dir to a folder on a file system that all machines share"


def look(folder: Path, needed: float) -> list[Finding]:
    """Write, lock and measure where `folder` is or will be; nothing is left behind. `needed`: bytes
    of the checkpoints that a run keeps in it; 0: not known."""
    at = _there(folder)
    probe = at / f".doctor-{uuid.uuid4().hex}"
    where = str(folder) if at == folder else f"{at}, where {folder} will be made,"
    try:
        return [_speed(probe, where), _lock(probe), _room(at, needed)]
    except OSError as error:
        return [Finding(ERROR, CHECK, f"{where} cannot be written: {error.strerror}", _CHOOSE)]
    finally:
        probe.unlink(missing_ok=True)


def _there(folder: Path) -> Path:
    """The nearest folder that exists."""
    return next(at for at in (folder, *folder.parents) if at.is_dir())


def _speed(probe: Path, where: str) -> Finding:
    block, begin = os.urandom(2**20), time.perf_counter()
    with probe.open("wb") as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    speed = PROBE_BYTES / seconds / 1e6
    return Finding(OK, CHECK, f"{where} can be written, {speed:,.0f} MB/s to the disk")


def _lock(probe: Path) -> Finding:
    with probe.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"its file system has no locks ({error.strerror}): two runs could use it at once"
            return Finding(WARNING, CHECK, text, "mount it with locks (NFS: without nolock)")
    return Finding(OK, CHECK, "can be locked: no two runs use it at once")


def _room(folder: Path, needed: float) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.0f} GB are free"
    if needed:
        text += f", {needed / 1e9:,.1f} GB are needed (checkpoints, exports)"
    if free < needed:
        remedy = "choose another run.dir, or lower run.keep_checkpoints, 2 at least"
        return Finding(ERROR, CHECK, text, remedy)
    return Finding(OK, CHECK, text)


def shared(folder: Path, store: Any, rank: int, world_size: int, seconds: float) -> Finding:
    """Does this rank see within `seconds` what rank 0 writes? Every rank calls it. `store`: the
    ranks' torch Store."""
    if rank == 0:
        probe = _there(folder).absolute() / f".doctor-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):  # `look` tells why
            probe.touch()
        store.set("doctor/probe", str(probe))
    probe = Path(store.get("doctor/probe").decode())
    try:
        seen = _appears(probe, seconds)
        store.add("doctor/looked", 1)
        while rank == 0 and store.add("doctor/looked", 0) < world_size:
            time.sleep(0.05)
    finally:
        if rank == 0:
            probe.unlink(missing_ok=True)
    if seen:
        return Finding(OK, CHECK, "files of rank 0 are seen")
    text = f"a file of rank 0 in {probe.parent} is not seen: checkpoints would be torn apart"
    return Finding(ERROR, CHECK, text, _CHOOSE)


def _appears(file: Path, seconds: float) -> bool:
    """Network file systems show another machine's new file after a while (NFS: acregmin 3 s)."""
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            return False
        if file.parent.is_dir():
            os.listdir(file.parent)  # asks the server anew
        time.sleep(0.1)
    return True
