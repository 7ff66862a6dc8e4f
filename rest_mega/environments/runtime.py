"""What a process needs to answer tool calls (declared tools, worker processes, limits), and the
opening of each episode."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rest_mega.config import EnvironmentConfig, require
from rest_mega.environments.calls import Budget, answer_calls
from rest_mega.environments.deadline import DeadlineError, within
from rest_mega.environments.declared import DeclaredTools
from rest_mega.environments.registry import DECLARED, Environment, make_environment
from rest_mega.environments.results import Vocabulary, cut_tokens
from rest_mega.environments.schema import check_parameters, spec_name
from rest_mega.environments.tools import ToolEnvironment
from rest_mega.environments.workers import Workers
from rest_mega.records import Prompt, ToolCall, ToolOutcome

if TYPE_CHECKING:
    from rest_mega.dialects import Reply

T = TypeVar("T")


class ToolRuntime:
    """Opens episodes; shared by all episodes of a process."""

    def __init__(self, limits: EnvironmentConfig, tokenizer: Vocabulary) -> None:
        self.limits = limits
        self.cut = cut_tokens(limits, tokenizer)
        self._declared = DeclaredTools(limits)
        self._workers = Workers(limits)

    def open(self, prompt: Prompt) -> EpisodeTools:
        """A fresh environment for one episode, with the tools that the prompt's row selects.

        Raises ConfigError where the environment or a tool is unknown, and what the environment
        raises about its task.
        """
        environment = make_environment(prompt.environment, prompt.task)
        if isinstance(environment, ToolEnvironment):
            environment.workers = self._workers
        return EpisodeTools(self, environment, self._declared, prompt)

    def close(self) -> None:
        """End worker processes and MCP servers; they start again when a call needs them."""
        self._declared.close()
        self._workers.close()


class EpisodeTools:
    """The tools of one episode: its environment's own, and declared ones that its row names.

    A row's `tools` are names or whole specs, and nothing else can be called; without them all tools
    of the environment can. An environment's own tool hides a declared one of the same name. The
    environment "none" answers no call: its rows show what specs they like.
    """

    def __init__(
        self,
        runtime: ToolRuntime,
        environment: Environment,
        declared: DeclaredTools,
        prompt: Prompt,
    ) -> None:
        self._runtime, self._environment, self._declared = runtime, environment, declared
        self._prompt = prompt
        self._budget = Budget(runtime.limits.episode_timeout_s)
        self.conduct = environment.conduct
        self._steps = 0
        """Replies with calls since the user spoke."""
        self._offer()

    def _offer(self) -> None:
        """Take stock of what can be called now."""
        environment, declared, prompt = self._environment, self._declared, self._prompt
        self._own = {spec_name(spec): spec for spec in environment.specs}
        everything = declared.tools if prompt.environment == DECLARED else self._own
        self.specs = tuple(
            self._spec(wanted, prompt.environment) for wanted in prompt.tools or everything
        )
        """OpenAI function specs, as the model is shown them."""
        self.traits = {
            name: environment.traits[name] if name in self._own else declared.tools[name].traits
            for name in map(spec_name, self.specs)
            if name in self._own or prompt.environment != "none"
        }

    def _spec(self, wanted: str | Mapping[str, Any], environment: str) -> Mapping[str, Any]:
        """What the model is shown of a tool that the row names; a whole spec is shown as it is."""
        if environment == "none" and not isinstance(wanted, str):
            return wanted
        name = wanted if isinstance(wanted, str) else spec_name(wanted)
        if name not in self._own:
            known = [*self._own, *self._declared.tools]
            near = difflib.get_close_matches(name, known, n=3)
            require(
                name in known,
                f"tool {name!r} is neither one of environment {environment!r} nor declared in "
                f"environment.http or environment.mcp; known: {', '.join(near or known) or 'none'}",
            )
        if not isinstance(wanted, str):
            check_parameters(wanted["function"].get("parameters", {}), f"parameters of {name!r}")
            return wanted
        return self._own[name] if name in self._own else self._declared.tools[name].spec

    def call(self, call: ToolCall) -> str:
        """The tool's output, from the environment or from the declared tool."""
        if call.name in self._own or not self.conduct.checked:
            return self._environment.call(call)
        return self._declared.tools[call.name].call(call.arguments)

    def answer(self, reply: Reply) -> tuple[ToolOutcome, ...]:
        """Outcomes of a reply's calls, in order, from this episode's budget; see `answer_calls`."""
        runtime = self._runtime
        self._steps += 1
        return answer_calls(self, reply, runtime.limits, cut=runtime.cut, budget=self._budget)

    def read(self, text: bytes, dialect: str) -> Reply:
        """A reply's calls and texts, as the environment wants replies to be read."""
        return self.conduct.read(text, dialect)

    def takes(self, reply: Reply) -> bool:
        """Whether there is something in the reply to be answered by `answer`."""
        answers = self._prompt.environment != "none"
        return answers and (bool(reply.calls) or (self.conduct.checked and not reply.well_formed))

    @property
    def over(self) -> bool:
        """The environment's limit of replies to one message of the user is passed."""
        return self.conduct.most_steps is not None and self._steps > self.conduct.most_steps

    def next_user(self, answer: str) -> str | None:
        """What the user says after a reply without calls, or None; RuntimeError when the
        environment takes longer to say it than a call may."""
        said = self._in_time("go on with", self._environment.next_user, answer)
        if said is not None:
            self._steps = 0
            self._offer()
        return said

    def finish(self, answer: str) -> Mapping[str, Any]:
        """The environment's verdict; RuntimeError when it takes longer than a call may: a reward
        cannot be made up for it."""
        return self._in_time("judge", self._environment.finish, answer)

    def _in_time(self, what: str, method: Callable[[str], T], answer: str) -> T:
        seconds = self._runtime.limits.call_timeout_s
        try:
            return within(seconds, lambda: method(answer))
        except DeadlineError:
            raise RuntimeError(
                f"environment {self._prompt.environment!r} did not {what} prompt "
                f"{self._prompt.id!r} within {seconds:g} s: make its {method.__name__}() faster, "
                "or raise environment.call_timeout_s"
            ) from None
