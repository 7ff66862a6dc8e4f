"""docs/configuration.md is what tools/make_config_reference.py writes, and holds every key."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from rest_mega.config import GuardConfig, known_keys

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script as a module."""
    path = ROOT / "tools" / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location("make_config_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(tool: ModuleType) -> None:
    message = "run python tools/make_config_reference.py"
    assert PAGE.read_text("utf-8") == tool.page(), message


def test_a_page_that_is_out_of_date_is_told_and_mended(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "configuration.md"
    old.write_text(tool.page().replace("Peak learning rate", "Learning rate"))
    monkeypatch.setattr(tool, "TARGET", old)
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0


def test_every_key_stands_in_its_section() -> None:
    """The sections are read back from the page: no key is lost on the way."""
    found, section = set(), ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif key := re.match(r"\| `(\w+)` \|", line):
            found.add(f"{section}.{key[1]}")
    assert set(known_keys()) <= found
    assert "environment.http.NAME.url" in found


def test_every_key_has_a_meaning(tool: ModuleType) -> None:
    rows = [line for line in tool.page().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.split(" | ")[-1].strip(" |") == ""] == []


def test_a_meaning_is_the_docstring_below_its_field(tool: ModuleType) -> None:
    texts = tool.meanings(GuardConfig)
    assert set(texts) == {field.name for field in dataclasses.fields(GuardConfig)}
    assert texts["max"].startswith("Largest single gap, in nats; null: any.")
