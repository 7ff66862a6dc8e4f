"""Every command and snippet of README.md, docs/ and the examples' READMEs is run, or checked.

Above a bash block stands `<!-- run -->` (it is run here), `<!-- run: slow -->` (or engine, gpu: run
under that marker), or `<!-- check: why -->`: its verbs, config keys, options, scripts and make
targets are checked without running it. Python blocks are always run, YAML blocks always read as a
config, JSON blocks always parsed. Blocks without a language are pictures and outputs, and hold no
command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import RunConfig, known_keys
from tests.support.docs import (
    ROOT,
    Block,
    blocks,
    check_command,
    check_paths,
    check_yaml,
    stray_commands,
)

PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")]
)
BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"", "bash", "python", "yaml", "json", "text"}
SECTIONS = "|".join(RunConfig.__dataclass_fields__)
KEY = re.compile(rf"`((?:{SECTIONS})\.[\w.]+?)(?:=[^`]*)?`")


def of(*languages: str) -> list[Any]:
    """The blocks of some languages, each under the marker that is told of it."""
    found = []
    for block in BLOCKS:
        if block.language in languages:
            slow = block.told.removeprefix("run: ") if block.told.startswith("run: ") else ""
            marks = [getattr(pytest.mark, slow)] if slow else []
            found.append(pytest.param(block, id=block.place, marks=marks))
    return found


def test_there_are_pages_and_blocks() -> None:
    assert len(PAGES) > 10
    assert len(BLOCKS) > 15


def test_no_block_is_skipped() -> None:
    """Every block has a language that is known here, and bash blocks say what becomes of them."""
    assert [b.place for b in BLOCKS if b.language not in LANGUAGES] == []
    untold = [b.place for b in BLOCKS if b.language == "bash" and not b.told]
    assert untold == [], "write <!-- run --> or <!-- check: why --> above these"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_page_names_what_exists(page: Path) -> None:
    """Commands stand in bash blocks alone; paths, links and config keys of the text exist."""
    assert stray_commands(page) == []
    text = page.read_text("utf-8")
    check_paths(" ".join(re.findall(r"`([^`\n]+)`", text)))
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for key in KEY.findall(text):
        near = [known for known in known_keys() if known == key or known.startswith(f"{key}.")]
        own = key.startswith(("rollout.sglang.", "environment.http.", "environment.mcp."))
        file = key.endswith((".py", ".sh", ".yaml", ".json", ".jsonl", ".safetensors", ".html"))
        assert near or own or file, f"{page.name} names the key {key}"


@pytest.mark.parametrize("block", [b.values[0] for b in of("bash")], ids=lambda b: b.place)
def test_a_bash_block_could_run(block: Block) -> None:
    """Also those that are run under a marker: here without running them."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    assert block.commands
    for words in block.commands:
        try:
            check_command(words)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("rest-mega trian CONFIG.yaml", "unknown verb trian"),
        ("rest-mega train CONFIG.yaml optimizer.lrr=1", "optimizer.lr"),
        ("rest-mega train CONFIG.yaml run.seed=$s run.sead=$s", "unknown config key run.sead"),
        ("rest-mega train examples/quickstart/config.yaml loss.policy=pqo", "ppo"),
        ("rest-mega train examples/absent.yaml", "no config file"),
        ("rest-mega convert A B --logit", "knows no --logit"),
        ("torchrun --nproc-per-node 2 -m rest_mega train CONFIG.yaml --tensor 2", "unknown option"),
        ("python tools/prepare_data.py x --formats chat", "knows no --formats"),
        ("python tools/absent.py", "does not exist"),
        ("make quickstat", "no target quickstat"),
        ('make quickstart ARGS="run.step=1"', "run.steps"),
        ("examples/quickstart/run.sh parallel.tensors=2", "parallel.tensor"),
        ("frobnicate --now", "nobody knows how to check 'frobnicate'"),
        ("cp docs/absent.md .", "does not exist"),
    ],
)
def test_a_command_that_could_not_run_is_noticed(command: str, problem: str) -> None:
    (words,) = Block(
        "page.md", 1, "bash", "run", f"for s in 0; do\n{command}  # why\ndone"
    ).commands
    with pytest.raises((AssertionError, ValueError), match=re.escape(problem)):
        check_command(words)


def test_a_command_outside_a_bash_block_is_noticed() -> None:
    page = ROOT / "docs" / "sft.md"
    lines = ["    make test", "    some picture", "```text", "rest-mega train x", "```", "make up"]
    assert stray_commands(page) == []
    assert [s.split(":")[1] for s in stray_commands(page, "\n".join(lines))] == ["1", "4"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, in which blocks write what they write."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(words: list[str], desk: Path, block: Block) -> str:
    """A command's output; it must end with exit code 0."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("block", [b for b in of("bash") if b.values[0].told.startswith("run")])
def test_a_bash_block_runs(block: Block, desk: Path) -> None:
    printed = run(["bash", "-euo", "pipefail", "-c", block.text], desk, block)
    shown = next_block(block)
    if shown.language == "text":  # what the page says that it prints
        assert shown.text.strip() in printed, f"{block.place} printed:\n{printed}"


def next_block(block: Block) -> Block:
    """The block that follows on the same page, or an empty one."""
    later = BLOCKS[BLOCKS.index(block) + 1 :]
    empty = Block(block.file, 0, "", "", "")
    return later[0] if later and later[0].file == block.file else empty


@pytest.mark.parametrize("block", of("python"))
def test_a_python_block_runs(block: Block, desk: Path) -> None:
    run([sys.executable, "-c", block.text], desk, block)


@pytest.mark.parametrize("block", of("yaml"))
def test_a_yaml_block_is_a_config(block: Block) -> None:
    check_yaml(block)
    check_paths(block.text)


@pytest.mark.parametrize("block", of("json"))
def test_a_json_block_is_json(block: Block) -> None:
    json.loads(block.text)


def test_the_index_links_every_page() -> None:
    folder = ROOT / "docs"
    linked = set(re.findall(r"\]\((\w+\.md)\)", (folder / "README.md").read_text("utf-8")))
    assert linked == {page.name for page in folder.glob("*.md")} - {"README.md"}
