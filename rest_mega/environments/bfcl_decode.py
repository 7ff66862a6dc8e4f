"""A reply's raw text -> the calls that BFCL's own handler of its dialect reads in it.

BFCL decodes leniently or strictly in ways of its own (a broken block beside a good one is dropped,
a block needs its line breaks, Python's arithmetic is computed), and a score is BFCL's only with
these. Its decoders evaluate model text as Python; here no text is: Python lists go to BFCL's reader
once their syntax tree is known to hold literals, names, calls and small sums alone.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rest_mega import dialects
from rest_mega.dialects import Reply
from rest_mega.environments.bfcl_package import official
from rest_mega.records import ToolCall

Calls = list[Any]
"""[{name: {argument: value}}, ...] in the ordinary case; what a handler makes of odd JSON else."""
LANGUAGES: Mapping[str, str] = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}
"""Category -> the language of its calls; Python where it has none here."""

_BLOCK = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_SUMS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_LARGEST = 10**9
"""Of a number in a sum, so that computing it is quick."""
_POWER = 64
"""Of an exponent."""


class DecodeError(ValueError):
    """The reply holds no calls that its handler can read."""


def decode(text: str, dialect: str, category: str) -> Calls:
    """The calls in a reply, as BFCL's handler for models of this dialect reads them: hermes as
    Qwen's (FC), llama3 as Llama 3.1's (FC), pythonic as BFCL's own prompt asks for it. Of other
    dialects, whose handlers BFCL lacks or reads from structured replies, the dialect's parser.

    Raises DecodeError where the handler raises.
    """
    reader = _READERS.get(dialect)
    try:
        if reader is not None:
            return reader(text, LANGUAGES.get(category, "PYTHON"))
    except Exception as error:  # the handlers' own errors are of every kind, and all mean this
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    reply = dialects.parse(text.encode("utf-8", "replace"), dialect)
    if not reply.well_formed:
        raise DecodeError(reply.error)
    return [{call.name: dict(call.arguments)} for call in reply.calls]


def read(text: bytes, dialect: str) -> Reply:
    """A reply of several turns, whose calls are those that BFCL's runner executes (decode_execute
    of the handlers): none where its handler raises.

    A call inside an argument of Python's form, which BFCL executes too, stays what it is written
    as.
    """
    reply = dialects.parse(text, dialect)
    if dialect not in _READERS:
        return reply
    try:
        calls = _executed(text.decode("utf-8", "replace"), dialect)
    except Exception as error:  # as in `decode`
        return replace(reply, calls=(), error=reply.error or f"{type(error).__name__}: {error}")
    return replace(reply, calls=calls, well_formed=reply.well_formed or bool(calls))


def _executed(text: str, dialect: str) -> tuple[ToolCall, ...]:
    if dialect == "hermes":  # arguments may be an object in a text here
        calls: Calls = [{call["name"]: call["arguments"]} for call in _hermes_blocks(text)]
    else:
        calls = _READERS[dialect](text, "PYTHON")
    pairs = (pair for call in calls for pair in call.items())
    return tuple(
        ToolCall(str(name), {str(key): value for key, value in _object(arguments).items()})
        for name, arguments in pairs
    )


def _object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _hermes(text: str, language: str) -> Calls:
    """decode_ast of model_handler/local_inference/qwen_fc.py."""
    blocks = _hermes_blocks(text)
    return [{call["name"]: dict(call["arguments"].items())} for call in blocks]


def _hermes_blocks(text: str) -> list[dict[str, Any]]:
    """The reasoning is cut off, blocks that are no JSON are dropped, and the others must be
    objects."""
    answer = text.split("</think>")[-1].lstrip("\n") if "</think>" in text else text
    found = []
    for block in _BLOCK.findall(answer):
        try:
            found.append(json.loads(block))
        except (ValueError, RecursionError):
            continue
    if any(not isinstance(call, dict) for call in found):
        raise DecodeError("a tool_call block is no object")
    return found


def _llama3(text: str, language: str) -> Calls:
    """model_handler/local_inference/llama_3_1.py: JSON parted by semicolons, else a Python literal
    (JSON's true, false and null are none). Operators in it, which that file evaluates, are not
    computed here."""
    bare = text.replace("<|python_tag|>", "")
    if ";" in bare:
        found = [json.loads(part) for part in bare.split(";")]
    else:
        literal = ast.literal_eval(bare)
        found = [literal] if isinstance(literal, dict) else literal
    return [{call["name"]: call["parameters"]} for call in found]


def _pythonic(text: str, language: str) -> Calls:
    """default_decode_ast_prompting of model_handler/utils.py; Java and JavaScript by its
    tree-sitter parsers."""
    if language == "PYTHON":
        _check_python(text)
    form = official("constants.enums").ReturnFormat[language]
    found: Calls = official("model_handler.utils").default_decode_ast_prompting(text, form, False)
    return found


def _check_python(text: str) -> None:
    """DecodeError unless BFCL's reader, which evaluates operators, meets harmless ones alone."""
    bare = text.strip("`\n ")
    bare = bare if bare.startswith("[") else "[" + bare
    bare = bare if bare.endswith("]") else bare + "]"
    for node in _computed(ast.parse(bare.strip().strip("'"), mode="eval").body):
        if not _is_sum(node):
            raise DecodeError(f"{ast.unparse(node)[:80]!r} is no sum of small numbers or texts")


def _computed(node: ast.AST | None) -> Iterator[ast.BinOp]:
    """Operators that BFCL's reader (resolve_ast_by_type) evaluates: positional arguments and all
    other kinds of nodes it passes over, writes out as text or refuses."""
    if isinstance(node, ast.BinOp):
        yield node
    parts: list[ast.expr | None] = []
    if isinstance(node, ast.Call):
        parts = [keyword.value for keyword in node.keywords]
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        parts = [*node.elts]
    elif isinstance(node, ast.Dict):
        parts = [*node.keys, *node.values]
    for part in parts:
        yield from _computed(part)


def _is_sum(node: ast.BinOp) -> bool:
    """Operators on small numbers alone, or additions of texts alone."""
    if isinstance(node.op, ast.Pow):
        base, power = node.left, node.right
        return _is_small(base, _LARGEST) and _is_small(power, _POWER)
    texts = [isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node)]
    allowed = ast.Add if any(texts) else _SUMS
    return isinstance(node.op, allowed) and all(
        _is_sum(side) if isinstance(side, ast.BinOp) else _is_text(side) or _is_small(side)
        for side in (node.left, node.right)
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_small(node: ast.AST, largest: float = _LARGEST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
    number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    return number and abs(node.value) <= largest  # type: ignore[attr-defined]


_READERS: Mapping[str, Callable[[str, str], Calls]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "pythonic": _pythonic,
}
"""Dialect -> (text, language) -> calls."""
