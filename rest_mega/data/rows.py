"""Rows of .jsonl, .json and .parquet files, each with its place; what is wrong with a row names it.

A place is "path:line", in .json and .parquet files "path: row N", counted from 1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rest_mega.config import ConfigError, one_of, require


class RowError(ConfigError):
    """A row that breaks a rule: the message begins with the row's place."""

    def __init__(self, place: str, problem: str, rule: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.rule = rule
        """The rule without place and value: the same for all rows that break it."""


class Row(NamedTuple):
    """One row as it stands in its file."""

    place: str
    content: Any
    """The parsed row; the text of a line that cannot be parsed."""
    error: RowError | None = None
    """Why the line cannot be parsed."""

    def fields(self) -> Mapping[str, Any]:
        """The row's named fields; RowError where it is not JSON, or no object."""
        if self.error is not None:
            raise self.error
        expect(
            isinstance(self.content, dict),
            self.place,
            "row",
            self.content,
            "an object with named keys",
        )
        return dict(self.content)


def read_rows(path: Path, *, lines: bool = False) -> Iterator[Row]:
    """Every row of a file, the bad ones too; `lines`: a .json file holds one row a line.

    Raises ConfigError for a file that is missing, of an unknown kind, or not of its kind.
    """
    require(
        path.is_file(),
        f"{str(path)!r} is not a file; give a .jsonl, .json or .parquet file of rows",
    )
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _jsonl_rows if lines else _json_rows,
        ".parquet": _parquet_rows,
    }
    one_of(f"{path}: suffix", path.suffix, readers)
    return readers[path.suffix](path)


def expect(
    condition: bool, place: str, key: str, value: object, rule: str, detail: str = ""
) -> None:
    """Raise RowError "place: key=value must be rule (detail)" unless `condition` holds."""
    if condition:
        return
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    more = f" ({detail})" if detail else ""
    general = re.sub(r"\[\d+\]", "[]", key)
    raise RowError(place, f"{key}={shown} must be {rule}{more}", f"{general} must be {rule}")


def digest(*parts: object) -> str:
    """32 hexadecimal digits that depend on the parts' JSON alone, not on the order of keys."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def known_keys(place: str, row: Mapping[str, Any], known: Sequence[str], note: str = "") -> None:
    """Raise RowError where `row` has a key that is not `known`; `note` closes the message."""
    for key in row:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        raise RowError(place, f"unknown key {key!r}; {hint}{note}", f"unknown key {key!r}")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, place: str) -> Row:
    try:
        return Row(place, _json(line.rstrip(b"\r\n"), place))
    except RowError as error:
        return Row(place, line.decode("utf-8", "replace").rstrip("\r\n"), error)


def _json_rows(path: Path) -> Iterator[Row]:
    rows = _json(path.read_bytes(), str(path))
    expect(
        isinstance(rows, list),
        str(path),
        "content",
        rows,
        "one list of rows; rename a file of lines to .jsonl",
    )
    yield from (Row(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
    except ArrowInvalid as error:
        raise ConfigError(f"{path} is not a Parquet file ({error}); write it anew") from error
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from (Row(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _json(data: bytes, place: str) -> Any:
    """The JSON value of UTF-8 bytes; RowError tells where it breaks off."""
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        problem = f"not valid JSON at {line}column {error.colno}: {error.msg}; mend or remove it"
    except UnicodeDecodeError as error:
        problem = f"not valid JSON: not UTF-8 at byte {error.start}; mend or remove it"
    except (ValueError, RecursionError) as error:  # an endless integer; nested too deeply
        problem = f"not valid JSON: {error}; mend or remove it"
    raise RowError(place, problem, "not valid JSON")
