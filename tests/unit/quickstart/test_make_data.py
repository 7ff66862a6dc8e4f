"""The quick-start's data: solvable, deterministic, held-out apart, and cheap for its tokenizer."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import EnvironmentConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_dialogues, load_prompts
from rest_mega.data.tokenizer import Tokenizer, load_tokenizer
from rest_mega.dialects import parse
from rest_mega.environments import answer_calls, load_modules, make_environment

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
(data,) = load_modules([str(QUICKSTART / "make_data.py")])
COUNT = 500


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(QUICKSTART / "tokenizer")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and held-out prompts and dialogues, as main() writes them but fewer."""
    folder = tmp_path_factory.mktemp("quickstart")
    data.write(folder, seed=0, train=COUNT, held_out=128, dialogues=COUNT)
    return folder


def combination(task: dict[str, Any]) -> str:
    return json.dumps([task["kind"], task["calls"], task["answer"]])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_tasks(
    files: Path, tmp_path: Path
) -> None:
    data.write(tmp_path / "again", seed=0, train=COUNT, held_out=128, dialogues=COUNT)
    data.write(tmp_path / "other", seed=1, train=COUNT, held_out=128, dialogues=COUNT)
    for name in ("train", "held_out", "dialogues"):
        first, again, other = (
            f / f"{name}.jsonl" for f in (files, tmp_path / "again", tmp_path / "other")
        )
        assert first.read_bytes() == again.read_bytes()
        assert first.read_bytes() != other.read_bytes()


def test_held_out_combinations_are_never_trained_on_whatever_the_seed(
    files: Path, tmp_path: Path
) -> None:
    data.write(tmp_path, seed=7, train=COUNT, held_out=128, dialogues=1)
    for trained, kept in itertools.product((files, tmp_path), repeat=2):
        train = {combination(p.task) for p in load_prompts(trained / "train.jsonl")}
        held_out = {combination(p.task) for p in load_prompts(kept / "held_out.jsonl")}
        assert len(train) == COUNT
        assert len(held_out) == 128
        assert not train & held_out


def test_demonstrations_show_no_held_out_combination() -> None:
    """Drawn as `dialogues` draws them: every task says itself that it is not held out."""
    tasks = itertools.islice(data.draw(random.Random("x"), data.tasks.KINDS, held_out=False), COUNT)
    assert not any(task.held_out for task in tasks)


def test_prompts_cover_every_kind_evenly(files: Path) -> None:
    for name in ("train", "held_out"):
        kinds = Counter(p.task["kind"] for p in load_prompts(files / f"{name}.jsonl"))
        assert set(kinds) == set(data.tasks.KINDS)
        assert max(kinds.values()) - min(kinds.values()) <= 1


@pytest.mark.parametrize("kind", sorted(data.tasks.KINDS))
def test_gold_calls_solve_the_task_and_the_slip_never_does(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(50):
        task = data.tasks.KINDS[kind](rng)
        assert solves(task, task.turns, task.answer)
        if task.flawed:
            assert not solves(task, *task.flawed)
        assert not solves(task, task.turns, task.answer + 1)


def solves(task: Any, turns: Any, answer: int) -> bool:
    """Whether a policy that writes these calls in Hermes' dialect succeeds without a failed
    call."""
    desk = make_environment("desk", data.record(task))
    good = True
    for calls in turns:
        blocks = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
        reply = parse(
            "\n".join(f"<tool_call>\n{b}\n</tool_call>" for b in blocks).encode(), "hermes"
        )
        good &= all(
            outcome.status == "ok" for outcome in answer_calls(desk, reply, EnvironmentConfig())
        )
    return good and bool(desk.finish(f"Answer: {answer}")["success"])


def test_dialogues_follow_the_curriculum() -> None:
    """One call each at first, then all kinds without a slip, then slips in their share of the
    dialogues."""
    count = 1800
    turns = [
        sum(m["role"] == "assistant" for m in d["messages"])
        for d in data.demonstrations("x", count)
    ]
    easy, careless = int(data.EASY * count), int(data.CARELESS * count)
    whole = [
        sum(n == 4 for n in part) / len(part) for part in (turns[easy:careless], turns[careless:])
    ]
    assert set(turns[:easy]) == {2}
    share = 1 / len(data.tasks.KINDS)  # `change` alone has four turns, its slip has three
    assert whole[0] == pytest.approx(share, abs=0.01)
    assert whole[1] == pytest.approx((1 - data.FLAWED) * share, abs=0.02)


def test_prompts_and_trajectories_are_short(files: Path, tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer)
    assert (
        max(
            len(chat.prompt_ids(p.messages, p.tools))
            for p in load_prompts(files / "held_out.jsonl")
        )
        <= 40
    )
    assert (
        max(len(chat.dialogue_ids(*d)[0]) for d in load_dialogues(files / "dialogues.jsonl")) <= 128
    )


def test_demonstrated_turns_are_written_in_the_dialect(files: Path, tokenizer: Tokenizer) -> None:
    """The template's way of writing calls is what the parser reads: names and arguments come
    back."""
    chat = ChatFormat(tokenizer)
    for messages, tools in load_dialogues(files / "dialogues.jsonl")[-100:]:
        ids, mask = chat.dialogue_ids(messages, tools)
        runs = [
            [i for i, _ in run]
            for on, run in itertools.groupby(zip(ids, mask, strict=True), lambda p: p[1])
            if on
        ]
        turns = [m for m in messages if m["role"] == "assistant"]
        assert len(runs) == len(turns)
        for run, turn in zip(runs, turns, strict=True):
            reply = parse(tokenizer.decode(run[:-1]).encode(), "hermes")
            asked = [call["function"] for call in turn.get("tool_calls", [])]
            assert reply.well_formed
            assert [{"name": c.name, "arguments": dict(c.arguments)} for c in reply.calls] == asked
            assert reply.answer == turn["content"]


def test_words_and_numbers_are_one_token_wherever_they_stand(tokenizer: Tokenizer) -> None:
    words = [
        *data.tasks.ITEMS,
        *data.tasks.PEOPLE,
        *data.tasks.DAYS,
        *(f"{n:02d}" for n in range(100)),
    ]
    for word in words:
        (token,) = tokenizer.encode(word)
        assert all(
            token in tokenizer.encode(text)
            for text in (f"a {word} b", f'{{"x": "{word}"}}', f">{word}<")
        )


def test_the_model_has_a_row_for_every_token(tokenizer: Tokenizer) -> None:
    config = json.loads((QUICKSTART / "model" / "config.json").read_text())
    assert tokenizer.vocab_size <= config["vocab_size"]
    assert config["vocab_size"] % 4 == 0
    assert (config["eos_token_id"], config["pad_token_id"]) == (
        tokenizer.end_of_turn_ids[0],
        tokenizer.pad_id,
    )
