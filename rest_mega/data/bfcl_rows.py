"""BFCL's entries -> prompts. Of one turn: function documents as JSON schemas, one gold reply chosen
from the possible answers. Of several turns: tasks of the environment "bfcl".

In entries of one turn BFCL lists for each argument the values that it accepts, "" among them where
the argument may be left out. The gold call has the first value that is not "", and leaves an
optional argument out where that is accepted: what the question asks for is listed without "".
Source: the checker of the package bfcl-eval (Apache-2.0), eval_checker/ast_eval/ast_checker.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.data.prompts import prompt_of
from rest_mega.data.rows import Row, RowError, expect, read_rows
from rest_mega.records import Prompt

ANSWERS = "possible_answer"
"""Folder beside a file of questions that holds a file of answers with the same name."""
NO_CALL = ("irrelevance", "live_irrelevance")
"""Beginnings of the ids of entries where calling nothing is right; they have no answers."""
TYPES: Mapping[str, str] = {
    **dict.fromkeys(("dict", "HashMap", "Hashtable"), "object"),
    **dict.fromkeys(("tuple", "list", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("char", "String"), "string"),
    **dict.fromkeys(("bool", "Boolean"), "boolean"),
}
"""BFCL's names of types that are not JSON schema's; "any" is written by leaving the type out."""
MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""What the user says in a turn without a message, which offers functions that were missing before
(constants/default_prompts.py of bfcl-eval)."""

_MULTI_TURN = re.compile(
    r"multi_turn_(?:base|miss_func|miss_param|long_context)_([0-9]+)(?:-[0-9]+)?"
)
"""Id of an entry of several turns, or of the row of one of its turns."""


def scenario(entry_id: str) -> str:
    """What an entry is made from: entries of several turns with one number tell nearly the same
    story in all four categories; any other entry stands for itself."""
    found = _MULTI_TURN.fullmatch(entry_id)
    return f"multi_turn_{found.group(1)}" if found else entry_id


def split(entry_id: str) -> str:
    """Either "train" or "test", the side of BFCL's entry (or of a row made of one of its turns).

    Half of the scenarios of several turns may be trained on, in all four categories or in none, as
    a hash of the scenario says; entries of one turn are for testing alone. A score that is compared
    with what was trained on is one of the test side's tasks.
    """
    name = scenario(entry_id)
    digest = hashlib.blake2b(f"bfcl {name}".encode(), digest_size=8).digest()
    return "train" if name != entry_id and digest[0] < 128 else "test"


def training_side(entry_id: str) -> str:
    """`split` of an entry of several turns; empty for all others, whose questions may be anyone's
    in BFCL's form."""
    return split(entry_id) if scenario(entry_id) != entry_id else ""


def bfcl_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of questions (lines of JSON, whatever its suffix), each with the
    `ground_truth` of its id from the folder `possible_answer` beside it, where there is one.

    Raises ConfigError where a file of answers cannot be read.
    """
    file = path.parent / ANSWERS / path.name
    answers = _answers(file) if file.is_file() else {}
    for row in read_rows(path, lines=True):
        if isinstance(row.content, dict):
            answer = answers.get(str(row.content.get("id")), {})
            row = row._replace(content={**answer, **row.content})
        yield row


def bfcl_prompt(place: str, row: Mapping[str, Any]) -> list[Prompt]:
    """One entry {"id", "question", "function", "ground_truth"} as a prompt, or one of several turns
    (see `_multi_turn`); RowError for a bad one, and where no answer is given."""
    if "involved_classes" in row:
        return [prompt_of(place, _multi_turn(place, row), "")]
    question, functions = row.get("question"), row.get("function")
    turns = len(question) if isinstance(question, list) else 0
    expect(turns == 1, place, "question", question, "a list of one turn", f"it has {turns}")
    tools = _tools(place, functions)
    calls = _gold_calls(place, row, {t["function"]["name"]: t["function"] for t in tools})
    converted = {
        "id": row.get("id"),
        "messages": question[0] if isinstance(question, list) else [],
        "tools": tools,
        "task": {"calls": calls},
    }
    return [prompt_of(place, converted, "")]


def _multi_turn(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """{"id", "question": [messages of each turn], "involved_classes", "initial_config",
    "missed_function"?: {number of a turn: functions that it offers first}, "ground_truth": [calls
    of each turn as text]} as a row of the environment "bfcl".

    Its runner does not heed `excluded_function`, and neither does this.
    """
    classes, config = row.get("involved_classes"), row.get("initial_config")
    expect(_texts(classes), place, "involved_classes", classes, "a list of names")
    expect(isinstance(config, dict), place, "initial_config", config, "an object {class: scenario}")
    turns = _turns(place, row)
    return {
        "id": row.get("id"),
        "messages": row["question"][0],
        "environment": "bfcl",
        "task": {
            "classes": classes,
            "config": config,
            "long_context": "long_context" in str(row.get("id")),
            "turns": turns,
        },
    }


def _turns(place: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the user says in each turn, which functions that offers, and its gold calls."""
    question, truth = row.get("question"), row.get("ground_truth")
    good = isinstance(question, list) and all(map(_is_turn, question)) and any(question[:1])
    rule = "a list of turns, each a list of one user message; but for the first it may be empty"
    expect(good, place, "question", question, rule)
    good = isinstance(truth, list) and all(map(_texts, truth))
    rule = "a list of gold calls as texts for each turn"
    detail = f"they are read from {ANSWERS}/ beside the file, where a file of its name is"
    expect(
        good and len(truth or ()) == len(question or ()), place, "ground_truth", truth, rule, detail
    )
    missed = row.get("missed_function", {})
    good = isinstance(missed, dict) and all(map(_texts, missed.values()))
    expect(good, place, "missed_function", missed, "{number of a turn: list of functions}")
    return [
        {
            "user": messages[0]["content"] if messages else MORE_FUNCTIONS,
            "offers": missed.get(str(number), []),
            "calls": calls,
        }
        for number, (messages, calls) in enumerate(zip(question or (), truth or (), strict=True))
    ]


