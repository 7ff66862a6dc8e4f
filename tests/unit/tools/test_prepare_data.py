"""tools/prepare_data.py: its words become the plan, and its counts of tokens are a rollout's."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
MADE_UP = ROOT / "examples" / "data" / "toolrl_made_up.jsonl"
TOKENIZERS = ROOT / "tests" / "data"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools/prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool on the made-up ToolRL rows; (exit code, standard output, standard error)."""

    def call(*words: str, source: Path = MADE_UP) -> tuple[int, str, str]:
        out = ["--format", "toolrl", "--out", str(tmp_path / "out.jsonl")]
        code = tool.main([str(source), *out, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.parametrize("kind", ["tiny_bpe", "tiny_sentencepiece"])
def test_the_length_filter_keeps_what_fits_as_a_rollout_would_count_it(
    run: Run, tmp_path: Path, kind: str
) -> None:
    chat = ChatFormat(load_tokenizer(TOKENIZERS / kind, "hermes"))
    system = {"role": "system", "content": "Be brief."}
    lengths = {}
    for prompt in load_prompts(MADE_UP):
        own = prompt.messages[0]["role"] == "system"
        messages = prompt.messages if own else (system, *prompt.messages)
        lengths[prompt.id] = len(chat.prompt_ids(messages, prompt.tools))
    limit = sorted(lengths.values())[6]
    words = ["--tokenizer", str(TOKENIZERS / kind), "--chat-template", "hermes"]
    code, said, _ = run(*words, "--max-tokens", str(limit), "--system", "Be brief.")
    fits = {name for name, length in lengths.items() if length <= limit}
    assert code == 0
    assert {p.id for p in load_prompts(tmp_path / "out.jsonl")} == fits
    assert f", {len(lengths) - len(fits)} prompts longer than {limit} tokens" in said
    assert f"the longest has {limit} tokens" in said


def test_bad_rows_are_counted_by_rule_and_strict_names_the_first(run: Run, tmp_path: Path) -> None:
    rows = MADE_UP.read_text("utf-8").splitlines()
    bad = json.dumps({"prompt": [], "reward_model": {}})
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join([*rows, bad, "{", bad]), encoding="utf-8")
    code, said, _ = run(source=source)
    assert code == 0
    assert f"{len(rows) + 3} rows read, 3 rejected\n" in said
    assert "       2  reward_model.ground_truth must be the gold reply as a string\n" in said
    assert "       1  not valid JSON\n" in said
    code, said, error = run("--strict", source=source)
    assert (code, said) == (2, "")
    assert f"{source}:{len(rows) + 1}: reward_model.ground_truth=None must be" in error


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--max-tokens", "9"], "max_tokens=9 needs a tokenizer"),
        (["--chat-template", "hermes"], "--chat-template hermes needs --tokenizer"),
        (["--tokenizer", "absent"], "tokenizer.path='absent' holds neither"),
        (["--held-out", "h.jsonl", "--held-out-share", "1"], "share 1.0 must be above 0"),
    ],
)
def test_words_that_cannot_be_used_are_one_message(
    run: Run, words: list[str], problem: str
) -> None:
    code, said, error = run(*words)
    assert (code, said) == (2, "")
    assert problem in error
    assert len(error.splitlines()) == 1


def test_a_missing_file_is_one_message(run: Run) -> None:
    assert run(source=Path("absent.jsonl"))[::2] == (
        2,
        "prepare_data: 'absent.jsonl' is not a file; give a .jsonl, .json or .parquet file of "
        "rows\n",
    )


def test_the_page_and_the_help_name_every_option(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert set(re.findall(r"`(--[a-z-]+)", page)) == known
