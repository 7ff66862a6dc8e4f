"""Files of public tool-use data -> files of the trainer's prompts: checked, without duplicates,
within a length, split.

- every prompt that was converted is counted once: train + held_out + duplicates + too_long;
- a row is on the side of the split that a hash of (seed, its id) says, or the split that its data
  comes with: rows that are added, left out or moved change the side of no other row;
- of prompts that show the model the same messages and tools the first is kept, unless their
  environments or what these are given besides gold calls differ (a state, turns to come);
- files are written under another name beside their own and renamed when all are complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from rest_mega.config import ConfigError, one_of, require
from rest_mega.data.formats import FORMATS
from rest_mega.data.prompts import with_system
from rest_mega.data.rows import Row, RowError, digest, expect
from rest_mega.records import Prompt


@dataclass(frozen=True)
class Plan:
    """What is made of which files."""

    format: str
    """Name in `formats.FORMATS`."""
    sources: tuple[Path, ...]
    """Read in this order."""
    out: Path
    """Training prompts, JSONL."""
    held_out: Path | None = None
    """Held-out prompts; None: every prompt is a training prompt."""
    share: float = 0.1
    """Expected share of rows that are held out."""
    seed: int = 0
    """Of the split."""
    rejects: Path | None = None
    """Bad rows, one {"place", "reason", "row"} a line. None: `out` with .rejects.jsonl."""
    strict: bool = False
    """The first bad row is an error, and nothing is written."""
    system: str = ""
    """A system message put before prompts that carry none."""
    max_tokens: int = 0
    """Longer prompts are left out; 0: none are."""

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        require(0 < self.share < 1, f"held-out share {self.share} must be above 0 and below 1")
        require(self.max_tokens >= 0, f"max_tokens={self.max_tokens} must be positive, or 0")
        written = [self.out, self.rejects_path, *([self.held_out] if self.held_out else [])]
        names = [path.resolve() for path in (*self.sources, *written)]
        twice = [str(path) for path, count in Counter(names).items() if count > 1]
        require(not twice, f"{', '.join(twice)} is named twice; give every file a name of its own")

    @property
    def rejects_path(self) -> Path:
        """Where bad rows go."""
        return self.rejects or self.out.with_suffix(".rejects.jsonl")


@dataclass
class Report:
    """What became of the rows and prompts."""

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """The rule that was broken -> rows."""
    train: int = 0
    held_out: int = 0
    duplicates: int = 0
    conflicts: int = 0
    """Duplicates whose gold calls (without any: task) are not those of the prompt that was kept."""
    too_long: int = 0
    longest: int = 0
    """Tokens of the longest prompt that was kept; 0 where none were counted."""


def prepare(plan: Plan, tokens_of: Callable[[Prompt], int] | None = None) -> Report:
    """Write the files of `plan`; `tokens_of` counts a prompt's tokens for the length filter.

    Raises ConfigError for files that cannot be read, where no prompt is left, and (strict) for the
    first bad row.
    """
    require(
        tokens_of is not None or not plan.max_tokens,
        f"max_tokens={plan.max_tokens} needs a tokenizer that counts them",
    )
    work = _Work(plan, tokens_of)
    paths = {"train": plan.out, "rejects": plan.rejects_path}
    if plan.held_out:
        paths["held_out"] = plan.held_out
    with _drafts(paths) as files:
        for name, line in work.lines():
            files[name].write(line + "\n")
        _check_sides(plan, work.report)
    return work.report


def is_held_out(row_id: str, seed: int, share: float) -> bool:
    """Whether a row is held out: a hash of its id, read as a number in [0, 1), is below `share`."""
    hashed = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64 < share


class _Work:
    """One pass over the rows: what it has seen, and the count of it."""

    def __init__(self, plan: Plan, tokens_of: Callable[[Prompt], int] | None) -> None:
        self.report = Report()
        self._plan = plan
        self._form = FORMATS[plan.format]
        self._tokens_of = tokens_of
        self._places: dict[str, str] = {}
        """Id of every prompt that was not a duplicate -> its place."""
        self._golds: dict[str, str] = {}
        """Digest of what the model is shown -> digest of the gold."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """(train, held_out or rejects; a line of that file) in the order of the rows."""
        for source in self._plan.sources:
            for row in self._form.read(source):
                self.report.rows += 1
                try:
                    prompts = self._converted(row)
                except RowError as error:
                    if self._plan.strict:
                        raise
                    self.report.rejected[error.rule] += 1
                    yield "rejects", _reject_line(row, error)
                else:
                    yield from self._kept(row.place, prompts)

    def _converted(self, row: Row) -> list[_Candidate]:
        """A row's prompts; whatever is wrong with one of them is wrong with the row."""
        converted = self._form.convert(row.place, row.fields())
        prompts = [with_system(prompt, self._plan.system) for prompt in converted]
        candidates = [_Candidate(p, _line(row.place, p), *_digests(p)) for p in prompts]
        for one in candidates:
            used = self._places.get(one.prompt.id)
            if used and one.shown not in self._golds:
                rule = "an id of its own for every prompt"
                problem = f"id={one.prompt.id!r} was used at {used}; there must be {rule}"
                raise RowError(row.place, problem, f"there must be {rule}")
            if not self._plan.held_out and self._form.side(one.prompt.id) == "test":
                rule = "a file for held-out prompts, where rows of the data's test split go"
                raise RowError(row.place, f"id={one.prompt.id!r} needs {rule}", rule)
        return [replace(one, tokens=self._tokens(row.place, one.prompt)) for one in candidates]

    def _tokens(self, place: str, prompt: Prompt) -> int:
        if self._tokens_of is None:
            return 0
        specs = all(isinstance(tool, Mapping) for tool in prompt.tools)
        rule = "whole specs where tokens are counted: what a name stands for is known to a run only"
        expect(specs, place, "tools", prompt.tools, rule)
        try:
            return self._tokens_of(prompt)
        except ConfigError as error:
            raise RowError(place, str(error), str(error)) from error

    def _kept(self, place: str, candidates: Sequence[_Candidate]) -> Iterator[tuple[str, str]]:
        plan, report = self._plan, self.report
        for one in candidates:
            if one.shown in self._golds:
                report.duplicates += 1
                report.conflicts += self._golds[one.shown] != one.gold
                continue
            self._golds[one.shown], self._places[one.prompt.id] = one.gold, place
            if 0 < plan.max_tokens < one.tokens:
                report.too_long += 1
                continue
            report.longest = max(report.longest, one.tokens)
            if plan.held_out and self._is_held_out(one.prompt):
                report.held_out += 1
                yield "held_out", one.line
            else:
                report.train += 1
                yield "train", one.line

    def _is_held_out(self, prompt: Prompt) -> bool:
        side = self._form.side(prompt.id)
        if side:
            return side == "test"
        return is_held_out(self._form.row_id(prompt), self._plan.seed, self._plan.share)


