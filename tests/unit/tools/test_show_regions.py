"""tools/show_regions.py prints what the package finds, for both kinds of tokenizer."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rest_mega.config import CreditConfig
from rest_mega.credit.regions import Region, tag
from rest_mega.credit.weights import PRESETS, normalise, region_weights
from rest_mega.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "show_regions.py"
TOKENIZERS = {
    "bpe": ROOT / "tests" / "data" / "tiny_bpe",
    "sentencepiece": ROOT / "tests" / "data" / "tiny_sentencepiece" / "tokenizer.model",
}
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}'
REPLY = f"<think>hm é</think>\nI look.\n<tool_call>\n{CALL}\n</tool_call><|im_end|>"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
Rows = list[tuple[bytes, str, float]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("show_regions", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plain(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the tool on a reply with --plain; (rows, what it says on standard error)."""

    def run(reply: str, kind: str, *words: str) -> tuple[Rows, str]:
        file = tmp_path / "reply.txt"
        file.write_text(reply, encoding="utf-8")
        path = str(TOKENIZERS[kind])
        assert tool.main([str(file), "--tokenizer", path, "--plain", *words]) == 0
        out, err = capsys.readouterr()
        fields = [line.split("\t") for line in out.splitlines()]
        return [(ast.literal_eval(b), region, float(w)) for b, region, w in fields], err

    return run


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_for_every_token_with_its_bytes_region_and_weight(
    plain: Any, kind: str, preset: str
) -> None:
    words = ["--preset", preset, "--progress", "0.25", "--step", "100", "--dialect", "hermes"]
    rows, err = plain(REPLY + "\n", kind, *words)
    assert err == ""
    tokenizer = load_tokenizer(TOKENIZERS[kind])
    tokens = [tokenizer.token_bytes(i) for i in tokenizer.encode(REPLY)]
    assert [row[0] for row in rows] == tokens
    assert b"".join(tokens).decode().lstrip(" ") == REPLY
    regions_T = tag(tokens, "hermes", end_of_turn=True)
    assert [row[1] for row in rows] == [Region(r).name.lower() for r in regions_T]
    ones, count = np.ones(len(Region)), len(tokens)
    raw_K = region_weights(CreditConfig(preset), ones, progress=0.25, step=100)
    weights_T = normalise(raw_K, regions_T, np.ones(count, np.bool_), np.zeros(count, np.int32))
    assert [row[2] for row in rows] == pytest.approx(weights_T.tolist(), abs=6e-5)


def test_given_entropies_count_and_the_others_are_their_average(plain: Any) -> None:
    words = ["--preset", "rest-paper", "--entropy", "answer=0.5", "--entropy", "reasoning=1.5"]
    rows, _ = plain(REPLY, "bpe", *words)
    weight = {region: value for _, region, value in rows}
    beta = {h: 1 - np.exp(-h) for h in (0.5, 1.0, 1.5)}
    assert weight["answer"] / weight["reasoning"] == pytest.approx(beta[1.5] / beta[0.5], rel=1e-3)
    assert weight["answer"] / weight["format"] == pytest.approx(beta[1.0] / beta[0.5], rel=1e-3)


def test_the_end_of_turn_token_is_told_apart_and_may_be_missing(plain: Any) -> None:
    rows, _ = plain("Yes.<|im_end|>", "bpe")
    assert [row[1] for row in rows] == [*["answer"] * (len(rows) - 1), "end_of_turn"]
    rows, _ = plain("Yes.", "bpe")
    assert {row[1] for row in rows} == {"answer"}
    rows, err = plain("", "bpe")
    assert (rows, err) == ([], "")


def test_the_dialect_decides_and_what_is_malformed_is_said(plain: Any) -> None:
    reply = '[get_weather(city="Paris")]'
    rows, err = plain(reply, "bpe", "--dialect", "pythonic")
    assert b"".join(b for b, region, _ in rows if region == "tool_name") == b"get_weather"
    assert err == ""
    rows, err = plain(reply + " ok", "bpe", "--dialect", "pythonic")
    assert b"".join(b for b, region, _ in rows if region == "malformed").strip() == b"ok"
    assert err == "malformed: text after the last call at byte 28\n"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_colours_change_nothing_but_the_look(
    tool: ModuleType, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reply.txt"
    file.write_text(REPLY.replace("hm", "h\x1b[31mm"), encoding="utf-8")
    assert tool.main([str(file), "--tokenizer", str(TOKENIZERS[kind])]) == 0
    out = capsys.readouterr().out
    seen = ANSI.sub("", out)
    # A control character of the reply is shown, and steers nothing.
    assert seen.lstrip(" ").startswith(REPLY.replace("hm", "h␛[31mm") + "\n\n")
    assert "\x1b[31m" not in out
    name = re.compile(rf"\x1b\[38;5;{tool.COLOURS[Region.TOOL_NAME]}m([^\x1b]*)\x1b\[0m")
    assert "get_weather" in "".join(name.findall(out))
    legend = [line.split()[0] for line in seen.rpartition("\n\n")[2].splitlines()]
    assert legend == [r.name.lower() for r in Region if r not in (9, 10)]
    assert set(tool.COLOURS) == set(Region)
    assert len(set(tool.COLOURS.values())) == len(Region)


def test_it_reads_standard_input_as_a_script() -> None:
    words = ["-", "--tokenizer", str(TOKENIZERS["bpe"]), "--plain"]
    run = subprocess.run(
        [sys.executable, str(TOOL), *words],
        input="<think>é</think>\n".encode(),
        capture_output=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    regions = [line.split(b"\t")[1].decode() for line in run.stdout.splitlines()]
    assert regions == ["format", "reasoning", "reasoning", "format"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dialect", "herms"], "dialect='herms' is not known; .* nearest: hermes"),
        (["--preset", "rest_code"], r"credit\.preset='rest_code' .* nearest: rest-code"),
        (["--progress", "1.5"], r"--progress 1\.5 must be in \[0, 1\]"),
        (["--step", "0"], "--step 0 must be at least 1"),
        (["--entropy", "tool=1"], "--entropy='tool' is not known; .* nearest: tool_name"),
        (["--entropy", "answer"], "--entropy answer must be REGION=NATS"),
        (["--entropy", "answer=-1"], "--entropy answer=-1 must be REGION=NATS"),
        (["--tokenizer", "nowhere"], r"'nowhere' holds neither tokenizer\.json"),
    ],
)
def test_words_that_cannot_be_used_are_answered(
    tool: ModuleType,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "reply.txt"
    file.write_text("hi")
    assert tool.main([str(file), "--tokenizer", str(TOKENIZERS["bpe"]), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_that_cannot_be_read_are_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer", str(TOKENIZERS["bpe"])]
    assert tool.main([str(tmp_path / "nothing.txt"), *words]) == 2
    assert "nothing.txt" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert tool.main([str(tmp_path / "latin.txt"), *words]) == 2
    assert "latin.txt is not UTF-8 text" in capsys.readouterr().err
