"""What is evaluated is not trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, EvaluationConfig
from rest_mega.data.bfcl_rows import split
from rest_mega.evaluation.play import Benchmark, open_benchmarks
from rest_mega.evaluation.split import check_dialogues, check_split
from rest_mega.evaluation.suite import Task
from rest_mega.records import Prompt
from tests.unit.evaluation.test_play import Sums

DATA = str(Path(__file__).parents[2] / "data" / "api_bank")


def prompt(name: str, text: str = "", environment: str = "none", **task: Any) -> Prompt:
    return Prompt(name, ({"role": "user", "content": text or name},), (), environment, task)


@pytest.fixture(scope="module")
def api_bank() -> list[Benchmark]:
    return open_benchmarks(EvaluationConfig(suites={"api-bank": ()}, data={"api-bank": DATA}))


def refused(*given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_split(*given)
    return str(caught.value)


def test_rows_of_their_own_may_be_trained_on(api_bank: list[Benchmark]) -> None:
    check_split([prompt("a"), prompt("b")], [prompt("c")], api_bank)


def test_a_held_out_prompt_is_known_by_what_is_said() -> None:
    message = refused(
        [prompt("t1"), prompt("t2", "What  is IT?")], [prompt("h", "what is it?")], []
    )
    assert "'t2'" in message
    assert "held-out prompt 'h'" in message


def test_the_same_words_in_another_state_are_another_prompt() -> None:
    train = prompt("t", "Pay it.", "desk", state=1, calls=["pay"])
    check_split([train], [prompt("h", "Pay it.", "desk", state=2, calls=["pay"])], [])
    assert "'t'" in refused([train], [prompt("h", "Pay it.", "desk", state=1, calls=[])], [])


def test_a_benchmarks_task_is_known_by_its_words_under_another_system_message(
    api_bank: list[Benchmark],
) -> None:
    task = api_bank[0].tasks[3].prompt
    other = ({"role": "system", "content": "Be brief."}, *task.messages[1:])
    train = dataclasses.replace(task, id="mine", messages=other)
    message = refused([prompt("x"), train], [], api_bank)
    assert "'mine' is api-bank's 'Level1_3'" in message
    assert "take the row out" in message


def test_bfcls_stories_are_trained_on_by_the_training_side_alone() -> None:
    numbers = {split(f"multi_turn_base_{n}"): n for n in range(200)}
    mine = f"multi_turn_miss_func_{numbers['train']}"
    check_split([prompt(mine, environment="bfcl")], [], [])
    tested = f"multi_turn_base_{numbers['test']}-2"
    assert "evaluation.side=test" in refused([prompt(tested, environment="bfcl")], [], [])
    evaluated = Task(
        prompt(f"multi_turn_base_{numbers['train']}", "another category", "bfcl"),
        "multi_turn_base",
        source=f"multi_turn_{numbers['train']}",
    )
    benchmark = Benchmark(Sums(), [evaluated], 1)
    assert mine in refused([prompt(mine, environment="bfcl")], [], [benchmark])


def test_the_test_side_alone_can_be_evaluated() -> None:
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed: make bfcl")
    suites = {"bfcl": ("multi_turn_base", "live_relevance")}
    (whole,) = open_benchmarks(EvaluationConfig(suites=suites))
    (tested,) = open_benchmarks(EvaluationConfig(suites=suites, side="test"))
    assert {task.prompt.id for task in tested.tasks} == {
        task.prompt.id for task in whole.tasks if split(task.prompt.id) == "test"
    }
    assert 16 < len(tested.tasks) < len(whole.tasks)
    train = [task.prompt for task in whole.tasks if split(task.prompt.id) == "train"]
    check_split(train, [], [tested])
    assert train[0].id in refused(train, [], [whole])


def test_dialogues_are_compared_up_to_every_turn(api_bank: list[Benchmark]) -> None:
    task = api_bank[0].tasks[0].prompt
    answer = {"role": "assistant", "content": "Yes."}
    ours = [{"role": "user", "content": "Hello"}, answer]
    check_dialogues([("d.jsonl: dialogue 1", ours)], [prompt("h")], api_bank)
    bad = [*task.messages, answer]
    with pytest.raises(ConfigError, match=r"d.jsonl: dialogue 2 holds api-bank's 'Level1_0'"):
        check_dialogues([("1", ours), ("d.jsonl: dialogue 2", bad)], [], api_bank)
    later = [*ours, {"role": "user", "content": "And now?"}, answer]
    held_out = Prompt("h", tuple(later[:3]))
    with pytest.raises(ConfigError, match="held-out prompt 'h'"):
        check_dialogues([("d", later)], [held_out], [])
