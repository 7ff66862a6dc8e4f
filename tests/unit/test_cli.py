"""Words of the command line become a config, or one message that says what to mend."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rest_mega.cli import HELP, MEGATRON_ALIASES, NO_COUNTERPART, VERBS, main, read
from rest_mega.config import ConfigError, RunConfig, known_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file with one section."""
    path = tmp_path / "config.yaml"
    path.write_text("run:\n  steps: 7\n  seed: 3\n")
    return path


def parsed(config: Path, *words: str) -> RunConfig:
    return read(["train", str(config), *words])[1]


def refused(*words: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read([str(word) for word in words])
    return str(caught.value)


# ------------------------------------------------------------------ words over the file


def test_the_file_and_the_words_over_it(config: Path) -> None:
    got = parsed(config, "run.steps=9", "rewards.parts={success: 2}", "optimizer.lr=1e-3")
    assert (got.run.steps, got.run.seed) == (9, 3)
    assert got.rewards.parts == {"success": 2.0}
    assert got.optimizer.lr == 1e-3


def test_the_last_word_counts(config: Path) -> None:
    assert parsed(config, "run.steps=9", "run.steps=11", "--train-iters", "12").run.steps == 12


def test_a_value_may_be_empty_or_hold_an_equals_sign(config: Path) -> None:
    got = parsed(config, "tokenizer.path=", "data.system=a=b")
    assert (got.tokenizer.path, got.data.system) == ("", "a=b")


def test_one_part_of_a_mapping_can_be_set(config: Path) -> None:
    config.write_text("rewards:\n  parts: {success: 1.0}\n")
    assert parsed(config, "rewards.parts.format=0.5").rewards.parts == {
        "success": 1.0,
        "format": 0.5,
    }


def test_words_reach_a_section_that_the_file_leaves_empty(config: Path) -> None:
    config.write_text("run:\nmodel:\n")
    assert parsed(config, "run.steps=2").run.steps == 2


# ------------------------------------------------------------------ Megatron's names


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--tensor-model-parallel-size", "2"], "parallel.tensor", 2),
        (["--pipeline-model-parallel-size=2"], "parallel.pipeline", 2),
        (["--context-parallel-size", "4"], "parallel.context", 4),
        (["--expert-model-parallel-size=2"], "parallel.expert", 2),
        (["--lr", "2e-5"], "optimizer.lr", 2e-5),
        (["--weight-decay", "0.1"], "optimizer.weight_decay", 0.1),
        (["--adam-beta1", "0.8"], "optimizer.beta1", 0.8),
        (["--adam-beta2=0.9"], "optimizer.beta2", 0.9),
        (["--adam-eps", "1e-5"], "optimizer.eps", 1e-5),
        (["--clip-grad", "0"], "optimizer.clip_grad", 0.0),
        (["--seed", "5"], "run.seed", 5),
        (["--train-iters=5"], "run.steps", 5),
        (["--use-distributed-optimizer"], "optimizer.distributed", True),
        (["--use-distributed-optimizer=false"], "optimizer.distributed", False),
        (["--bf16"], "model.dtype", "bf16"),
    ],
)
def test_megatrons_names_are_ours(config: Path, words: list[str], key: str, value: Any) -> None:
    section, name = key.split(".")
    assert getattr(getattr(parsed(config, *words), section), name) == value


@pytest.mark.parametrize(
    "name", ["--num-virtual-stages-per-pipeline-rank", "--virtual-pipeline-model-parallel-size"]
)
def test_both_of_megatrons_names_for_virtual_stages(config: Path, name: str) -> None:
    got = parsed(config, "--pipeline-model-parallel-size", "2", name, "3")
    assert got.parallel.virtual_pipeline == 3


def test_a_flag_takes_no_value_from_the_next_word(config: Path) -> None:
    got = parsed(config, "--sequence-parallel", "--tensor-model-parallel-size", "2", "run.steps=1")
    assert (got.parallel.sequence, got.parallel.tensor, got.run.steps) == (True, 2, 1)


def test_every_alias_stands_for_a_key() -> None:
    assert set(MEGATRON_ALIASES.values()) <= set(known_keys())


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_a_megatron_name_without_counterpart_is_answered_with_what_to_write(
    config: Path, name: str
) -> None:
    assert refused("train", config, name, "4") == (
        f"{name} has no counterpart here: {NO_COUNTERPART[name]}"
    )


