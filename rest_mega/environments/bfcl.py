"""BFCL's multi-turn backends (files, tickets, trading, travel, messages, posts, vehicle, maths) as
a training environment: real objects, in process, deterministic.

A prompt's row has "environment": "bfcl" and a task of one turn or of several:

    {"classes": ["TicketAPI", ...], "config": {class: its scenario}, "before": [calls], "calls":
    [calls], "long_context": false}
    {"classes", "config", "long_context", "turns": [{"calls": [calls]}, {"user": what the user says
    then, "offers": [names of functions that could not be called before], "calls": [calls]}, ...]}

A gold call is {"name", "arguments"} or its text as BFCL writes it. A turn ends with a reply without
calls. It is right as in BFCL's own multi-turn checker: something was called, the public attributes
of every object equal those that the gold calls leave, and every output of the turn's gold calls was
among the episode's so far. A turn of several that has no gold calls is right whatever was called
(what that changed shows in the next turn); where it is the only one, nothing may be called. The
episode succeeds when all turns were played and are right.

The backends are those of the package bfcl-eval (Apache-2.0), built directly: its own executor
evaluates model text as Python and keeps its objects in module globals. Its 800 multi-turn entries
are a benchmark: train on scenarios of your own.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError, one_of, require
from rest_mega.environments.schema import Spec, spec_name
from rest_mega.environments.tools import ToolError, Traits
from rest_mega.records import ToolCall

BACKENDS: Mapping[str, str] = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Class -> its module, and the file of its function specs."""

_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


class BfclEnvironment:
    """One episode's backends, what they have answered, and how its turns went."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        """Raises ConfigError where a class or a function is unknown, a gold call is none, or the
        package bfcl-eval is missing."""
        self._task = task
        self._turns = [_Turn(turn, task["classes"]) for turn in task.get("turns") or [task]]
        self._world = _World(task)
        self._everything = [spec for name in task["classes"] for spec in function_specs(name)]
        known = [spec_name(spec) for spec in self._everything]
        for name in (name for turn in self._turns for name in turn.offers):
            one_of("a function that a turn of a bfcl task offers", name, known)
        self.traits = {name: Traits() for name in known}
        self._verdicts: list[_Verdict] = []
        """Of the turns that are over."""
        self._calls_before = 0

    @property
    def specs(self) -> Sequence[Spec]:
        """Specs of all functions but those that a later turn offers."""
        later = {name for turn in self._turns[len(self._verdicts) + 1 :] for name in turn.offers}
        return [spec for spec in self._everything if spec_name(spec) not in later]

    def call(self, call: ToolCall) -> str:
        """What the backend's method returns, as BFCL writes it; ToolError for what it raises."""
        return self._world.call(call.name, call.arguments)

    def next_user(self, answer: str) -> str | None:
        """Judge the turn that `answer` ends; the next turn's message, with the documents of the
        functions that it offers before it."""
        self._judge()
        if len(self._verdicts) == len(self._turns):
            return None
        turn = self._turns[len(self._verdicts)]
        offered = [spec for spec in self._everything if spec_name(spec) in turn.offers]
        return "\n".join([*map(json.dumps, offered), turn.user])

    def finish(self, answer: str) -> dict[str, Any]:
        """All turns; one that was cut off is judged by what it reached."""
        if len(self._verdicts) < len(self._turns):
            self._judge()
        played = len(self._verdicts) == len(self._turns)
        return {
            "success": played and all(one.right for one in self._verdicts),
            "state": all(one.state for one in self._verdicts),
            "outputs": all(one.outputs for one in self._verdicts),
        }

    def _judge(self) -> None:
        """The turn that is being played is over."""
        turn, gold = self._turns[len(self._verdicts)], self._gold
        gold.outputs.clear()
        for call in turn.calls:
            gold.replay(call)
        called = len(self._world.outputs) > self._calls_before
        self._calls_before = len(self._world.outputs)
        state = self._world.state() == gold.state()
        outputs = not Counter(gold.outputs) - Counter(self._world.outputs)
        if not turn.calls:
            self._verdicts.append(_Verdict(len(self._turns) > 1 or not called, True, True))
        else:
            self._verdicts.append(_Verdict(called and state and outputs, state, outputs))

    @cached_property
    def _gold(self) -> _World:
        """What the gold calls do."""
        return _World(self._task)


