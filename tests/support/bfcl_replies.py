"""Raw replies to BFCL's entries of one turn: the gold calls and spoilt ones, in every dialect."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

Call = tuple[str, dict[str, Any]]
CATEGORIES = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
DIALECTS = ("hermes", "llama3", "pythonic")
_JAVA = {"integer": "int", "long": "long", "char": "char", "String": "String", "any": "Object"}
UNREACHABLE = {
    *("simple_java_36", "simple_java_65", "live_simple_106-63-0", "live_simple_112-68-0"),
    *("live_multiple_862-181-3", "live_multiple_964-207-0"),
}
"""Entries for which BFCL's checker accepts nothing: numbers in a Java list without a type, a
required argument without an accepted value or without an answer, an answer to an argument that the
function lacks."""
UNREACHABLE_AS_CODE = {
    *("simple_java_1", "simple_java_35", "simple_java_67", "simple_java_68", "simple_java_85"),
    "simple_javascript_46",
}
"""And what its parsers of Java and JavaScript lose or refuse: bodies of maps, quotes in arrays that
its converter would keep, a version."""


# ------------------------------------------------------------------ gold


def gold(category: str, entry: Mapping[str, Any], truth: Any) -> list[Call]:
    """Calls that the possible answers accept; of entries without answers a call of the first
    function, with the first value of each type."""
    if truth is None:
        return [(f["name"], _any_arguments(f)) for f in entry["function"][:1]]
    functions = {one["name"]: one for one in entry["function"]}
    found = []
    for answer in truth:
        ((name, accepted),) = answer.items()
        properties = functions[name]["parameters"]["properties"]
        required = functions[name]["parameters"]["required"]
        arguments = {k: _pick(v) for k, v in accepted.items() if k in required or "" not in v}
        if category in ("simple_java", "simple_javascript"):
            write = _java if category == "simple_java" else _javascript
            arguments = {k: write(v, properties[k]) for k, v in arguments.items()}
        found.append((name, arguments))
    return found


def _any_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    some = {"integer": 1, "float": 1.5, "boolean": True, "array": [], "dict": {}, "tuple": []}
    properties = function["parameters"]["properties"]
    return {key: some.get(value["type"], "x") for key, value in properties.items()}


def _pick(accepted: list[Any]) -> Any:
    """The first value that is not "" (where there is one); objects, and a list's objects, have
    accepted values inside, and these nothing more."""
    value = _first(accepted)
    if isinstance(value, dict):
        return _members(value)
    if isinstance(value, list):
        return [_members(one) if isinstance(one, dict) else one for one in value]
    return value


def _first(accepted: list[Any]) -> Any:
    return next((one for one in accepted if one != ""), "")


def _members(accepted: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _first(values) for key, values in accepted.items() if "" not in values}


def _java(value: Any, schema: Mapping[str, Any]) -> str:
    """The Java text that BFCL's converter reads as the value."""
    kind, inner = schema["type"], schema.get("items", {}).get("type", "any")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind, '') }"
    if isinstance(value, list) and kind == "Array":
        # BFCL's converter leaves quotes where they are in what has no type of its own.
        return f"new {_JAVA[inner]}[]{{{', '.join(map(str, value))}}}"
    if isinstance(value, list):
        quoted = inner in ("String", "char")
        items = ", ".join(
            json.dumps(one) if quoted else _java(one, {"type": inner}) for one in value
        )
        return f"new ArrayList<{_JAVA[inner]}>(Arrays.asList({items}))"
    if isinstance(value, dict):
        items = ((k, json.dumps(v)) for k, v in value.items())
        puts = " ".join(f'put("{k}", {v});' for k, v in items)
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    return str(value)


