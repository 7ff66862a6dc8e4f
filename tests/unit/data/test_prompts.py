"""Prompts from files of every form, errors that name their place, and the stream that draws
them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.data.prompts import PromptStream, load_dialogues, load_prompts
from rest_mega.records import Prompt

MADE_UP = Path(__file__).parents[3] / "examples" / "data" / "toolrl_made_up.jsonl"
USER = {"role": "user", "content": "Wie wird das Wetter in Zürich?"}
REPLY = {"role": "assistant", "content": "eins"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ROW = {
    "id": "a",
    "messages": [USER],
    "tools": [TOOL],
    "environment": "calendar",
    "task": {"goal": [1, {"x": None}]},
}
GOLD = '<think> p </think>\n<tool_call>\n{"name": "f", "parameters": {"n": 3}}\n</tool_call>'


def write_lines(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def toolrl_row(gold: object = GOLD, **changes: Any) -> dict[str, Any]:
    return {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": gold}, **changes}


def test_our_rows_become_prompts_as_they_stand(tmp_path: Path) -> None:
    bare = {"id": "b", "messages": [{"role": "system", "content": "Kurz."}, USER]}
    assert load_prompts(write_lines(tmp_path, ROW, bare)) == [
        Prompt("a", (USER,), (TOOL,), "calendar", {"goal": [1, {"x": None}]}),
        Prompt("b", ({"role": "system", "content": "Kurz."}, USER)),
    ]


def test_a_system_message_is_put_before_prompts_that_carry_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "mine"}
    path = write_lines(tmp_path, ROW, {"id": "b", "messages": [own, USER]})
    given = {"role": "system", "content": "Be brief."}
    assert [p.messages for p in load_prompts(path, system="Be brief.")] == [
        (given, USER),
        (own, USER),
    ]


def test_toolrl_rows_are_the_same_from_lines_a_list_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in MADE_UP.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompts = load_prompts(MADE_UP)
    assert (
        prompts == load_prompts(tmp_path / "rows.json") == load_prompts(tmp_path / "rows.parquet")
    )
    assert [p.id for p in prompts] == [f"made_up-train-{n}" for n in range(12)]
    for prompt, row in zip(prompts, rows, strict=True):
        assert (prompt.messages, prompt.environment, prompt.tools) == (
            tuple(row["prompt"]),
            "none",
            (),
        )
        assert prompt.task["ground_truth"] == row["reward_model"]["ground_truth"]


def test_the_gold_reply_of_a_toolrl_row_is_parsed() -> None:
    tasks = [prompt.task for prompt in load_prompts(MADE_UP)]
    assert tasks[4]["calls"] == [
        {"name": "list_events", "arguments": {"date": f"2031-05-0{day}"}} for day in (2, 3)
    ]
    assert tasks[4]["response"] is None
    assert tasks[7]["calls"] == [{"name": "current_time", "arguments": {}}]
    assert (tasks[10]["calls"], tasks[10]["response"].strip()) == ([], "You are welcome!")
    assert (len(tasks[11]["calls"]), tasks[11]["response"].strip()[:12]) == (1, "I am booking")


def test_toolrl_rows_without_extra_info_are_named_by_their_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path, toolrl_row(), toolrl_row(data_source="rlla"))
    assert [p.id for p in load_prompts(path)] == ["toolrl-row-1", "rlla-row-2"]


BAD = [
    ({"id": "a"}, r"messages=None must be a list"),
    ({**ROW, "messages": []}, r"messages=\[\] must be a list"),
    ({**ROW, "id": ""}, r"id='' must be a string that is not empty"),
    ({**ROW, "id": 3}, r"id=3 must be a string"),
    ({**ROW, "messages": ["hi"]}, r"messages\[0\]='hi' must be an object"),
    (
        {**ROW, "messages": [{"role": "usr", "content": ""}]},
        r"messages\[0\]\.role='usr' must be one of system, user",
    ),
    ({**ROW, "messages": [{"role": "user"}]}, r"messages\[0\]\.content=None must be a string"),
    (
        {**ROW, "messages": [USER, {"role": "system", "content": "x"}]},
        r"messages\[1\]\.role='system' must be the first",
    ),
    (
        {**ROW, "messages": [USER, {"role": "assistant", "content": "x"}]},
        r"messages.-1.\.role='assistant' must be user or tool",
    ),
    (
        {**ROW, "tools": [{"name": "f"}]},
        r"tools\[0\]=\{'name': 'f'\} must be \{\"type\": \"function\"",
    ),
    ({**ROW, "tools": "f"}, r"tools='f' must be a list of function specs"),
    (
        {**ROW, "environment": None},
        r"environment=None must be the name of a registered environment",
    ),
    ({**ROW, "task": [1]}, r"task=\[1\] must be an object"),
    ({**ROW, "mesages": []}, r"unknown key 'mesages'; did you mean 'messages'\?"),
    ({**ROW, "xyz": 1}, r"unknown key 'xyz'; known keys: id, messages, tools, environment, task"),
    (
        {"id": "a", "prompt": [USER]},
        r"unknown key 'prompt'; .*ToolRL row has both `prompt` and `reward_model`",
    ),
    ([1], r"row=\[1\] must be an object"),
    (toolrl_row(None), r"reward_model\.ground_truth=None must be the gold reply"),
    (
        toolrl_row(GOLD.replace("}}", "}")),
        r"reward_model\.ground_truth='<think> p .* must be a reply in ToolRL's format",
    ),
    (toolrl_row(prompt="hi"), r"prompt='hi' must be a list"),
    (toolrl_row(extra_info="x"), r"extra_info='x' must be an object"),
]


@pytest.mark.parametrize(
    ("row", "problem"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, problem: str) -> None:
    path = write_lines(tmp_path, {**ROW, "id": "first"}, row)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: {problem}"):
        load_prompts(path)
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([{**ROW, "id": "first"}, row]))
    with pytest.raises(ConfigError, match=rf"rows\.json: row 2: {problem}"):
        load_prompts(listed)


def test_a_line_that_is_no_json_is_named_with_its_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path, ROW)
    path.write_text(path.read_text(encoding="utf-8") + '\n{"id": "b",}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: not valid JSON at column 12"):
        load_prompts(path)


def test_a_line_that_was_cut_off_is_named_with_its_last_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path)
    path.write_text('{"id": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: not valid JSON at column 8"):
        load_prompts(path)


@pytest.mark.parametrize("line", [b'{"id": "\xff"}', b"1" * 5000, b"[" * 200_000])
def test_lines_that_the_parser_gives_up_on_are_bad_rows_too(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: not valid JSON"):
        load_prompts(path)


def test_two_prompts_of_one_id_are_an_error_that_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: id='a' was used at .*rows\.jsonl:1"):
        load_prompts(write_lines(tmp_path, ROW, {**ROW, "id": "b"}, ROW))


def test_files_that_hold_nothing_or_are_of_another_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="holds no row"):
        load_prompts(write_lines(tmp_path))
    for name, problem in (
        ("a.csv", r"suffix='\.csv'"),
        ("a.parquet", "not a Parquet file"),
        ("a.json", "one list of rows"),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match=problem):
            load_prompts(tmp_path / name)


def test_dialogues_keep_the_order_and_content_of_the_file(tmp_path: Path) -> None:
    given = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    call = {  # as templates want it
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }
    result, reply = (
        {"role": "tool", "name": "f", "content": "1"},
        {"role": "assistant", "content": "eins"},
    )
    rows = [
        {"messages": [USER, given, result, reply], "tools": [TOOL], "parallel_tool_calls": False},
        {"id": "x", "messages": [USER, reply]},
    ]
    assert load_dialogues(write_lines(tmp_path, *rows)) == [
        ((USER, call, result, reply), (TOOL,)),
        ((USER, reply), ()),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER]}, "role='user' must be assistant"),
        ({"message": [USER]}, "did you mean 'messages'"),
        ({"messages": [{**USER, "weight": 1}, REPLY]}, "role 'user' is never trained"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "must be 0 .not trained. or 1"),
        ({"messages": [USER, {**REPLY, "function_call": {}}]}, "written as tool_calls"),
    ],
)
def test_bad_dialogues_are_named_by_file_and_line(
    tmp_path: Path, row: object, problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:1: .*{problem}"):
        load_dialogues(write_lines(tmp_path, row))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(n), (USER,)) for n in range(count)]


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
    draws=st.lists(st.integers(0, 7), max_size=6),
)
def test_the_order_does_not_depend_on_the_size_of_the_draws(
    count: int, seed: int, draws: list[int]
) -> None:
    stream, whole = PromptStream(prompts(count), seed), PromptStream(prompts(count), seed)
    assert [p for draw in draws for p in stream.next(draw)] == whole.next(sum(draws))


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
    before=st.integers(0, 30),
    after=st.integers(0, 30),
)
def test_a_stream_goes_on_from_its_saved_state(
    count: int, seed: int, before: int, after: int
) -> None:
    stream, resumed = PromptStream(prompts(count), seed), PromptStream(prompts(count), seed)
    stream.next(before)
    resumed.load(json.loads(json.dumps(stream.state())))
    assert stream.next(after) == resumed.next(after)
    assert stream.state() == resumed.state()


def test_every_epoch_is_a_new_permutation_that_seed_and_epoch_determine() -> None:
    stream = PromptStream(prompts(50), seed=3)
    epochs = [[p.id for p in stream.next(50)] for _ in range(3)]
    assert all(Counter(epoch) == Counter(str(n) for n in range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.id for p in PromptStream(prompts(50), seed=4).next(50)] not in epochs


@pytest.mark.parametrize(
    ("other", "problem"), [((5, 1), "seed=0.* seed=1"), ((6, 0), "prompts=5.* prompts=6")]
)
def test_a_state_of_another_file_or_seed_is_refused(other: tuple[int, int], problem: str) -> None:
    stream = PromptStream(prompts(other[0]), other[1])
    with pytest.raises(ConfigError, match=problem):
        stream.load(PromptStream(prompts(5), 0).state())


def test_a_stream_of_no_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        PromptStream([], 0)
