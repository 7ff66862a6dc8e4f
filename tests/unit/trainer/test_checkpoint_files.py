"""A run finds its newest whole checkpoint, keeps as many as asked, and never loses the last one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rest_mega.config import ConfigError
from rest_mega.trainer import checkpoint_files as files

STATE = {"step": 1, "optimizer_steps": 1, "verb": "train", "config": {}}


def make(run_dir: Path, step: int, keep: int = 9, text: str = "data") -> Path:
    folder = files.folder_of(run_dir, step)
    partial = folder.with_name(f"{folder.name}.partial-x")
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_text(text)
    files.complete(partial, folder, STATE | {"step": step}, {}, keep)
    return folder


def test_only_whole_checkpoints_are_found(tmp_path: Path) -> None:
    assert files.newest(tmp_path) is None
    make(tmp_path, 2)
    good = make(tmp_path, 10)
    for name in ("step_00000020.partial-x", "step_00000030", "step_00000040.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / files.STATE).write_text(json.dumps(STATE))
    assert files.newest(tmp_path) == good
    assert files.damage(good) == ""


def test_other_ranks_sums_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = files.folder_of(tmp_path, 1)
    partial = folder.with_name("p")
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_text("mine")
    (partial / "__1_0.distcp").write_text("theirs")
    files.complete(partial, folder, STATE, {"__1_0.distcp": (6, 0)}, 1)
    assert files.damage(folder) == ""
    assert "__1_0.distcp" in files.damaged_file(folder, ["__0_0.distcp", "__1_0.distcp"])
    assert files.read_manifest(folder)["__0_0.distcp"] == (4, 0x69A8D393)


def test_a_save_that_was_cut_off_between_its_two_renames_leaves_the_old_one(
    tmp_path: Path,
) -> None:
    """A step saved anew (its evaluation came in between) moves the old one aside first."""
    folder = make(tmp_path, 5)
    os.replace(folder, folder.with_name("step_00000005.old"))
    found = files.newest(tmp_path)
    assert found is not None
    assert found.name == "step_00000005.old"
    again = make(tmp_path, 5, keep=1)
    assert files.newest(tmp_path) == again
    assert [p.name for p in again.parent.iterdir()] == ["step_00000005"]


def test_saving_a_step_anew_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 5, text="before")
    assert (make(tmp_path, 5, text="after") / "__0_0.distcp").read_text() == "after"
    assert len(files.candidates(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (files.STATE, "{", "cannot be read"),
        (files.STATE, "[]", "it holds list"),
        (files.STATE, '{"step": 1}', "it lacks optimizer_steps, verb, config"),
        (files.MANIFEST, "{}", "it lists no files"),
        (files.MANIFEST, '{"files": {"run_state.json": 3}}', "cannot be read"),
        (files.MANIFEST, '{"files": {"run_state.json": ["a", "b"]}}', "cannot be read"),
        (files.MANIFEST, '{"files": {"run_state.json": [-1, 0]}}', "bytes, not -1"),
    ],
)
def test_what_cannot_be_read_says_so(name: str, text: str, why: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / name).write_text(text)
    found = files.damage(folder)
    assert why in found
    assert str(folder) in found
    assert files.newest(tmp_path) is None


def test_reading_a_damaged_state_names_the_remedy(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / files.STATE).unlink()
    with pytest.raises(ConfigError, match=r"run\.fresh=true"):
        files.read_state(folder)
