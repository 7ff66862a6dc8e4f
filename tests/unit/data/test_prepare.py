"""Public rows become prompts that the rewards judge, and every row and prompt is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ConfigError
from rest_mega.data.bfcl_rows import split
from rest_mega.data.prepare import Plan, Report, is_held_out, prepare
from rest_mega.data.prompts import load_prompts
from rest_mega.dialects import parse
from rest_mega.records import Prompt, Trajectory, Turn
from rest_mega.rewards import RUBRIC

NONE = np.zeros(0, dtype=np.int32)
SYSTEM = "Use <tool_call> with one JSON object per line."
CALL = {"name": "get weather", "parameters": {"city": "Zürich", "days": 3}}
GOLD = f"<think> ok </think>\n<tool_call>\n{json.dumps(CALL, ensure_ascii=False)}\n</tool_call>"
TOOLRL = {
    "data_source": "rlla",
    "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Weather?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": GOLD},
    "extra_info": {"index": 7, "split": "train"},
}
RAW = {"instruction": SYSTEM, "input": "Weather?", "output": GOLD}
BANK = {"system": SYSTEM, "user": "Weather?", "answer": CALL, "other": {"file": "a.jsonl", "id": 0}}
BFCL = {
    "id": "live_simple_1",
    "question": [[{"role": "user", "content": "Area of 3 by 4.5, please."}]],
    "function": [
        {
            "name": "geo.area",
            "description": "Area.",
            "parameters": {
                "type": "dict",
                "required": ["a", "shape"],
                "properties": {
                    "a": {"type": "float"},
                    "unit": {"type": "any"},
                    "shape": {"type": "dict", "properties": {"kind": {"type": "String"}}},
                    "points": {"type": "tuple", "items": {"type": "dict"}},
                },
            },
        }
    ],
}
ANSWER = {
    "geo.area": {
        "a": ["", 4.5, 5],
        "unit": ["", "m"],
        "shape": [{"kind": ["square", "box"], "note": ["", "x"]}],
        "points": [[{"x": [1, 2]}, {"x": [3]}]],
    }
}
CHOSEN = {"a": 4.5, "shape": {"kind": "square"}, "points": [{"x": 1}, {"x": 3}]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
}
ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"n": 2}'}}
    ],
}
CHAT = {
    "id": "talk",
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "?"}],
        },
        ASKED,
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ],
    "tools": [TOOL],
}
OURS = {"id": "x", "messages": [{"role": "user", "content": "hi"}], "environment": "calendar"}
ASK = {"role": "user", "content": "Sort it."}
TURNS = {"id": "multi_turn_miss_func_0", "question": [[ASK], []],
         "missed_function": {"1": ["sort"]}, "involved_classes": ["GorillaFileSystem"],
         "initial_config": {"GorillaFileSystem": {}}, "excluded_function": ["cp"],
         "ground_truth": [[], ["sort('a')"]]}  # fmt: skip
ROWS = {"toolrl": TOOLRL, "api-bank": BANK, "chat": CHAT, "prompts": OURS}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def plan(folder: Path, form: str, *sources: Path, **changes: Any) -> Plan:
    return replace(Plan(form, sources, folder / "out" / "train.jsonl"), **changes)


def prompts_of(folder: Path, form: str, *rows: object) -> list[Prompt]:
    """The prompts of good rows."""
    made = plan(folder, form, write(folder / "rows.jsonl", *rows), strict=True)
    prepare(made)
    return load_prompts(made.out)


def bfcl_prompts(folder: Path, row: dict[str, Any], *answers: object) -> list[Prompt]:
    source = write(folder / "BFCL_v4_live_simple.json", row)
    if answers:
        write(folder / "possible_answer" / source.name, {"id": row["id"], "ground_truth": answers})
    made = plan(folder, "bfcl", source, strict=True)
    prepare(made)
    return load_prompts(made.out)


def judged(prompt: Prompt, reply: str, dialect: str) -> dict[str, float]:
    """What the rewards give to one reply."""
    read = parse(reply.encode(), dialect)
    turn = Turn(0, 0, reply, read.well_formed, answer=read.answer, calls=tuple(read.calls))
    trajectory = Trajectory(prompt, 0, NONE, NONE, NONE, NONE, NONE, (turn,), stop="answered")
    return {name: RUBRIC[name](trajectory) for name in ("toolrl", "tool_calls", "format")}


@pytest.mark.parametrize(("form", "row"), [("toolrl", TOOLRL), ("toolrl", RAW), ("api-bank", BANK)])
def test_the_gold_reply_gets_the_full_reward_and_another_does_not(
    tmp_path: Path, form: str, row: dict[str, Any]
) -> None:
    (prompt,) = prompts_of(tmp_path, form, row)
    full = judged(prompt, prompt.task["ground_truth"], "toolrl")
    assert full == {"toolrl": 4.0, "tool_calls": 1.0, "format": 1.0}
    # names, keys and one of two values: (1 + 1 + 1) of 1 + 1 + 2, and 6 x 3/4 - 3 + 1
    near = judged(prompt, prompt.task["ground_truth"].replace("3}", "4}"), "toolrl")
    assert near == {"toolrl": 2.5, "tool_calls": 0.75, "format": 1.0}
    assert [m["content"] for m in prompt.messages] == [SYSTEM, "Weather?"]


def test_a_parquet_file_gives_the_prompts_that_the_trainer_reads_itself(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TOOLRL]), source)
    made = plan(tmp_path, "toolrl", source)
    assert prepare(made).train == 1
    assert load_prompts(made.out) == load_prompts(source)


def test_of_bfcl_s_possible_answers_the_first_is_gold_and_optional_ones_are_left_out(
    tmp_path: Path,
) -> None:
    (prompt,) = bfcl_prompts(tmp_path, BFCL, ANSWER)
    assert prompt.task == {"calls": [{"name": "geo.area", "arguments": CHOSEN}]}
    written = f"geo.area(a=4.5, shape={CHOSEN['shape']}, points={CHOSEN['points']})"
    assert judged(prompt, f"[{written}]", "pythonic")["tool_calls"] == 1.0
    assert prompt.tools[0]["function"]["parameters"] == {
        "type": "object",
        "required": ["a", "shape"],
        "properties": {
            "a": {"type": "number"},
            "unit": {},
            "shape": {"type": "object", "properties": {"kind": {"type": "string"}}},
            "points": {"type": "array", "items": {"type": "object"}},
        },
    }


def test_where_bfcl_wants_no_call_a_reply_without_one_is_right(tmp_path: Path) -> None:
    (prompt,) = bfcl_prompts(tmp_path, {**BFCL, "id": "irrelevance_0"})
    assert judged(prompt, "I cannot.", "hermes")["tool_calls"] == 1.0
    call = '<tool_call>{"name": "geo.area", "arguments": {}}</tool_call>'
    assert judged(prompt, call, "hermes")["tool_calls"] == 0.0


def test_a_bfcl_entry_of_several_turns_is_a_task_of_its_environment(tmp_path: Path) -> None:
    entry = {key: value for key, value in TURNS.items() if key != "ground_truth"}
    (prompt,) = bfcl_prompts(tmp_path, entry, *TURNS["ground_truth"])
    assert (prompt.messages, prompt.tools, prompt.environment) == ((ASK,), (), "bfcl")
    assert prompt.task == {
        "classes": ["GorillaFileSystem"],
        "config": {"GorillaFileSystem": {}},
        "long_context": False,
        "turns": [
            {"user": "Sort it.", "offers": [], "calls": []},
            {
                "user": "I have updated some more functions you can choose from. What about now?",
                "offers": ["sort"],
                "calls": ["sort('a')"],
            },
        ],
    }


def test_prompts_that_begin_alike_and_go_on_otherwise_are_no_duplicates(tmp_path: Path) -> None:
    other = changed(TURNS, id="multi_turn_base_0", question=[[ASK], [ASK]])
    same = changed(TURNS, id="multi_turn_miss_func_2")
    source = write(tmp_path / "rows.jsonl", TURNS, other, same)
    report = prepare(plan(tmp_path, "bfcl", source, strict=True))
    assert (report.train, report.duplicates) == (2, 1)


def test_bfcl_s_scenarios_of_the_test_side_never_become_training_prompts(tmp_path: Path) -> None:
    rows = [
        changed(TURNS, id=f"multi_turn_miss_func_{number}", question=[[ask], []])
        for number in range(40)
        for ask in [{"role": "user", "content": f"question {number}"}]
    ]
    source = write(tmp_path / "rows.jsonl", *rows)
    split_up = plan(tmp_path, "bfcl", source, held_out=tmp_path / "held_out.jsonl", share=0.9)
    prepare(split_up)
    train = load_prompts(split_up.out)
    assert {split(prompt.id) for prompt in train} == {"train"}
    assert {split(prompt.id) for prompt in load_prompts(tmp_path / "held_out.jsonl")} == {"test"}
    report = prepare(plan(tmp_path, "bfcl", source))
    assert (report.train, report.rejected.total()) == (len(train), 40 - len(train))
    assert load_prompts(split_up.out) == train


def test_every_assistant_turn_of_a_dialogue_is_a_prompt_with_its_calls_as_gold(
    tmp_path: Path,
) -> None:
    first, second = prompts_of(tmp_path, "chat", CHAT)
    assert (first.id, second.id) == ("talk#1", "talk#2")
    assert first.messages == ({"role": "user", "content": "two?"},)
    assert first.task == {"calls": [{"name": "f", "arguments": {"n": 2}}], "response": None}
    # the history's arguments are an object: a template that writes JSON would quote a string again
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"n": 2}
    assert (len(second.messages), second.task) == (3, {"calls": [], "response": "Four."})
    assert first.tools == second.tools == (TOOL,)


def changed(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**row, **fields}


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    return changed(CHAT, messages=[{"role": "user", "content": "hi"}, *messages])


SAYS = {"role": "assistant", "content": "ok"}
BAD = [
    ("toolrl", '{"prompt": ', "not valid JSON at column"),
    ("toolrl", {"prompt": TOOLRL["prompt"]}, "reward_model=None must be a column of a ToolRL row"),
    ("toolrl", changed(RAW, output=None), "output=None must be the gold reply"),
    ("toolrl", changed(RAW, output="<tool_call>"), "output='<tool_call>' must be a reply in"),
    ("toolrl", changed(RAW, input="\ud800"), "must be values that JSON in UTF-8 can hold"),
    ("api-bank", changed(BANK, answer=[]), r"answer=\[\] must be the gold call"),
    ("api-bank", changed(BANK, answer={"name": "f"}), "answer=.* must be the gold call"),
    ("chat", changed(CHAT, messages=CHAT["messages"][:1]), "role='user' must be assistant"),
    ("chat", changed(CHAT, tool=[]), "unknown key 'tool'; did you mean 'tools'"),
    ("chat", changed(CHAT, tools=[]), "messages.1..tool_calls='f' must be calls of the row's"),
    ("chat", talk(SAYS, SAYS), r"messages\[2\].role='assistant' must be after a message of the"),
    ("chat", talk({**SAYS, "content": "<tool_call>{"}), "must be without calls written as text"),
    ("chat", talk({**SAYS, "content": None}), r"messages\[1\].content=None must be a string"),
    ("chat", talk({**SAYS, "function_call": {}}), "must be written as tool_calls"),
    ("chat", talk({**SAYS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
     r"messages\[1\].tool_calls\[0\]=.* must be"),
    ("chat", talk({**SAYS, "content": [{"type": "image_url"}]}), "must be text, or a list of text"),
    ("prompts", changed(OURS, environment="none"), "environment='none' must be the environment"),
    ("bfcl", BFCL, r"ground_truth=None must be the gold calls.*possible_answer/"),
    ("bfcl", changed(BFCL, question=[[], []]), "must be a list of one turn .it has 2"),
    ("chat", changed(CHAT, tools=5), "tools=5 must be a list of function specs"),
    ("bfcl", changed(BFCL, function=[{"parameters": {}}]), "must be a list of ."),
    ("bfcl", changed(BFCL, function=None), "function=None must be a list"),
    ("bfcl", changed(BFCL, ground_truth=[{"g": {}}]), "g is none of the row's functions"),
    ("bfcl", changed(BFCL, ground_truth=[{"geo.area": {"a": [1]}}]), r"all of \['a', 'shape'\]"),
    ("bfcl", changed(BFCL, ground_truth=[{"geo.area": {"a": []}}]), "a has no accepted value"),
    ("bfcl", changed(TURNS, question=[[], []]), "must be a list of turns, each a list of one user"),
    ("bfcl", changed(TURNS, ground_truth=[["f()"]]), "must be a list of gold calls as texts for"),
    ("bfcl", changed(TURNS, missed_function={"1": "sort"}), "missed_function=.* must be .number"),
    ("bfcl", changed(TURNS, involved_classes=None), "involved_classes=None must be a list of"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "problem"), BAD)
def test_a_bad_row_ends_strict_work_and_is_set_aside_otherwise(
    tmp_path: Path, form: str, row: Any, problem: str
) -> None:
    good = ROWS.get(form, changed(BFCL, id="good", ground_truth=[ANSWER]))
    source = write(tmp_path / "rows.jsonl", row, good)
    made = plan(tmp_path, form, source)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:1: .*{problem}"):
        prepare(replace(made, strict=True))
    assert not list(made.out.parent.iterdir())
    report = prepare(made)
    (rejected,) = map(json.loads, made.rejects_path.read_text().splitlines())
    assert rejected["place"] == f"{source}:1"
    assert rejected["row"] == row
    assert (report.rows, report.rejected.total(), report.train) == (
        2,
        1,
        len(load_prompts(made.out)),
    )


def numbered(count: int, text: str = "hi") -> list[dict[str, Any]]:
    message = {"role": "user", "content": text}
    return [{**OURS, "id": f"row {n}", "messages": [{**message, "content": f"{text} {n}"}]}
            for n in range(count)]  # fmt: skip


def counted(report: Report) -> int:
    return report.train + report.held_out + report.duplicates + report.too_long


def test_every_prompt_is_counted_once_and_written_at_most_once(tmp_path: Path) -> None:
    rows = [*numbered(60), *numbered(3), {**numbered(1)[0], "id": "y", "task": {"calls": []}}]
    clash = {**numbered(1, "new")[0]}
    source = write(tmp_path / "rows.jsonl", *rows, clash)
    made = plan(tmp_path, "prompts", source, held_out=tmp_path / "held.jsonl", max_tokens=4)
    report = prepare(made, tokens_of=lambda prompt: len(str(prompt.messages[0]["content"])))
    train, held = load_prompts(made.out), load_prompts(tmp_path / "held.jsonl")
    assert (report.rows, counted(report), report.duplicates, report.conflicts) == (65, 64, 4, 1)
    assert (report.too_long, report.longest) == (50, 4)
    assert report.rejected == Counter({"there must be an id of its own for every prompt": 1})
    assert (report.train, report.held_out) == (len(train), len(held))
    assert {p.id for p in train} | {p.id for p in held} == {f"row {n}" for n in range(10)}


def test_what_a_named_tool_adds_is_not_guessed(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {**OURS, "tools": ["f"]})
    made = plan(tmp_path, "prompts", source, strict=True)
    assert prepare(made).train == 1
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: tools=\('f',\) must be whole specs"):
        prepare(made, tokens_of=lambda prompt: 1)


def test_added_rows_change_the_side_of_no_other_row(tmp_path: Path) -> None:
    def sides(name: str, rows: list[dict[str, Any]], seed: int) -> tuple[set[str], set[str]]:
        out, held = tmp_path / f"{name}.jsonl", tmp_path / f"{name}_held.jsonl"
        source = write(tmp_path / "rows.jsonl", *rows)
        prepare(Plan("prompts", (source,), out, held, share=0.3, seed=seed))
        return {p.id for p in load_prompts(out)}, {p.id for p in load_prompts(held)}

    train, held = sides("few", numbered(40), 1)
    more_train, more_held = sides("more", numbered(80)[::-1], 1)
    assert (train, held) == (more_train & (train | held), more_held & (train | held))
    assert sides("other", numbered(40), 2)[1] != held


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_of_rows_held_out_is_the_one_asked_for(share: float) -> None:
    for seed in range(5):
        count = sum(is_held_out(str(n), seed, share) for n in range(1000))
        assert abs(count - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5


def test_the_turns_of_a_dialogue_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{**CHAT, "id": str(n), "messages": [{"role": "user", "content": f"{n}?"},
             *CHAT["messages"][1:]]} for n in range(30)]  # fmt: skip
    made = plan(tmp_path, "chat", write(tmp_path / "rows.jsonl", *rows), share=0.5)
    prepare(replace(made, held_out=tmp_path / "held.jsonl"))
    stems = Counter(p.id[:-2] for p in load_prompts(tmp_path / "held.jsonl"))
    assert stems
    assert set(stems.values()) == {2}


def test_files_of_an_earlier_run_stay_when_no_prompt_is_left(tmp_path: Path) -> None:
    made = plan(tmp_path, "prompts", write(tmp_path / "rows.jsonl", *numbered(2)))
    prepare(made)
    before = made.out.read_bytes()
    with pytest.raises(ConfigError, match=r"of 2 rows 0 were rejected.* 2 longer than 1 tokens"):
        prepare(replace(made, max_tokens=1), tokens_of=lambda prompt: 2)
    with pytest.raises(ConfigError, match=r"no prompt is held out: .* 2 for training"):
        prepare(replace(made, held_out=tmp_path / "held.jsonl", share=1e-9))
    assert made.out.read_bytes() == before
    assert sorted(p.name for p in made.out.parent.iterdir()) == [
        "train.jsonl", "train.rejects.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "bfc"}, "format='bfc' is not known.*nearest: bfcl"),
        ({"share": 0.0}, "share 0.0 must be above 0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"held_out": Path("a.jsonl")}, "a.jsonl is named twice"),
        ({"rejects": Path("b.jsonl")}, "b.jsonl is named twice"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        replace(Plan("prompts", (Path("a.jsonl"),), Path("b.jsonl")), **changes)
