"""`rest-mega eval --suite` and `compare`, from the command line to the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed

DATA = Path(__file__).parents[1] / "data" / "api_bank"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = make_run(tmp_path_factory.mktemp("benchmark"))
    config = json.loads((made.root / "model" / "config.json").read_text())
    (made.root / "model" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 1024})
    )
    return made


def evaluate(run: Run, out: Path, *words: object, ranks: int = 1) -> list[str]:
    """Standard output of every rank."""
    common = ("--suite", "api-bank", "--data", DATA, "--out", out, "tokenizer.chat_template=hermes")
    ended = start(ranks, "eval", *common, "--max-new-tokens", 6, *words)
    assert [one.code for one in ended] == [0] * ranks, ended[0].err
    return [one.out for one in ended]


def test_a_model_without_a_config_file(run: Run, tmp_path: Path) -> None:
    """A subset, then all of it: what was there is neither drawn again nor lost. On two ranks the
    replies are the same."""
    out, whole = tmp_path / "results", tmp_path / "whole"
    (text,) = evaluate(run, out, "--model", run.root / "model", "--limit", 1)
    assert "level-3" in text
    first = (out / "samples.jsonl").read_bytes()
    assert len(first.splitlines()) == 3
    evaluate(run, out, "--model", run.root / "model")
    samples = (out / "samples.jsonl").read_bytes()
    assert samples.startswith(first)
    assert len(samples.splitlines()) == 8
    head, other = evaluate(run, whole, run.root / "model", ranks=2)
    assert "strict overall" in head
    assert other == ""
    both = [
        json.loads(line)
        for file in (whole / "samples.jsonl", whole / "samples.1.jsonl")
        for line in file.read_text().splitlines()
    ]
    alone = [json.loads(line) for line in samples.splitlines()]
    ids = [{row["task"]: row["output_ids"] for row in rows} for rows in (alone, both)]
    assert ids[0] == ids[1]
    (compared,) = start(1, "compare", out, whole)
    assert "0 tasks better, 0 worse, p = 1 (8 tasks x 1)" in compared.out
    (refused,) = start(1, "eval", "--suite", "api-bank", "--data", DATA, "--out", out,
                       run.root / "model", "--seed", 5, "--max-new-tokens", 6,
                       "tokenizer.chat_template=hermes")  # fmt: skip
    assert refused.code == 2
    assert "seed was 0, is 5" in refused.err


def test_training_is_evaluated_on_its_way_and_its_best_is_kept(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    suite = (
        "evaluation.suites={api-bank: [level-1]}", f"evaluation.data={{api-bank: {DATA}}}",
        "evaluation.limit=2", "evaluation.max_tokens=1024", "evaluation.max_new_tokens=4",
        "evaluation.best=api-bank/overall",
    )  # fmt: skip
    (ended,) = start(1, "train", run.config, f"run.dir={folder}", "run.steps=2", *suite)
    assert ended.code == 0, ended.err
    rows = [row for row in run.rows(folder=folder) if "eval/api-bank/overall" in row]
    assert [row["step"] for row in rows] == [0, 2]
    assert {"eval/api-bank/strict_level-1", "eval/sampled_success"} <= rows[0].keys()
    kept = folder / "evaluation" / "step_2" / "api-bank" / "samples.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    assert (folder / "best" / "model.safetensors").is_file()
    assert "step 0 is the best so far" in ended.err

    out = tmp_path / "of a checkpoint"
    evaluate(run, out, folder, "--category", "level-1", "--limit", 2, "--max-new-tokens", 4)
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["weights"] == "step_00000002"
    again, during = (
        {row["task"]: row["output_ids"] for row in map(json.loads, file.read_text().splitlines())}
        for file in (out / "samples.jsonl", kept)
    )
    assert again == during
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "api-bank"], "nothing to evaluate"),
        (["--suite", "apibank", "{model}"], "choose one of api-bank, bfcl"),
        (["--suite", "api-bank", "{model}"], "api-bank needs its data"),
        (["--suite", "api-bank", "absent"], "neither a Hugging Face folder"),
        (["--suite", "api-bank", "{model}", "--data", str(DATA), "--max-tokens", "9999"],
         "exceed the model's 1024 positions"),
        (["--suite", "api-bank", "{model}", "--data", str(DATA), "--category", "level-9"],
         "choose one of level-1, level-2, level-3"),
    ],
)  # fmt: skip
def test_bad_words_are_one_message(run: Run, words: list[str], message: str) -> None:
    filled = [word.replace("{model}", str(run.root / "model")) for word in words]
    (ended,) = start(1, "eval", *filled, "tokenizer.chat_template=hermes")
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