class _Turn:
    """One turn of a task."""

    def __init__(self, turn: Mapping[str, Any], classes: Sequence[str]) -> None:
        self.user = str(turn.get("user", ""))
        self.offers = frozenset(turn.get("offers", ()))
        self.calls = [gold_call(call, classes) for call in turn["calls"]]


@dataclass(frozen=True)
class _Verdict:
    """On one turn."""

    right: bool
    state: bool
    outputs: bool


class _World:
    """The objects of a task, with its `before` done."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.outputs: list[str] = []
        self._objects = {name: backend(name)() for name in task["classes"]}
        for name, thing in self._objects.items():
            if hasattr(thing, "_load_scenario"):  # MathAPI has no state
                scenario = copy.deepcopy(task["config"].get(name, {}))
                thing._load_scenario(scenario, long_context=task.get("long_context", False))
        for call in task.get("before", ()):
            self.replay(gold_call(call, task["classes"]))
        self.outputs.clear()

    def replay(self, call: Mapping[str, Any]) -> None:
        """Run a gold call; a refusal is one of its outputs too."""
        try:
            self.call(call["name"], call["arguments"])
        except ToolError:
            return

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        # Of two classes with a method of this name BFCL takes the later one.
        owner = [thing for thing in self._objects.values() if hasattr(thing, name)][-1]
        try:
            text = _text(getattr(owner, name)(**arguments))
        except Exception as error:
            self.outputs.append(f"Error during execution: {error}")
            raise ToolError(str(error)) from error
        self.outputs.append(text)
        return text

    def state(self) -> dict[str, dict[str, Any]]:
        return {
            name: {key: value for key, value in vars(thing).items() if not key.startswith("_")}
            for name, thing in self._objects.items()
        }


def gold_call(call: str | Mapping[str, Any], classes: Sequence[str]) -> Mapping[str, Any]:
    """A call of a task as {"name", "arguments"}; in BFCL's text positional arguments get the names
    that the backend's method has for them. ConfigError for a text that is no call of literals."""
    if not isinstance(call, str):
        return call
    try:
        node = ast.parse(call, mode="eval").body
        if not isinstance(node, ast.Call):
            raise ValueError("no call")
        name = ast.unparse(node.func)
        values = [ast.literal_eval(value) for value in node.args]
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"gold call {call!r} of a bfcl task must be name(argument=literal, ...): {error}"
        ) from error
    methods = [method for c in classes if (method := getattr(backend(c), name, None)) is not None]
    require(bool(methods), f"gold call {call!r} is of none of the classes {', '.join(classes)}")
    names = list(inspect.signature(methods[-1]).parameters)[1:]
    return {"name": name, "arguments": dict(zip(names, values, strict=False)) | arguments}


def _text(result: Any) -> str:
    """As BFCL's executor writes results: strings and dictionaries as such, all else by str()."""
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)
    return str(result)


@lru_cache
def function_specs(name: str) -> tuple[Spec, ...]:
    """OpenAI function specs of a backend class, from BFCL's own documents."""
    one_of("class of a bfcl task", name, BACKENDS)
    file = package_data() / "multi_turn_func_doc" / f"{BACKENDS[name]}.json"
    documents = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line]
    return tuple(
        {
            "type": "function",
            "function": {
                "name": document["name"],
                "description": document["description"],
                "parameters": _json_schema(document["parameters"]),
            },
        }
        for document in documents
    )


def package_data() -> Path:
    """The data folder of the package bfcl-eval; ConfigError where it is missing."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "environment 'bfcl' needs the package bfcl-eval: pip install --no-deps 'bfcl-eval>="
            "2026.3' mpmath (or 'rest-mega[bfcl]', which brings its hundred dependencies)"
        )
    return Path(spec.origin).parent / "data"


@lru_cache
def backend(name: str) -> Any:
    """The class of that name; ConfigError where it or the package is missing."""
    one_of("class of a bfcl task", name, BACKENDS)
    package_data()
    module = f"bfcl_eval.eval_checker.multi_turn_eval.func_source_code.{BACKENDS[name]}"
    return getattr(importlib.import_module(module), name)


def _json_schema(schema: Any) -> Any:
    """BFCL writes Python's names of types; objects without named properties take any."""
    if isinstance(schema, list):
        return [_json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _json_schema(value) for key, value in schema.items()}
    if isinstance(kind := schema.get("type"), str):
        found["type"] = _JSON_TYPES.get(kind, kind)
        if found["type"] == "object" and not schema.get("properties"):
            found["additionalProperties"] = True
    return found
