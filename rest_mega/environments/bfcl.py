"""BFCL's multi-turn backends (files, tickets, trading, travel, messages, posts, vehicle, maths) as
an environment: real objects, in process, deterministic; to train in, and to be measured by.

A prompt's row has "environment": "bfcl" and a task of one turn or of several:

    {"classes": ["TicketAPI", ...], "config": {class: its scenario}, "before": [calls], "calls":
    [calls], "long_context": false}
    {"classes", "config", "long_context", "turns": [{"calls": [calls]}, {"user": what the user says
    then, "offers": [names of functions that could not be called before], "calls": [calls]}, ...]}

A gold call is {"name", "arguments"} or its text as BFCL writes it. A turn ends with a reply without
calls. It is judged by BFCL's own checks of states and outputs: something was called, the public
attributes of every object equal those that the gold calls leave, and every output of the turn's
gold calls was among the episode's so far. A turn of several that has no gold calls is right
whatever was called (what that changed shows in the next turn); where it is the only one, nothing
may be called. The episode succeeds when all turns were played and are right.

"benchmark": true in a task leads the episode as BFCL's runner does (see `BENCHMARK`), "prompted":
true says that the prompt's messages show the functions, and no tools are to be shown beside.

The backends are built directly: BFCL's own executor evaluates model text as Python and keeps its
objects in module globals. Its 800 multi-turn entries are a benchmark: which of them may be trained
on says `rest_mega.data.bfcl_rows.split`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import FunctionType
from typing import Any

from rest_mega.config import ConfigError, one_of, require
from rest_mega.environments.bfcl_decode import read
from rest_mega.environments.bfcl_package import (
    backend,
    benchmark_specs,
    function_documents,
    function_specs,
    official,
)
from rest_mega.environments.schema import Spec, spec_name
from rest_mega.environments.tools import Conduct, ToolError, Traits
from rest_mega.records import ToolCall

BENCHMARK = Conduct(checked=False, read=read, most_steps=20)
"""As BFCL's runner leads an episode (model_handler/base_handler.py, MAXIMUM_STEP_LIMIT of
constants/default_prompts.py): replies are read as its handlers do, calls are run as they are
written, a reply without any that can be read ends the user's turn, and the episode ends with the
21st reply with calls to one message."""
_ERROR = "Error during execution: "
"""What BFCL's executor writes before the text of an exception."""
FORCED = "multi_turn:force_terminated"
"""Kind of the verdict on an episode that ended before the user had said everything."""


