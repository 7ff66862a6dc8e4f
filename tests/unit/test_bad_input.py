"""Bad input is answered before training starts: exit code 2, one message that says what to mend, no
process group."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_mega.cli import main, read
from rest_mega.trainer.checkpoint_files import complete, folder_of
from tests.support.runs import Run, dialogue, make_run, prompt, write_rows

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A good run; tests point single keys elsewhere."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def refuse(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """The one message with which a command ends."""

    def command(*words: object, verb: str = "train", world: int = 1) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert main([verb, str(run.config), *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("rest-mega: ")
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert not torch.distributed.is_initialized()
        assert not run.dir.exists(), "nothing is written before the input is good"
        return captured.err

    return command


def has(message: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in message, message


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("words", "world", "parts"),
    [
        (["parallel.tensor=3"], 3, ["parallel.tensor=3", "8 attention heads", "[1, 2, 4, 8]"]),
        (["parallel.pipeline=4"], 4, ["=4 does not divide", "2 layers", "[1, 2]"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
            2,
            ["virtual_pipeline=4 does not divide", "2 layers"],
        ),
        (["parallel.tensor=2"], 3, ["world size 3", "launch a multiple of 2"]),
        (["parallel.tensor=2"], 1, ["world size 1", "tensor 2"]),
        ([], 4, ["rollout.prompts_per_step=2", "4 data-parallel replicas"]),
        (["parallel.expert=2"], 2, ["parallel.expert=2", "mixture-of-experts"]),
    ],
)
def test_a_layout_that_does_not_divide(
    refuse: Refuse, words: list[str], world: int, parts: list[str]
) -> None:
    has(refuse(*words, world=world), *parts)


def test_replicas_that_cannot_share_the_prompts_may_still_evaluate(refuse: Refuse) -> None:
    has(refuse("data.held_out=", verb="eval", world=4), "data.held_out is empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(refuse: Refuse) -> None:
    has(refuse("run.device=cuda"), "run.device=cuda", "use run.device=auto")


def test_kernels_need_a_gpu(refuse: Refuse) -> None:
    has(refuse("model.head=triton"), "model.head=triton needs a CUDA device", "model.head=auto")


# ------------------------------------------------------------------ the model


def copy_of_model(run: Run, folder: Path) -> Path:
    return Path(shutil.copytree(run.root / "model", folder / "model"))


def test_no_model(refuse: Refuse) -> None:
    has(refuse("model.path="), "model.path is empty")


def test_a_model_folder_that_is_not_there(refuse: Refuse, tmp_path: Path) -> None:
    has(refuse(f"model.path={tmp_path / 'absent'}"), "model.path=", "absent", "config.json")


def test_a_config_json_that_is_no_json(refuse: Refuse, run: Run, tmp_path: Path) -> None:
    model = copy_of_model(run, tmp_path)
    (model / "config.json").write_text("{")
    has(refuse(f"model.path={model}"), model, "config.json")


def test_a_family_that_is_not_known(refuse: Refuse, run: Run, tmp_path: Path) -> None:
    model = copy_of_model(run, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    has(refuse(f"model.path={model}"), "'gpt2'", "known: llama, mistral, qwen2, qwen3")


def test_weights_that_are_not_there(refuse: Refuse, run: Run, tmp_path: Path) -> None:
    model = copy_of_model(run, tmp_path)
    (model / "model.safetensors").unlink()
    has(refuse(f"model.path={model}"), "holds neither model.safetensors nor", "model.init=random")


def test_a_reference_that_is_not_there_or_of_another_shape(
    refuse: Refuse, run: Run, tmp_path: Path
) -> None:
    absent = f"model.reference={tmp_path / 'absent'}"
    has(refuse("loss.kl=0.1", absent), "model.reference=", "absent", "config.json")
    model = copy_of_model(run, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    message = refuse("credit.kl_reward=0.1", f"model.reference={model}")
    has(message, model, "differs from model.path in ffn", "of the same architecture")


@pytest.mark.parametrize("keep", [4, 1000, 200_000])
def test_weights_that_are_cut_off(refuse: Refuse, run: Run, tmp_path: Path, keep: int) -> None:
    weights = copy_of_model(run, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    has(refuse(f"model.path={weights.parent}"), weights, "truncated", "fetch it anew")


def test_a_shard_that_the_index_names_is_not_there(
    refuse: Refuse, run: Run, tmp_path: Path
) -> None:
    model = copy_of_model(run, tmp_path)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    has(refuse(f"model.path={model}"), "model-00001-of-00002.safetensors", "fetch it anew")


def test_weights_of_another_model(refuse: Refuse, run: Run, tmp_path: Path) -> None:
    model = copy_of_model(run, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    has(refuse(f"model.path={model}"), "config.json", "`num_hidden_layers` (3)")
    del config["layer_types"]
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    has(refuse(f"model.path={model}"), "missing", "model.layers.2.", "belong together")
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    has(refuse(f"model.path={model}"), "shape (96, 64)", "asks for (128, 64)")


def test_a_header_that_promises_more_than_the_file_holds(
    refuse: Refuse, run: Run, tmp_path: Path
) -> None:
    weights = copy_of_model(run, tmp_path) / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**60) + weights.read_bytes()[8:])
    has(refuse(f"model.path={weights.parent}"), weights, "fetch it anew")


# ------------------------------------------------------------------ tokenizer and dialect


def test_a_dialect_that_is_not_known(refuse: Refuse) -> None:
    has(refuse("tokenizer.dialect=hermess"), "tokenizer.dialect='hermess'", "nearest: hermes")


def test_a_tokenizer_that_is_larger_than_the_embedding(
    refuse: Refuse, run: Run, tmp_path: Path
) -> None:
    model = copy_of_model(run, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    has(refuse(f"model.path={model}"), "492 tokens", "300 embedding rows", "belongs to the model")


def test_a_tokenizer_folder_without_tokenizer(refuse: Refuse, tmp_path: Path) -> None:
    has(refuse(f"tokenizer.path={tmp_path}"), tmp_path, "tokenizer.json")


def test_a_tokenizer_without_chat_template(refuse: Refuse) -> None:
    has(refuse("tokenizer.chat_template="), "no chat template", "tokenizer.chat_template=hermes")


# ------------------------------------------------------------------ environments, rewards, credit


def test_a_module_that_is_not_there(refuse: Refuse, tmp_path: Path) -> None:
    has(refuse(f"environment.modules=[{tmp_path / 'absent.py'}]"), "no file", "absent.py")


def test_a_module_that_fails(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    message = refuse(f"environment.modules=[{tmp_path / 'broken.py'}]")
    has(message, "broken.py", "ModuleNotFoundError", "nothing_of_this_name")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_environment_that_nothing_registers(refuse: Refuse, tmp_path: Path, split: str) -> None:
    write_rows(tmp_path / "rows.jsonl", [prompt(1), prompt(2) | {"environment": "paritty"}])
    message = refuse(f"data.{split}={tmp_path / 'rows.jsonl'}")
    has(message, "prompt 'p2'", "environment='paritty'", "nearest: parity")


def test_an_environment_that_refuses_its_task(refuse: Refuse, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [prompt(1) | {"task": {}}])
    message = refuse(f"data.train={tmp_path / 'rows.jsonl'}")
    has(message, "prompt 'p1'", "'parity' refuses its task", "KeyError: 'want'")


def test_a_reward_that_nothing_registers(refuse: Refuse) -> None:
    has(refuse("rewards.parts={evn: 1}"), "rewards.parts='evn'", "nearest: even")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["credit.tau=-1"], "credit.tau=-1"),
        (["credit.entropy_floor=0"], "credit.entropy_floor=0"),
        (["credit.w_min=2", "credit.w_max=1"], "credit.w_min=2"),
        (["credit.w_min=5"], "credit.w_max=4.0"),  # the preset's
        (["credit.rule=entropie"], "nearest: entropy"),
        (["credit.tokens=high-entropy", "loss.scoring=false"], "set loss.scoring=true"),
        (["loss.scoring=false", "loss.optimizer_steps=2"], "loss.optimizer_steps=2"),
    ],
)
def test_credit_out_of_range(refuse: Refuse, words: list[str], part: str) -> None:
    has(refuse(*words), part)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"id": "b", "messages": [', ["not valid JSON"]),
        ('{"id": "a", "messages": [{"role": "user", "content": "?"}]}', ["'a' was used at", ":1"]),
        ('{"id": "b", "messages": []}', ["messages=[]"]),
        ('{"id": "b", "mesages": []}', ["unknown key 'mesages'", "'messages'"]),
        ('{"id": "b", "messages": [{"role": "robot", "content": "?"}]}', ["'robot'", "user"]),
        ("[1, 2]", ["row=[1, 2]", "an object"]),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(
    refuse: Refuse, tmp_path: Path, row: str, parts: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    good = '{"id": "a", "messages": [{"role": "user", "content": "?"}]}'
    rows.write_text(f"{good}\n{row}\n")
    has(refuse(f"data.train={rows}"), f"{rows}:2: ", *parts)


@pytest.mark.parametrize("key", ["data.train", "data.held_out"])
def test_a_file_of_prompts_that_is_not_there(refuse: Refuse, tmp_path: Path, key: str) -> None:
    has(refuse(f"{key}={tmp_path / 'absent.jsonl'}"), "absent.jsonl' is not a file")


def test_files_that_a_verb_needs_must_be_named(refuse: Refuse) -> None:
    has(refuse("data.train="), "data.train is empty")
    has(refuse("data.held_out=", verb="eval"), "data.held_out is empty")
    has(refuse("sft.data=", verb="sft"), "sft.data is empty")


def test_a_prompt_that_leaves_no_room_to_reply(refuse: Refuse) -> None:
    message = refuse("rollout.max_tokens=40")
    has(message, "prompt 'p0'", "rollout.max_tokens is 40", "raise rollout.max_tokens")


def test_a_dialogue_that_is_longer_than_a_micro_batch(refuse: Refuse, run: Run) -> None:
    message = refuse("packing.tokens=20", "rollout.max_tokens=20", "data.held_out=", verb="sft")
    has(message, "dialogues.jsonl: dialogue 1", "packing.tokens is 20")


def test_a_dialogue_with_adjacent_replies_is_named(refuse: Refuse, tmp_path: Path) -> None:
    bad = dialogue(2)["messages"]
    write_rows(tmp_path / "rows.jsonl", [dialogue(1), {"messages": [*bad, bad[-1]]}])
    message = refuse(f"sft.data={tmp_path / 'rows.jsonl'}", verb="sft")
    has(message, "rows.jsonl: dialogue 2: ", "adjacent")


# ------------------------------------------------------------------ the run directory


def checkpoint(run: Run, run_dir: Path, *words: object, **changes: Any) -> Path:
    """What a checkpoint of step 3 keeps beside tensors, of this run with `words`."""
    _, config = read(["train", str(run.config), f"run.dir={run_dir}", *map(str, words)])
    state = {"step": 3, "optimizer_steps": 3, "verb": "train", "config": config.to_dict()}
    folder = folder_of(run_dir, 3)
    folder.with_name("partial").mkdir(parents=True)
    complete(folder.with_name("partial"), folder, state | changes, {}, keep=1)
    return folder


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [
        ("run.seed", "1", "2"),
        ("optimizer.name", "sgd", "muon"),
        ("optimizer.distributed", "false", "true"),
        ("tokenizer.dialect", "toolrl", "hermes"),
        ("model.init", "random", "load"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_shown_both_values(
    refuse: Refuse, run: Run, tmp_path: Path, key: str, then: str, now: str
) -> None:
    sharded = "optimizer.distributed=false"
    folder = checkpoint(run, tmp_path, sharded, f"{key}={then}")
    message = refuse(f"run.dir={tmp_path}", sharded, f"{key}={now}")
    has(message.lower(), key, then, now, str(folder).lower(), "run.fresh=true")


def test_what_another_verb_made_is_not_resumed(refuse: Refuse, run: Run, tmp_path: Path) -> None:
    checkpoint(run, tmp_path, verb="sft")
    has(refuse(f"run.dir={tmp_path}"), "made by `sft`, not `train`", "use another run.dir")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3}'])
def test_a_damaged_only_checkpoint_is_an_error_and_not_a_new_start(
    refuse: Refuse, run: Run, tmp_path: Path, text: str
) -> None:
    folder = checkpoint(run, tmp_path)
    (folder / "run_state.json").write_text(text)
    has(refuse(f"run.dir={tmp_path}"), "none of the checkpoints", folder, "cannot be read")
