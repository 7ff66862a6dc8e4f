"""Every call of a reply is answered: checked against its tool's schema, run under deadlines,
retried where that is declared safe, its result cut."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rest_mega.config import EnvironmentConfig
from rest_mega.environments.deadline import DeadlineError, remaining, together, within
from rest_mega.environments.registry import Environment
from rest_mega.environments.results import Cut, cut_characters
from rest_mega.environments.schema import mismatch
from rest_mega.environments.tools import ToolCrashError, ToolError, Traits, TransientToolError
from rest_mega.records import ToolCall, ToolOutcome

if TYPE_CHECKING:
    from rest_mega.dialects import Reply

FIRST_PAUSE_S = 0.1
"""Before the first retry; doubled before each further one."""


@dataclass
class Budget:
    """Seconds that the tools of one episode may still take."""

    left: float


def answer_calls(
    environment: Environment,
    reply: Reply,
    limits: EnvironmentConfig,
    *,
    cut: Cut | None = None,
    budget: Budget | None = None,
) -> tuple[ToolOutcome, ...]:
    """One outcome per call of the reply, in order; one `malformed` outcome for a reply that does
    not parse.

    Neighbouring calls of concurrent tools run at the same time, at most `parallel_calls`; any other
    call sees the state that the calls before it left. Nothing that a tool does (raise, hang, return
    10 MB) raises or blocks here. `cut` shortens what the model reads (default: by characters);
    `budget` is drawn on (default: that of a new episode).
    """
    turn = _Turn(
        environment,
        limits,
        cut or cut_characters(limits),
        budget or Budget(limits.episode_timeout_s),
    )
    if not reply.well_formed:
        return (turn.failed("malformed", reply.error),)
    runs = itertools.groupby(enumerate(reply.calls), key=turn.is_concurrent)
    return tuple(
        outcome
        for concurrent, calls in runs
        for outcome in turn.answer(list(calls), limits.parallel_calls if concurrent else 1)
    )


class _Turn:
    """The calls of one reply and what answers them."""

    def __init__(
        self, environment: Environment, limits: EnvironmentConfig, cut: Cut, budget: Budget
    ) -> None:
        self._environment, self._limits, self._cut, self._budget = environment, limits, cut, budget
        self._schemas: Mapping[str, Mapping[str, Any]] = {
            spec["function"]["name"]: spec["function"].get("parameters", {})
            for spec in environment.specs
        }

    def is_concurrent(self, numbered: tuple[int, ToolCall]) -> bool:
        traits = self._environment.traits.get(numbered[1].name)
        return traits is not None and traits.concurrent

    def answer(self, calls: list[tuple[int, ToolCall]], at_once: int) -> list[ToolOutcome]:
        """Outcomes of neighbouring calls; at the same time, they draw on the budget once."""
        done: list[ToolOutcome] = []
        for batch in _batches(calls, at_once):
            jobs = [lambda n=number, c=call: self._answer(n, c) for number, call in batch]
            outcomes = together(jobs, at_once)
            self._budget.left -= max(outcome.seconds for outcome in outcomes)
            done += outcomes
        return done

    def _answer(self, number: int, call: ToolCall) -> ToolOutcome:
        if self._environment.conduct.checked and (refusal := self._refusal(number, call)):
            return refusal
        return self._run(call)

    def _refusal(self, number: int, call: ToolCall) -> ToolOutcome | None:
        """The outcome of a call that is not run."""
        if number >= (most := self._limits.calls_per_turn):
            return self.failed("refused", f"more than {most} calls in one turn", call.name)
        if call.name not in self._schemas:
            known = ", ".join(self._schemas) or "none"
            return self.failed("unknown_tool", f"no tool {call.name!r}; known: {known}", call.name)
        if complaint := mismatch(call.arguments, self._schemas[call.name]):
            return self.failed("bad_arguments", complaint, call.name)
        return None

    def _run(self, call: ToolCall) -> ToolOutcome:
        seconds = min(self._limits.call_timeout_s, self._budget.left)
        if seconds <= 0:
            spent = f"the {self._limits.episode_timeout_s:g} s for tools are spent"
            return self.failed("timeout", spent, call.name)
        start = time.perf_counter()
        status, why = "ok", ""
        try:
            content = within(seconds, lambda: self._tries(call))
        except DeadlineError:
            status, why = "timeout", f"no result within {seconds:.3g} s"
        except ToolCrashError as error:
            status, why = "crashed", str(error)
        except ToolError as error:
            status, why = "error", str(error)
        except Exception as error:
            status, why = "error", f"{type(error).__name__}: {error}"
        elapsed = time.perf_counter() - start
        if status != "ok":
            return self.failed(status, why, call.name, elapsed)
        return ToolOutcome("ok", self._cut(content), elapsed)

    def _tries(self, call: ToolCall) -> str:
        """The result, after retries where the tool is idempotent and failed for no fault of the
        call."""
        idempotent = self._environment.traits.get(call.name, Traits()).idempotent
        for attempt in range(self._limits.retries if idempotent else 0):
            try:
                return str(self._environment.call(call))
            except Exception as error:
                refused = isinstance(error, ToolError) and not isinstance(error, TransientToolError)
                pause = FIRST_PAUSE_S * 2**attempt
                if refused or isinstance(error, DeadlineError) or pause >= remaining():
                    raise
                time.sleep(pause)
        return str(self._environment.call(call))

    def failed(self, status: str, why: str, tool: str = "", seconds: float = 0.0) -> ToolOutcome:
        """The outcome of a call that failed, in the words that `messages` gives."""
        text = self._limits.messages.get(status, "error: {why}")
        return ToolOutcome(status, self._cut(text.format(why=why, tool=tool)), seconds)


def _batches(calls: list[tuple[int, ToolCall]], at_once: int) -> list[list[tuple[int, ToolCall]]]:
    return [calls[i : i + at_once] for i in range(0, len(calls), at_once)]