@dataclass(frozen=True)
class _Candidate:
    """A good prompt, and what decides whether it is kept."""

    prompt: Prompt
    line: str
    """As it is written."""
    shown: str
    """Digest of what the model is shown."""
    gold: str
    """Digest of what judges the reply."""
    tokens: int = 0


def _digests(prompt: Prompt) -> tuple[str, str]:
    gold = prompt.task.get("calls", prompt.task)
    world = {} if prompt.environment == "none" else {**prompt.task, "calls": None}
    shown = digest(prompt.messages, prompt.tools, prompt.environment, world)
    return shown, digest(gold)


def _line(place: str, prompt: Prompt) -> str:
    """A prompt as the trainer reads it; RowError where it cannot be written as JSON in UTF-8."""
    row = {
        "id": prompt.id,
        "messages": prompt.messages,
        "tools": prompt.tools,
        "environment": prompt.environment,
        "task": prompt.task,
    }
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        rule = "values that JSON in UTF-8 can hold"
        problem = f"id={prompt.id!r}: its fields must be {rule}: {error}"
        raise RowError(place, problem, f"its fields must be {rule}") from error
    return line


def _reject_line(row: Row, error: RowError) -> str:
    return json.dumps({"place": row.place, "reason": str(error), "row": row.content}, default=str)


def _check_sides(plan: Plan, report: Report) -> None:
    """The trainer refuses files without rows, so none are written."""
    worst = "".join(f"; {count} x {rule}" for rule, count in report.rejected.most_common(3))
    became = (
        f"of {report.rows} rows {report.rejected.total()} were rejected, of their prompts "
        f"{report.duplicates} were duplicates, {report.too_long} longer than {plan.max_tokens} "
        f"tokens, {report.train} for training, {report.held_out} held out{worst}"
    )
    require(report.train > 0, f"no training prompt is left: {became}")
    require(
        not plan.held_out or report.held_out > 0,
        f"no prompt is held out: {became}; give a larger share, another seed, or no held-out file",
    )


@contextmanager
def _drafts(paths: Mapping[str, Path]) -> Iterator[Mapping[str, TextIO]]:
    """Files to write; they get their names when the block ends well, and vanish when it fails."""
    drafts = {n: path.with_name(f"{path.name}.partial-{os.getpid()}") for n, path in paths.items()}
    try:
        with ExitStack() as stack:
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            yield {n: stack.enter_context(d.open("w", encoding="utf-8")) for n, d in drafts.items()}
        for name, draft in drafts.items():
            os.replace(draft, paths[name])
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
