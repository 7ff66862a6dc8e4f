"""Python signatures and docstrings -> OpenAI function specs, and arguments checked against their
JSON schema."""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rest_mega.config import ConfigError, one_of, require

Spec = dict[str, Any]

_SCALARS: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    # JSON has one kind of true and false; Python's bool is an int, so it is turned away by name.
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list | tuple),
    "object": lambda v: isinstance(v, Mapping),
}


def spec_name(spec: Mapping[str, Any]) -> str:
    """Name of the function that an OpenAI spec describes."""
    return str(spec["function"]["name"])


def function_spec(function: Callable[..., Any]) -> Spec:
    """The OpenAI spec of a function: name, first paragraph of its docstring, parameters from its
    signature.

    A parameter's description is its line under `Args:`. A `self` is skipped.
    Raises ConfigError for a parameter without a usable annotation.
    """
    where = f"tool {function.__qualname__}"
    hints = typing.get_type_hints(function)
    summary, notes = _docstring(function)
    properties: dict[str, Spec] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        require(
            parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY),
            f"{where}: parameter {name!r} must be an ordinary named parameter, not *{name} or "
            "positional-only",
        )
        require(
            name in hints,
            f"{where}: parameter {name!r} has no type; write {name}: int (or str, float, ...)",
        )
        properties[name] = type_schema(hints[name], f"{where}: parameter {name!r}")
        if name in notes:
            properties[name]["description"] = notes[name]
        if parameter.default is parameter.empty:
            required.append(name)
        else:
            properties[name]["default"] = parameter.default
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": summary, "parameters": parameters},
    }


def type_schema(kind: Any, where: str) -> Spec:
    """The JSON schema of a Python type: scalars, list[T], dict, Literal, unions and Optional."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if origin is typing.Literal:
        names = sorted({_SCALARS[type(a)] for a in arguments})
        return {"type": names[0] if len(names) == 1 else names, "enum": list(arguments)}
    if kind is list or origin is list:
        return {
            "type": "array",
            **({"items": type_schema(arguments[0], where)} if arguments else {}),
        }
    if kind is dict or origin is dict:
        return {"type": "object", "additionalProperties": True}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [type_schema(a, where) for a in arguments]}
    raise ConfigError(
        f"{where} has type {kind!r}; use int, float, str, bool, list, dict, Literal or T | None"
    )


def check_parameters(parameters: Any, where: str) -> Spec:
    """A tool's parameters as an object schema; ConfigError where `mismatch` could not check
    arguments against them."""
    require(
        isinstance(parameters, Mapping) and parameters.get("type", "object") == "object",
        f'{where}={parameters!r} must be a JSON schema of type object, such as {{"type": "object", '
        '"properties": {"city": {"type": "string"}}, "required": ["city"]}',
    )
    _check_types(parameters, where)
    return {"properties": {}, "required": [], **parameters, "type": "object"}


def _check_types(schema: Any, where: str) -> None:
    """Every type that is met on the way of `mismatch` is one of JSON's."""
    require(isinstance(schema, Mapping), f"{where}={schema!r} must be a schema: a mapping")
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        one_of(f"{where}.type", kind, _CHECKS)
    for name, below in schema.get("properties", {}).items():
        _check_types(below, f"{where}.{name}")
    for below in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        _check_types(below, where)


def mismatch(value: Any, schema: Mapping[str, Any], path: str = "") -> str:
    """Why `value` does not fit `schema`, in a sentence for the model; empty when it fits.

    Knows type, enum, anyOf, items, properties and required. An unnamed property is refused unless
    the schema has additionalProperties: a tool cannot take an argument that it does not know.
    """
    if "anyOf" in schema:
        complaints = [mismatch(value, branch, path) for branch in schema["anyOf"]]
        return "" if "" in complaints else " or ".join(complaints)
    name = path or "arguments"
    if not _fits_type(value, schema.get("type")):
        return f"{name} must be {_or(schema['type'])}, not {_shown(value)}"
    if "enum" in schema and not any(
        value == known and type(value) is type(known) for known in schema["enum"]
    ):
        return f"{name} must be one of {', '.join(map(str, schema['enum']))}, not {_shown(value)}"
    if isinstance(value, Mapping):
        return _object_mismatch(value, schema, path)
    if isinstance(value, list | tuple) and "items" in schema:
        return _first(
            mismatch(item, schema["items"], f"{name}[{i}]") for i, item in enumerate(value)
        )
    return ""


def _object_mismatch(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> str:
    properties: Mapping[str, Any] = schema.get("properties", {})
    dot = f"{path}." if path else ""
    for name in schema.get("required", ()):
        if name not in value:
            return f"{dot}{name} is missing"
    for name in value:
        if name not in properties and not schema.get("additionalProperties", False):
            return f"{dot}{name} is unknown; known: {', '.join(properties) or 'none'}"
    return _first(mismatch(value[n], properties[n], f"{dot}{n}") for n in value if n in properties)


def _fits_type(value: Any, kind: str | Sequence[str] | None) -> bool:
    if kind is None:
        return True
    names = [kind] if isinstance(kind, str) else kind
    return any(_CHECKS[name](value) for name in names)


def _first(complaints: typing.Iterable[str]) -> str:
    return next((c for c in complaints if c), "")


def _or(kind: str | Sequence[str]) -> str:
    return kind if isinstance(kind, str) else " or ".join(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the descriptions under `Args:` (Google style), by parameter."""
    text = inspect.getdoc(function) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    block = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    if not block:
        return summary, {}
    notes: dict[str, str] = {}
    name = ""
    for line in block[1].splitlines():
        if found := re.match(r"\s+\*{0,2}(\w+)(?: ?\([^)]*\))?: (.*)", line):
            name = found[1]
            notes[name] = found[2].strip()
        elif name and line.strip():
            notes[name] += " " + line.strip()
    return summary, notes
