"""The README stays short, names files that exist, and its example of a reward and a tool runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rest_mega.environments import ENVIRONMENTS, load_modules, make_environment
from rest_mega.records import Prompt, ToolCall, Trajectory
from rest_mega.rewards import RUBRIC

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
NONE = np.zeros(0, dtype=np.int32)


def test_it_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) < 200


def test_the_paths_that_it_names_exist() -> None:
    named = re.findall(r"`((?:rest_mega|examples|docs|tests|benchmarks|tools)/[\w./]*)`", README)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_example_of_a_reward_and_a_tool_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    try:
        load_modules([str(tmp_path / "mine.py")])
        notes = make_environment("notes", {"text": "milk"})
        assert notes.finish("")["success"] is False
        assert notes.call(ToolCall("write", {"text": "milk"})) == "ok"
        assert notes.finish("")["success"] is True
        (spec,) = notes.specs
        assert spec["function"]["parameters"]["required"] == ["text"]
        prompt = Prompt(id="1", messages=())
        empty = Trajectory(prompt, 0, NONE, NONE, NONE, NONE, NONE, turns=(), stop="answered")
        assert RUBRIC["short"](empty) == 1.0
    finally:
        RUBRIC.pop("short", None)
        ENVIRONMENTS.pop("notes", None)
