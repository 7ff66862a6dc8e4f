"""Writes docs/configuration.md from the dataclasses of rest_mega/config.py.

python tools/make_config_reference.py            # write it
python tools/make_config_reference.py --check    # exit code 1 where it is out of date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rest_mega import config as knobs
from rest_mega.cli import MEGATRON_ALIASES, NO_COUNTERPART

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Made by `python tools/make_config_reference.py` from `rest_mega/config.py`; do not edit it by hand.

A config is a YAML file of sections; words `section.key=value` on the command line are laid over
it, values being YAML too. A key that stands twice, an unknown key (the nearest known ones are
named), a value of the wrong type or outside its rule ends the start with exit code 2. Every key has
a default, so a file holds what differs. `rest-mega keys` lists the names; Megatron's own names are
at the end of this page.

```yaml
run: {dir: runs/mine, steps: 100}
model: {path: examples/quickstart/warm_start}
parallel: {tensor: 2, pipeline: 2}
```

"""
ALIASES = """## Megatron's names

Flags among them stand for true; `--bf16` is `model.dtype=bf16`.

| option | key |
| --- | --- |
"""


def meanings(section: type) -> dict[str, str]:
    """Field -> the docstring that stands below it in the source of a dataclass."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef), node
    found, name = {}, ""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id
        elif isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and name:
            found[name] = inspect.cleandoc(str(item.value.value))
    return found


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as YAML would write it on one line."""
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def kind(hint: Any) -> str:
    """A type hint in the words of YAML."""
    words = {str: "string", int: "whole number", float: "number", bool: "true or false"}
    if hint in words:
        return words[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return "list"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    return " or ".join(words.get(one, "null") for one in inner)


def rows(section: type, name: str) -> Iterator[str]:
    """The table of a section, then those of the sections below it."""
    hints, texts = typing.get_type_hints(section), meanings(section)
    deeper = []
    yield f"## {name}\n\n{inspect.cleandoc(section.__doc__ or '')}\n"
    yield "| key | default | meaning |\n| --- | --- | --- |"
    for field in dataclasses.fields(section):
        hint, place = hints[field.name], f"{name}.{field.name}"
        if dataclasses.is_dataclass(hint):
            deeper.append((hint, place))
            continue
        values = typing.get_args(hint)[1:]
        deeper += [(v, f"{place}.NAME") for v in values if dataclasses.is_dataclass(v)]
        text = " ".join(texts[field.name].split()).replace("|", "\\|")
        yield f"| `{field.name}` | `{default(field)}` ({kind(hint)}) | {text} |"
    yield ""
    for below, place in deeper:
        yield from rows(typing.cast(type, below), place)


def page() -> str:
    """The whole page."""
    hints = typing.get_type_hints(knobs.RunConfig)
    sections = [row for name, hint in hints.items() for row in rows(hint, name)]
    names = [f"| `{option}` | `{key}` |" for option, key in MEGATRON_ALIASES.items()]
    names += [f"| `{option}` | none: {why} |" for option, why in NO_COUNTERPART.items()]
    return HEAD + "\n".join(sections) + "\n" + ALIASES + "\n".join(names) + "\n"


def main(words: list[str]) -> int:
    """Write or compare the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(words)
    if not options.check:
        TARGET.write_text(page(), encoding="utf-8")
        print(f"wrote {TARGET}")
        return 0
    if TARGET.is_file() and TARGET.read_text("utf-8") == page():
        return 0
    print(
        f"{TARGET} is out of date: run python tools/make_config_reference.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