def _javascript(value: Any, schema: Mapping[str, Any]) -> str:
    """The JavaScript text that BFCL's converter reads as the value."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        items = (f"{k}: {_javascript_item(v)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    if schema["type"] == "Bigint":
        return f"{value}n"
    return json.dumps(value)


def _javascript_item(value: Any) -> str:
    return _code(value) if isinstance(value, str) else json.dumps(value)


def _code(value: str) -> str:
    """The text as code where it can be some, else as a text in code."""
    name = re.fullmatch(r"[A-Za-z_$][\w.$]*(\(.*\))?", value)
    literal = re.match(r"new |[\[{\d]|-\d|\(.*=>|function", value)
    return value if name or literal else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------ spoilt


def mutants(calls: list[Call], chance: Random) -> Iterator[tuple[str, list[Call]]]:
    """(how, the calls spoilt in one way); some ways leave them right, as where calls or keys change
    places."""
    for name, change in _CALLS.items():
        if (changed := change(copy.deepcopy(calls), chance)) is not None:
            yield name, changed
    for number, (_, arguments) in enumerate(calls):
        keys = list(arguments)
        for key in chance.sample(keys, min(2, len(keys))):
            for name, edit in _VALUES.items():
                changed = copy.deepcopy(calls)
                edit(changed[number][1], key)
                if changed != calls or name == "order of keys":
                    yield name, changed


def _renamed(calls: list[Call], chance: Random) -> list[Call]:
    at = chance.randrange(len(calls))
    calls[at] = (calls[at][0] + "x", calls[at][1])
    return calls


def _with_more(calls: list[Call], chance: Random) -> list[Call]:
    chance.choice(calls)[1]["an_argument_too_many"] = 1
    return calls


_CALLS: dict[str, Callable[[list[Call], Random], list[Call] | None]] = {
    "none": lambda calls, _: [],
    "one less": lambda calls, _: calls[:-1] if len(calls) > 1 else None,
    "one more": lambda calls, chance: [*calls, chance.choice(calls)],
    "order of calls": lambda calls, _: calls[::-1] if len(calls) > 1 else None,
    "name": _renamed,
    "one argument more": _with_more,
}


def _other_value(arguments: dict[str, Any], key: str) -> None:
    arguments[key] = _other(arguments[key])


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1001
    if isinstance(value, list):
        return [*value, value[0] if value else 7]
    if isinstance(value, dict):
        return {k: _other(v) for k, v in value.items()}
    return f"{value} and more"


def _other_type(arguments: dict[str, Any], key: str) -> None:
    value = arguments[key]
    arguments[key] = 12 if isinstance(value, str) else json.dumps(value)


def _spelling(arguments: dict[str, Any], key: str) -> None:
    if isinstance(arguments[key], str):
        arguments[key] = arguments[key].upper().replace(" ", "_")


def _as_float(arguments: dict[str, Any], key: str) -> None:
    if type(arguments[key]) is int:
        arguments[key] = float(arguments[key])


def _turned_round(arguments: dict[str, Any], key: str) -> None:
    if isinstance(arguments[key], list):
        arguments[key] = arguments[key][::-1]


def _keys(arguments: dict[str, Any], key: str) -> None:
    arguments[key] = arguments.pop(key)


_VALUES: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "value": _other_value,
    "type": _other_type,
    "argument missing": lambda arguments, key: arguments.pop(key),
    "spelling": _spelling,
    "float for int": _as_float,
    "order in a list": _turned_round,
    "order of keys": _keys,
}


# ------------------------------------------------------------------ written


def written(calls: list[Call], dialect: str, category: str) -> str:
    """The reply that makes these calls."""
    if dialect == "hermes":
        blocks = [json.dumps({"name": n, "arguments": a}, ensure_ascii=False) for n, a in calls]
        return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    lone = len(calls) == 1 and ";" not in str(calls)
    if dialect == "llama3" and lone:  # its handler reads it as Python
        return str({"name": calls[0][0], "parameters": calls[0][1]})
    if dialect == "llama3":
        return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)
    code = category in ("simple_java", "simple_javascript")
    value = (lambda v: _code(v) if isinstance(v, str) else repr(v)) if code else repr
    texts = (f"{n}({', '.join(f'{k}={value(v)}' for k, v in a.items())})" for n, a in calls)
    return f"[{', '.join(texts)}]"


def around(text: str) -> Iterator[tuple[str, str]]:
    """(how, the reply in ways of writing that models fall into)."""
    yield "prose before", f"I will look that up.\n{text}"
    yield "prose after", f"{text}\nDone."
    yield "thought", f"<think>\nLet me see.\n</think>\n\n{text}"
    yield "fence", f"```json\n{text}\n```"
    yield "bare fence", f"```\n{text}\n```"
    yield "one line", text.replace("\n", "")
    yield "cut off", text[: 2 * len(text) // 3]
    yield "twice", f"{text}\n{text}"
    yield "single quotes", text.replace('"', "'")
    yield "arguments", text.replace('"arguments"', '"parameters"')
    yield "no brackets", text.strip("[]")
    yield "python tag", f"<|python_tag|>{text}"


OTHERS = {
    "empty": "",
    "prose": "Which city do you mean?",
    "empty list": "[]",
    "empty object": "[{}]",
    "number": "42",
    "quoted": "'[f(x=1)]'",
    "empty block": "<tool_call>\n\n</tool_call>",
    "list in a block": "<tool_call>\n[]\n</tool_call>",
    "text in a block": '<tool_call>\n"f"\n</tool_call>',
    "no arguments": '<tool_call>\n{"name": "f"}\n</tool_call>',
    "arguments are text": '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
    "name is a number": '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
    "name is a list": '<tool_call>\n{"name": [], "arguments": {}}\n</tool_call>',
    "not a number": '<tool_call>\n{"name": "f", "arguments": {"x": NaN}}\n</tool_call>',
    "deep": "<tool_call>\n" + "[" * 5000 + "\n</tool_call>",
    "two blocks, one broken": (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"na\n</tool_call>'
    ),
    "sum": "[f(x=2 + 3 * 4, y=-1, z='a' + 'b')]",
    "power": "[f(x=2 ** 10)]",
    "name for a value": "[f(x=y, z=g(1), w=h(v=2), u=t[0])]",
    "positional": "[f(1, 2)]",
    "tuple": "[f(x=(1, 2), y={'k': (3,)})]",
    "call alone": "f(x=1)",
    "not a call": "[f]",
    "spread": "[f(**x)]",
    "dots": "[a.b.c(x=...)]",
    "set": "[f(x={1, 2})]",
    "difference of a name": "[f(x=a - b)]",
    "parameters are text": '{"name": "f", "parameters": "x"}',
    "true": '{"name": "f", "parameters": {"x": true}}',
    "true; true": '{"name": "f", "parameters": {"x": true}}; {"name": "f", "parameters": {}}',
    "object": "{}",
    "java": '[f(x=new int[]{1, 2}, y="a")]',
}
"""Replies to anything."""


def garbled(text: str, chance: Random) -> str:
    """The text with a few characters left out, doubled, exchanged or put in."""
    marks = list(text)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(marks) + 1)
        extra = chance.choice("[]{}()\"'\\,:;=\n <>/tx0-")
        marks[at : at + chance.randrange(2)] = chance.choice(([], [extra], [extra], marks[at:][:1]))
    return "".join(marks)