def _is_turn(messages: object) -> bool:
    return isinstance(messages, list) and (
        not messages
        or (
            len(messages) == 1
            and isinstance(messages[0], dict)
            and messages[0].get("role") == "user"
            and isinstance(messages[0].get("content"), str)
        )
    )


def _texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _answers(file: Path) -> dict[str, dict[str, Any]]:
    rows = [row.fields() for row in read_rows(file, lines=True)]
    return {str(r.get("id")): {"ground_truth": r.get("ground_truth")} for r in rows}


def _tools(place: str, functions: object) -> list[dict[str, Any]]:
    rule = 'a list of {"name", "description", "parameters"}'
    good = isinstance(functions, list) and all(
        isinstance(f, dict)
        and isinstance(f.get("name"), str)
        and isinstance(f.get("parameters"), dict)
        for f in functions
    )
    expect(good, place, "function", functions, rule)
    assert isinstance(functions, list), functions
    return [
        {"type": "function", "function": {**f, "parameters": json_schema(f["parameters"])}}
        for f in functions
    ]


def json_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's description of a value with JSON schema's types, at any depth."""
    schema = dict(parameters)
    kind = schema.get("type")
    if isinstance(kind, str):
        schema["type"] = TYPES.get(kind, kind)
        if kind.lower() == "any":
            del schema["type"]
    if isinstance(schema.get("properties"), dict):
        properties = schema["properties"].items()
        schema["properties"] = {k: json_schema(v) for k, v in properties if isinstance(v, dict)}
    if isinstance(schema.get("items"), dict):
        schema["items"] = json_schema(schema["items"])
    return schema


def _gold_calls(
    place: str, row: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    truth = row.get("ground_truth")
    if truth is None and str(row.get("id")).startswith(NO_CALL):
        return []
    good = isinstance(truth, list) and bool(truth) and all(map(_is_answer, truth))
    rule = "the gold calls, each {name: {argument: [accepted values]}}"
    detail = f"they are read from {ANSWERS}/ beside the file, where a file of its name is"
    expect(good, place, "ground_truth", truth, rule, detail)
    calls = [(name, values) for answer in truth or () for name, values in answer.items()]
    return [_gold_call(place, name, functions.get(name), values) for name, values in calls]


def _is_answer(answer: object) -> bool:
    calls = answer.values() if isinstance(answer, dict) else ()
    return len(calls) == 1 and all(isinstance(values, dict) for values in calls)


def _gold_call(
    place: str, name: str, function: Mapping[str, Any] | None, accepted: Mapping[str, Any]
) -> dict[str, Any]:
    key = f"ground_truth: {name}"
    if function is None:
        raise RowError(place, f"{key} is none of the row's functions", "a gold call of no function")
    required = list(function["parameters"].get("required") or ())
    try:
        arguments = _chosen(accepted, required)
    except ValueError as error:
        raise RowError(place, f"{key}: {error}", "an argument without an accepted value") from error
    allowed = {*function["parameters"].get("properties", {})}
    good = {*required} <= {*arguments} <= allowed
    rule = f"all of {required}, and of {sorted(allowed)} alone"
    if not good:
        problem = f"{key} has the arguments {[*arguments]}; they must be {rule}"
        raise RowError(place, problem, "gold arguments that the function lacks or demands")
    return {"name": name, "arguments": arguments}


def _chosen(accepted: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """Argument -> the chosen value; arguments that may be left out are."""
    return {
        name: _value(name, values)
        for name, values in accepted.items()
        if name in required or not (isinstance(values, list) and "" in values)
    }


def _value(name: str, accepted: Any) -> Any:
    """The first accepted value that is not ""; the members of objects, and of a list's objects,
    are lists of accepted values again. ValueError where no value is accepted."""
    if not isinstance(accepted, list):
        return accepted
    if not accepted:
        raise ValueError(f"{name} has no accepted value")
    value = next((choice for choice in accepted if choice != ""), "")
    if isinstance(value, list):
        return [_chosen(item) if isinstance(item, dict) else item for item in value]
    return _chosen(value) if isinstance(value, dict) else value
