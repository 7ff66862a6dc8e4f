"""The bank: episodes of the steps that no checkpoint covers yet, so that a crash repeats none.

    RUN/bank/step_NNNNNNNN.R.jsonl    what player R has played for the step

The first line of a file says what run it belongs to, every other one is an episode
(episode.row_of): a finished one as soon as it is over, and, once the step has enough, those that
were stopped on their way. A file that another configuration wrote is left out, a last line that a
crash has cut off too. Files of a step go when a checkpoint of it, or of a later one, is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from rest_mega.config import ConfigError, RunConfig
from rest_mega.records import Trajectory
from rest_mega.rollout.episode import Episode, Row, key_of_row, row_of

_SECTIONS = ("model", "tokenizer", "optimizer", "data", "environment", "rewards", "credit", "loss")
_ROLLOUT = ("prompts_per_step", "samples_per_prompt", "max_turns", "max_new_tokens", "max_tokens",
            "temperature", "top_p", "oversample", "unfinished")  # fmt: skip
_FORM = 1


def stamp_of(config: RunConfig) -> str:
    """What decides the episodes of a run: another policy, prompt, tool or limit is another stamp;
    layout, engine and everything that only watches are not part of it."""
    tree = config.to_dict()
    parts: dict[str, Any] = {name: tree[name] for name in _SECTIONS}
    parts["rollout"] = {name: tree["rollout"][name] for name in _ROLLOUT}
    parts["run"] = [tree["run"]["seed"], tree["run"]["steps"]]
    files = [Path(name) for name in config.environment.modules if name.endswith(".py")]
    parts["modules"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    text = json.dumps([_FORM, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass
class Shelf:
    """A step's episodes: those that were found, and a file for further ones."""

    rows: dict[str, Row]
    """Key of an episode -> the last that was kept of it."""
    file: TextIO | None = None
    """None where nothing is added."""
    later: tuple[Path, ...] = ()
    """What was kept for later steps: by a policy that will not come again if episodes of this step
    are played anew."""
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, members: Iterable[tuple[str, Episode | Trajectory]]) -> None:
        """Keep every (seed of its group, episode) that is not kept yet as it is."""
        if self.file is None:
            return
        for seed, member in members:
            row = row_of(member, seed)
            line, known = json.dumps(row), self.rows.get(key_of_row(row))
            if known is not None and json.dumps(known) == line:
                continue
            with self.lock:
                self.file.write(line + "\n")
                self.file.flush()
                for file in self.later:
                    file.unlink(missing_ok=True)
                self.later = ()

    def close(self) -> None:
        """Nothing more comes; what was kept lasts through a power cut."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


class Bank:
    """The files of one player's run."""

    def __init__(self, folder: Path, stamp: str, player: int) -> None:
        """`stamp`: of this run; `player`: whose file is written."""
        self._folder, self._stamp, self._player = folder, stamp, player

    def shelf(self, step: int) -> Shelf:
        """The step's episodes that any player has kept, and room for more."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = _rows(self._folder, step, self._stamp)
        mine = self._folder / _name(step, self._player)
        whole = mine.exists() and _mend(mine, self._stamp)
        handle = mine.open("a" if whole else "w")
        if not whole:
            handle.write(json.dumps({"stamp": self._stamp}) + "\n")
            handle.flush()
        later = tuple(file for file, kept in _files(self._folder).items() if kept > step)
        return Shelf(rows, handle, later)

    def prune(self, step: int) -> None:
        """Remove what was kept for `step` and the steps before it."""
        self._remove(lambda kept: kept <= step)

    def forget(self, step: int) -> None:
        """Remove what was kept for `step`: its episodes are not to be used again."""
        self._remove(lambda kept: kept == step)

    def _remove(self, of: Callable[[int], bool]) -> None:
        """The files of the steps that `of` picks; another player may be doing the same."""
        for file, kept in _files(self._folder).items():
            if of(kept):
                file.unlink(missing_ok=True)


class NoBank(Bank):
    """Keeps nothing and knows nothing, and removes what an earlier run has kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "", 0)
        self._remove(lambda kept: True)

    def shelf(self, step: int) -> Shelf:
        """Empty."""
        return Shelf({})


class ReadOnlyBank(Bank):
    """What another run, or a dump, has kept; nothing is added or removed."""

    def __init__(self, folder: Path) -> None:
        """ConfigError when there is nothing."""
        super().__init__(folder, "", 0)
        if not _files(folder):
            raise ConfigError(
                f"rollout.replay={str(folder)!r} holds no step_*.jsonl; name a run's bank "
                "(kept with rollout.record=true) or the bank folder of a dump"
            )

    def shelf(self, step: int) -> Shelf:
        """The step's episodes, whoever played them."""
        return Shelf(_rows(self._folder, step, None))

    def prune(self, step: int) -> None:
        """Nothing."""

    def forget(self, step: int) -> None:
        """Nothing."""


def as_lines(rows: Iterable[Row]) -> str:
    """Rows as text, a line for each."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(folder: Path, step: int, player: int, rows: Iterable[Row]) -> None:
    """A file of the bank by itself, for a dump."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _name(step, player)).open("w") as file:
        file.write(json.dumps({"stamp": ""}) + "\n")
        file.write(as_lines(rows))


def _rows(folder: Path, step: int, stamp: str | None) -> dict[str, Row]:
    """What any player has kept for the step: key of an episode -> its last row."""
    rows: dict[str, Row] = {}
    for file, kept in _files(folder).items():
        if kept == step:
            rows |= _read(file, stamp)
    return rows


def _read(file: Path, stamp: str | None) -> dict[str, Row]:
    """The rows of a file by key; none when it has another stamp (None: any).

    ConfigError for a line that is none of ours, unless it is the last and cut off.
    """
    lines = file.read_text().split("\n")
    whole = lines[:-1]  # what follows the last line break was cut off, or is nothing
    try:
        if not whole or (stamp is not None and json.loads(whole[0])["stamp"] != stamp):
            return {}
        rows = [json.loads(line) for line in whole[1:]]
        return {key_of_row(row): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} holds a line that is no episode ({error!r}); remove the file: its episodes "
            "are then played again"
        ) from error


def _mend(file: Path, stamp: str) -> bool:
    """Cut off what a crash has left after the last line break; False when the file is another
    run's."""
    raw = file.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        os.truncate(file, end)
    return end > 0 and json.loads(raw[: raw.index(b"\n")]).get("stamp") == stamp


def _name(step: int, player: int) -> str:
    return f"step_{step:08d}.{player}.jsonl"


def _files(folder: Path) -> dict[Path, int]:
    """The bank's files, and the step of each."""
    found = {f: re.fullmatch(r"step_(\d+)\.\d+\.jsonl", f.name) for f in folder.glob("step_*")}
    return {file: int(match.group(1)) for file, match in sorted(found.items()) if match}