class BfclEnvironment:
    """One episode's backends, what they have answered, and how its turns went."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        """Raises ConfigError where a class or a function is unknown, a gold call is none, or the
        package bfcl-eval is missing."""
        self._task = task
        self._turns = [_Turn(turn, task["classes"]) for turn in task.get("turns") or [task]]
        self._world = _World(task)
        benchmark = bool(task.get("benchmark", False))
        self.conduct = BENCHMARK if benchmark else Conduct()
        specs_of = benchmark_specs if benchmark else function_specs
        self._everything = [spec for name in task["classes"] for spec in specs_of(name)]
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
        if self._task.get("prompted", False):
            return []
        return [spec for spec in self._everything if spec_name(spec) not in later]

    def call(self, call: ToolCall) -> str:
        """What the backend's method returns, as BFCL writes it. What it raises is a ToolError, in a
        benchmark BFCL's text of it."""
        try:
            return self._world.call(call.name, call.arguments)
        except ToolError as error:
            if self.conduct.checked:
                raise
            return f"{_ERROR}{error}"

    def next_user(self, answer: str) -> str | None:
        """Judge the turn that `answer` ends; the next turn's message, with the documents of the
        functions that it offers before it."""
        self._judge()
        if len(self._verdicts) == len(self._turns):
            return None
        turn = self._turns[len(self._verdicts)]
        if turn.offers and self._task.get("prompted", False):  # as BFCL's runner writes them then
            return f"{self._documents(turn.offers)}\n{turn.user}"
        offered = [spec for spec in self._everything if spec_name(spec) in turn.offers]
        return "\n".join([*map(json.dumps, offered), turn.user])

    def _documents(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """BFCL's of these functions; its runner puts no hints into what it offers later."""
        every = [one for kind in self._task["classes"] for one in function_documents(kind)]
        return [next(one for one in every if one["name"] == name) for name in names]

    def finish(self, answer: str) -> dict[str, Any]:
        """All turns; one that was cut off is judged by what it reached. `kind` and `reason` are
        BFCL's for the first fault, empty on success."""
        if len(self._verdicts) < len(self._turns):
            self._judge()
        played, turns = len(self._verdicts), len(self._turns)
        wrong = [one for one in self._verdicts if one.kind]
        if played < turns:  # as in BFCL this comes before what the turns were worth
            wrong.insert(0, _Verdict(True, True, FORCED, f"{played} of {turns} turns were played"))
        return {
            "success": not wrong,
            "state": all(one.state for one in self._verdicts),
            "outputs": all(one.outputs for one in self._verdicts),
            "kind": wrong[0].kind if wrong else "",
            "reason": wrong[0].reason if wrong else "",
        }

    def _judge(self) -> None:
        """The turn that is being played is over."""
        number = len(self._verdicts)
        turn, gold = self._turns[number], self._gold
        gold.outputs.clear()
        for call in turn.calls:
            gold.replay(call)
        called = len(self._world.outputs) > self._calls_before
        self._calls_before = len(self._world.outputs)
        if turn.calls:
            self._verdicts.append(self._compare(number, called))
        elif called and len(self._turns) == 1:
            self._verdicts.append(_Verdict(True, True, "multi_turn:call", "no call was to be made"))
        else:
            self._verdicts.append(_Verdict(True, True))

    def _compare(self, number: int, called: bool) -> _Verdict:
        """A turn with gold calls, by BFCL's checks in BFCL's order."""
        checks = official("eval_checker.multi_turn_eval.multi_turn_checker")
        state = checks.state_checker(self._world.objects, self._gold.objects)
        outputs = checks.response_checker(self._world.outputs, self._gold.outputs, number)
        failed = [one for one in (state, outputs) if not one["valid"]]
        kind = failed[0]["error_type"] if failed else ""
        reason = _reason(failed[0], number) if failed else ""
        if not called:
            kind = "multi_turn:empty_turn_model_response"
            reason = f"Model response list is empty for turn {number}"
        return _Verdict(state["valid"], outputs["valid"], kind, reason)

    @cached_property
    def _gold(self) -> _World:
        """What the gold calls do."""
        return _World(self._task)


class _Turn:
    """One turn of a task."""

    def __init__(self, turn: Mapping[str, Any], classes: Sequence[str]) -> None:
        self.user = str(turn.get("user", ""))
        self.offers = tuple(turn.get("offers", ()))
        self.calls = [gold_call(call, classes) for call in turn["calls"]]


@dataclass(frozen=True)
class _Verdict:
    """On one turn."""

    state: bool
    outputs: bool
    kind: str = ""
    """BFCL's name of what is wrong; empty where nothing is."""
    reason: str = ""


def _reason(found: Mapping[str, Any], number: int) -> str:
    """BFCL's message, with the beginning of what differs."""
    details = found["details"]
    shown = str(details.get("differences") or details.get("missing_items"))
    return f"turn {number}: {found['error_message']} {shown[:1000]}"


class _World:
    """The objects of a task, with its `before` done."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.outputs: list[str] = []
        self.objects = {name: backend(name)() for name in task["classes"]}
        for name, thing in self.objects.items():
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
        owners = [thing for kind, thing in self.objects.items() if name in _methods(kind)]
        try:
            if not owners:
                raise NameError(f"name '{name}' is not defined")
            text = _text(getattr(owners[-1], name)(**arguments))
        except Exception as error:
            self.outputs.append(f"{_ERROR}{error}")
            raise ToolError(str(error)) from error
        self.outputs.append(text)
        return text


@lru_cache
def _methods(name: str) -> frozenset[str]:
    """What can be called of a backend."""
    kind = backend(name)
    return frozenset(
        key
        for key in dir(kind)
        if not key.startswith("_") and isinstance(inspect.getattr_static(kind, key), FunctionType)
    )


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