# ------------------------------------------------------------------ bad words


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--tensor-model-parallel-sise", "2"], ["unknown option", "--tensor-model-parallel-size"]),
        (["--lr"], ["--lr needs a value"]),
        (["steps=3"], ["'steps=3' is neither", "did you mean run.steps"]),
        (["run.steps"], ["'run.steps' is neither"]),
        (["run.step=3"], ["unknown config key 'run.step'", "run.steps"]),
        (["run.steps=[1"], ["run.steps='[1'", "YAML"]),
        (["run.steps.more=1"], ["run.steps.more", "steps is 7"]),
        (["run=3"], ["'run=3' is neither"]),
    ],
)
def test_bad_words_are_answered_with_the_nearest(
    config: Path, words: list[str], parts: list[str]
) -> None:
    message = refused("train", config, *words)
    for part in parts:
        assert part in message


def test_an_unknown_verb_is_answered_with_the_known_ones(config: Path) -> None:
    message = refused("trian", config)
    assert "'trian'" in message
    assert "train, sft, eval" in message
    assert "did you mean train?" in message


@pytest.mark.parametrize("rest", [[], ["run.steps=3"], ["--lr", "1"]])
def test_a_verb_without_a_file_says_so(rest: list[str]) -> None:
    assert "train needs a config file" in refused("train", *rest)


# ------------------------------------------------------------------ bad files


def test_a_missing_file_is_answered_with_the_nearest(config: Path) -> None:
    message = refused("train", config.with_name("confg.yaml"))
    assert "no config file" in message
    assert str(config) in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run:\n  steps: 7\n  seed: 1\n  steps: 8\n", ["'steps' stands twice", "line 4"]),
        ("run: {}\nmodel: {}\nrun: {}\n", ["'run' stands twice", "line 3"]),
        ("run:\n  steps: [7\n", ["not valid YAML", "line 3"]),
        ("run:\n\tsteps: 7\n", ["not valid YAML", "line 2"]),
        ("? [a]\n: 1\n", ["['a'] in line 1 cannot be a key"]),
        ("- run\n", ["must hold sections with keys, not list"]),
        ("run: !!python/object/apply:os.system ['true']\n", ["not valid YAML", "line 1"]),
    ],
)
def test_a_bad_file_is_named_with_its_line(config: Path, text: str, parts: list[str]) -> None:
    config.write_text(text)
    message = refused("train", config)
    assert str(config) in message
    for part in parts:
        assert part in message


def test_a_file_that_is_no_text_is_refused(config: Path) -> None:
    config.write_bytes(b"run:\n  dir: \xff\xfe\n")
    assert "not valid YAML" in refused("train", config)


def test_an_empty_file_is_the_defaults(config: Path) -> None:
    config.write_text("")
    assert parsed(config) == RunConfig()


# ------------------------------------------------------------------ exit codes


def test_help_lists_the_verbs_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(HELP.splitlines()[0])
    assert all(f"  {verb} " in out for verb in VERBS)


def test_no_words_are_answered_with_the_help_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    assert capsys.readouterr().out.split() == known_keys()


def test_bad_input_is_one_line_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "run.steps=-1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "rest-mega: run.steps=-1 must not be negative\n"
    assert captured.out == ""


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_one_rank_of_a_machine_speaks_for_all(
    config: Path,
    rank: str,
    speaks: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(config), "run.steps=-1"]) == 2
    assert bool(capsys.readouterr().err) == speaks


@pytest.mark.parametrize("command", [[sys.executable, "-m", "rest_mega"], ["rest-mega"]])
def test_the_module_and_the_script_give_the_exit_code_to_the_shell(command: list[str]) -> None:
    script = Path(sys.executable).with_name("rest-mega")
    words = [str(script), *command[1:]] if command == ["rest-mega"] else command
    if not Path(words[0]).is_file():
        pytest.skip("the script is made when the package is installed")
    run = functools.partial(
        subprocess.run,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    bad = run([*words, "frain"])
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "did you mean train?" in bad.stderr
    good = run([*words, "keys"])
    assert (good.returncode, good.stdout.split()) == (0, known_keys())
