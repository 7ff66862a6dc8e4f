"""API-Bank: `compat` against an independent statement of the published rules, `strict` by hand.

On a few made-up rows; API_BANK=FOLDER has `compat` and the gold replies tried on its files instead.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError
from rest_mega.evaluation.api_bank import ApiBank
from rest_mega.evaluation.suite import Played, Result, Task, Verdict
from rest_mega.records import Turn

DATA = Path(__file__).parents[2] / "data" / "api_bank"
EVERY = Path(os.environ.get("API_BANK") or DATA)


@pytest.fixture(scope="module")
def suite() -> ApiBank:
    return ApiBank(str(DATA))


@pytest.fixture(scope="module")
def every() -> ApiBank:
    return ApiBank(str(EVERY))


def played(text: str, ended: bool = True) -> Played:
    return Played((Turn(0, 1, text, True, ended),), "answered" if ended else "token_limit")


def judged(suite: ApiBank, task: Task, text: str, ended: bool = True) -> Verdict:
    return suite.judge(task, played(text, ended))


def gold_text(task: Task, **change: Any) -> str:
    call = {"name": task.gold[0].name, "parameters": dict(task.gold[0].arguments)}
    return json.dumps({**call, **change})


def reply(*lines: str, think: str = "I call it.") -> str:
    return "\n".join([f"<think> {think} </think>", "<tool_call>", *lines, "</tool_call>"])


# ------------------------------------------------------------------ the published rules, restated


def published(raw: str, answer: Any) -> int:
    """The score as the rules say it, written from a description of them: take the text after the
    last opening tag, up to the first closing one; decode what lines can be; walk the values until
    one equals the gold call; whatever goes wrong on the way ends the walk."""
    gold = answer if not isinstance(answer, list) else answer[0]
    after = raw.strip().split("<tool_call>")[-1]
    until = after.split("</tool_call>")[0]
    decoded: list[Any] = []
    for piece in until.strip().split("\n"):
        if piece.strip():
            try:
                decoded.append(json.loads(piece))
            except Exception:
                decoded += []
    try:
        for one in decoded:
            value = json.loads(one) if type(one) is str else one
            if "name" not in value or "parameters" not in value:
                pair = (gold["name"], value)
            else:
                pair = (value["name"], value["parameters"])
            if pair == (gold["name"], gold["parameters"]):
                return 1
    except Exception:
        return 0
    return 0


def lines_of(call: dict[str, Any]) -> Iterator[str]:
    """A call and what may become of it."""
    name, parameters = call["name"], call["parameters"]
    yield json.dumps(call)
    yield json.dumps({**call, "extra": 1})
    yield json.dumps(parameters)
    yield json.dumps({"parameters": parameters})
    yield json.dumps({"name": name})
    yield json.dumps({"name": name, "arguments": parameters})
    yield json.dumps({"name": "Other", "parameters": parameters})
    yield json.dumps({"name": [name], "parameters": parameters})
    yield json.dumps(json.dumps(call))
    yield json.dumps(json.dumps(parameters))
    yield json.dumps([name, parameters])
    yield from ('["name", "parameters"]', '"name and parameters"', '"words"', "5", "null", "true")
    yield from ("{", "", "  ", "NaN", "{}", '"{"', "[" * 5000, "7" * 5000)
    for key in parameters:
        fewer = {k: v for k, v in parameters.items() if k != key}
        yield json.dumps({"name": name, "parameters": fewer})
        yield json.dumps({"name": name, "parameters": {**parameters, key: 5}})
        yield json.dumps({"name": name, "parameters": {**fewer, key: parameters[key]}})
    yield json.dumps({"name": name, "parameters": {**parameters, "more": ""}})


def replies_of(call: dict[str, Any], draws: random.Random) -> Iterator[str]:
    lines = list(lines_of(call))
    for line in lines:
        yield reply(line)
        yield line
        yield f"<tool_call>{line}</tool_call>"
        yield f"<tool_call>\n{line}"
        yield f"{reply('{}')}\n{reply(line)} </tool_call> {line}"
        yield f"{reply(line)}\n<tool_call>"
    for _ in range(200):
        yield reply(*draws.sample(lines, draws.randint(2, 4)))


def rows() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(EVERY.glob("level-*.json"))
    return [(file.name[6], row) for file in files for row in json.loads(file.read_text("utf-8"))]


def test_compat_is_the_published_score_on_every_row_and_mutation(every: ApiBank) -> None:
    draws, seen = random.Random(0), set()
    for task, (_, row) in zip(every.tasks(), rows(), strict=True):
        gold = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
        for text in replies_of(gold, draws):
            score = published(text, row["answer"])
            assert judged(every, task, text).details["compat"] == bool(score), text[:300]
            seen.add(score)
    assert seen == {0, 1}


def test_the_table_is_the_published_one(every: ApiBank) -> None:
    """Accuracies of the levels, and of all rows pooled, in per cent with two digits."""
    draws, results, right = random.Random(1), [], {"1": [0], "2": [0], "3": [0]}
    for task, (level, row) in zip(every.tasks(), rows(), strict=True):
        text = draws.choice([reply(gold_text(task)), reply("{}")])
        results.append(Result(task, 0, judged(every, task, text)))
        right[level].append(published(text, row["answer"]))
    table = {row.name: round(100 * row.score, 2) for row in every.summary(results)}
    for level, scores in right.items():
        assert table[f"level-{level}"] == round(sum(scores) / (len(scores) - 1) * 100, 2)
    pooled = list(itertools.chain(*right.values()))
    assert table["overall"] == round(sum(pooled) / (len(pooled) - 3) * 100, 2)


# ------------------------------------------------------------------ strict


def test_the_gold_reply_is_right_by_both(every: ApiBank) -> None:
    for task in every.tasks():
        verdict = judged(every, task, reply(gold_text(task)))
        assert (verdict.valid, verdict.kind, verdict.details["strict"]) == (True, "", True)


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (lambda t: json.dumps(dict(t.gold[0].arguments)), True),
        (lambda t: reply(json.dumps(dict(t.gold[0].arguments))), True),
        (lambda t: reply(gold_text(t), gold_text(t)), True),
        (lambda t: reply(gold_text(t), gold_text(t, name="Other")), True),
        (lambda t: reply(gold_text(t)), False),
        (lambda t: reply("not json", gold_text(t)), True),
    ],
    ids=["bare", "borrowed name", "twice", "one more", "cut off", "a bad line"],
)
def test_strict_refuses_what_compat_lets_pass(suite: ApiBank, text: Any, ended: bool) -> None:
    task = suite.tasks()[0]
    verdict = judged(suite, task, text(task), ended)
    assert verdict.valid
    assert not verdict.details["strict"]
    assert verdict.details["strict_reason"]


# ------------------------------------------------------------------ kinds of failure


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        ("the ferry is booked", True, "no call"),
        ("", True, "no call"),
        ("<think> on and on", False, "cut off"),
        ("\ud800 \x00 <tool_call>", True, "no call"),
        (reply('{"name": "FlyAway", "parameters": {}}'), True, "wrong tool"),
        (reply('{"name": "BookFerry", "parameters": {"day": "4"}}'), True, "wrong arguments"),
        (reply('{"name": "BookFerry"}'), True, "wrong arguments"),
        (
            reply('{"name": "BookFerry", "parameters": {"date": "today", "passenger": "Ana"}}'),
            True,
            "wrong value",
        ),
    ],
)
def test_whatever_the_model_writes_is_scored(
    suite: ApiBank, text: str, ended: bool, kind: str
) -> None:
    verdict = judged(suite, suite.tasks()[0], text, ended)
    assert (verdict.valid, verdict.kind, verdict.details["strict"]) == (False, kind, False)
    assert verdict.reason


def test_a_prompt_that_did_not_fit_is_wrong(suite: ApiBank) -> None:
    verdict = suite.judge(suite.tasks()[0], Played((), "prompt_length", note="9000 tokens"))
    assert (verdict.kind, verdict.reason) == ("prompt_length", "9000 tokens")
    assert not verdict.details["strict"]


# ------------------------------------------------------------------ the data


def test_levels_can_be_chosen(suite: ApiBank) -> None:
    assert [t.prompt.id for t in suite.tasks(["level-3"])] == ["Level3_0", "Level3_1"]
    assert {t.category for t in suite.tasks()} == set(suite.categories())
    with pytest.raises(ConfigError, match=r"level-4.*choose one of level-1, level-2, level-3"):
        suite.tasks(["level-4"])
    assert ApiBank(str(DATA / "level-2-api_processed.json")).categories() == ("level-2",)


def test_the_version_changes_with_the_data(suite: ApiBank, tmp_path: Path) -> None:
    for file in DATA.glob("*.json"):
        text = file.read_text("utf-8").replace("Jo Park", "Jo Parker")
        (tmp_path / file.name).write_text(text, "utf-8")
    other = ApiBank(str(tmp_path)).version
    assert other != suite.version
    assert "4/2/2 rows" in other


def broken(row: dict[str, Any], **change: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    return {**row, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": {"name": "X"}}, r"row 2: answer=.*must be the gold call"),
        ({"answer": [{"name": "X", "parameters": {}}] * 2}, r"row 2: answer=.*just one"),
        ({"system": None}, r"row 2: messages\[0\].content=None"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "level-1-api_processed.json"
    good = rows()[0][1]
    file.write_text(json.dumps([good, broken(good, **change)]), "utf-8")
    with pytest.raises(ConfigError, match=message):
        ApiBank(str(file))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "level-1.jsonl"
    file.write_text(json.dumps(rows()[0][1]) + "\n{oh\n", "utf-8")
    with pytest.raises(ConfigError, match=r"level-1\.jsonl:2"):
        ApiBank(str(file))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "needs its data"),
        ("absent", "must be a folder, or a file whose name"),
        (".", "none of"),
    ],
)
def test_a_path_that_is_none_is_answered_with_what_to_give(
    data: str, message: str, tmp_path: Path
) -> None:
    path = str(tmp_path) if data == "." else data
    with pytest.raises(ConfigError, match=message):
        ApiBank(path)
