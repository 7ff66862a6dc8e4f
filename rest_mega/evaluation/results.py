"""The folder of one evaluation: its settings, and a line of samples.jsonl for every sample that is
done.

- A line is on the disk before the next sample is judged; a sample that has a line is never drawn
  again, right or wrong.
- A half-written last line (the process was killed) is cut off; its sample is drawn anew.
- Results of other settings are not mixed in: another model, suite or way of sampling is refused.
  More tasks or more samples of each may be asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError, require
from rest_mega.evaluation.suite import Played, Result, Task, Verdict

SETTINGS = "settings.json"
PACKAGES = (
    "rest-mega", "torch", "transformers", "tokenizers", "megatron-core", "numpy", "sglang",
    "bfcl-eval",
)  # fmt: skip
"""Whose versions are kept with the results."""

Key = tuple[str, int]
"""(id of a task, number of the sample)."""


class Results:
    """What is done, and where the next sample goes. Several replicas write a file each."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], writer: int = 0) -> None:
        """`settings`: what must be the same for results to belong together, plain JSON; `writer`:
        the number of the replica.

        Raises ConfigError where the folder has results of other settings or a line that is none.
        """
        self.folder, self._lock = folder, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, settings)
        if writer == 0 and not (folder / SETTINGS).is_file():
            _keep_settings(folder / SETTINGS, settings)
        self._file = folder / ("samples.jsonl" if writer == 0 else f"samples.{writer}.jsonl")
        _cut_half_line(self._file)
        self.done = {key_of(row) for row in read_samples(folder)}

    def add(self, task: Task, sample: int, played: Played, verdict: Verdict) -> None:
        """Keep a sample, whatever the process meets next; from any thread."""
        line = json.dumps(_row(task, sample, played, verdict), default=_plain) + "\n"
        with self._lock, self._file.open("a", encoding="ascii") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def key_of(row: Mapping[str, Any]) -> Key:
    """Which sample a line of samples.jsonl holds."""
    return str(row["task"]), int(row["sample"])


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Every sample of a folder; ConfigError "path:line" for a line that is none. The last line may
    be half-written and is then left out."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("samples*.jsonl")):
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            rows.append(_sample(f"{file}:{number}", line))
    return rows


def _sample(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        key_of(row)
        good = isinstance(row["valid"], bool) and isinstance(row["kind"], str)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ConfigError(
            f"{place}: {line[:80]!r} is no sample of an evaluation; take the line out, and its "
            "sample is drawn anew, or give another folder"
        )
    return dict(row)


def results_of(rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> list[Result]:
    """The verdicts on `tasks` that the rows hold, each sample once, in the order of the tasks."""
    found = {key_of(row): row for row in reversed(rows)}
    numbers = sorted({sample for _, sample in found})
    return [
        Result(task, n, Verdict(row["valid"], row["kind"], row["reason"], row["details"]))
        for task in tasks
        for n in numbers
        if (row := found.get((task.prompt.id, n))) is not None
    ]


def packages() -> dict[str, str]:
    """Versions of what is installed of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder's results were made with; ConfigError where it has none."""
    try:
        return dict(json.loads((folder / SETTINGS).read_text("utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no results of `rest-mega eval --suite`: its {SETTINGS} says {error!r}"
        ) from error


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError where the folder has results of other settings."""
    if not (folder / SETTINGS).is_file():
        return
    before, now = read_settings(folder), json.loads(json.dumps(settings))
    names = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
    changes = "; ".join(f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names)
    require(
        not names,
        f"{folder} has results of other settings ({changes}): give another --out, or --fresh to "
        "begin anew there",
    )


def _keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    text = json.dumps({"settings": settings, "packages": packages()}, indent=1)
    partial.write_text(text + "\n", "utf-8")
    os.replace(partial, path)


def _cut_half_line(file: Path) -> None:
    if not file.is_file():
        return
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


def _row(task: Task, sample: int, played: Played, verdict: Verdict) -> dict[str, Any]:
    """All that is needed to audit a sample."""
    return {
        "task": task.prompt.id,
        "sample": sample,
        "category": task.category,
        "valid": verdict.valid,
        "kind": verdict.kind,
        "reason": verdict.reason,
        "details": verdict.details,
        "stop": played.stop,
        "note": played.note,
        "result": played.result,
        "turns": [dataclasses.asdict(turn) for turn in played.turns],
        "prompt_ids": played.prompt_ids,
        "output_ids": played.output_ids,
    }


def _plain(value: object) -> Any:
    """What JSON has not, as text; numpy's numbers as Python's."""
    item = getattr(value, "item", None)
    if callable(item):
        return item()
    return dict(value) if isinstance(value, Mapping) else repr(value)
