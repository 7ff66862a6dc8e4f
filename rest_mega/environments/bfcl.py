"""BFCL's multi-turn backends (files, tickets, trading, travel, messages, posts, vehicle, maths) as
a training environment: real objects, in process, deterministic.

A prompt's row has "environment": "bfcl" and a task
    {"classes": ["TicketAPI", ...], "config": {class: its scenario}, "before": [calls], "calls":
    [calls], "long_context": false}
where a call is {"name", "arguments"}. The episode starts from the scenario with `before` already
done, and succeeds as a turn of BFCL's own multi-turn checker does: the public attributes of every
object equal those that the gold `calls` leave, and every output of the gold calls was among the
episode's. Without gold calls it succeeds when nothing was called.

The backends are those of the package bfcl-eval (Apache-2.0), built directly: its own executor
evaluates model text as Python and keeps its objects in module globals. Its 800 multi-turn entries
are a benchmark: train on scenarios of your own.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rest_mega.config import ConfigError, one_of
from rest_mega.environments.schema import Spec
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
    """One episode's backends, and what they have answered."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        """Raises ConfigError where a class is unknown or the package bfcl-eval is missing."""
        self._task = task
        self._world = _World(task)
        self.specs: Sequence[Spec] = [
            spec for name in task["classes"] for spec in function_specs(name)
        ]
        self.traits = {spec["function"]["name"]: Traits() for spec in self.specs}

    def call(self, call: ToolCall) -> str:
        """What the backend's method returns, as BFCL writes it; ToolError for what it raises."""
        return self._world.call(call.name, call.arguments)

    def finish(self, answer: str) -> dict[str, Any]:
        """Judge the state and the outputs against those of the gold calls."""
        gold = _World(self._task)
        for call in self._task["calls"]:
            gold.replay(call)
        state = self._world.state() == gold.state()
        outputs = not Counter(gold.outputs) - Counter(self._world.outputs)
        idle = bool(self._task["calls"]) or not self._world.outputs
        return {"success": state and outputs and idle, "state": state, "outputs": outputs}


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
            self.replay(call)
        self.outputs.clear()

    def replay(self, call: Mapping[str, Any]) -> None:
        """Run a call of the task; a refusal is one of its outputs too."""
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
