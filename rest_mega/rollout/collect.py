"""Runs the siblings of each prompt turn by turn, tools between the turns -> groups of
trajectories."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rest_mega.config import ConfigError, EnvironmentConfig, RolloutConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.dialects import Reply, parse
from rest_mega.environments import EpisodeTools, ToolRuntime
from rest_mega.records import Prompt, Trajectory, Turn
from rest_mega.rollout.engine import Completion, Engine, Request, Sampling, seed_of
from rest_mega.rollout.ledger import Ledger


@dataclass
class _Episode:
    """One trajectory while it grows."""

    prompt: Prompt
    sibling: int
    tools: EpisodeTools
    ledger: Ledger
    turns: list[Turn] = field(default_factory=list)
    answer: str = ""
    stop: str = ""


def turn_seed(seed: object, prompt: str, sibling: int, turn: int) -> int:
    """What decides a turn's draws: the seed of the collection, the prompt's id, sibling and
    turn."""
    return seed_of(seed, prompt, sibling, turn)


def check_prompts(
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    max_tokens: int,
    limits: EnvironmentConfig | None = None,
) -> None:
    """ConfigError when a prompt's environment is unknown or refuses its task, when one of its tools
    is unknown, or when the prompt leaves no room to reply. `limits` declares tools."""
    runtime = ToolRuntime(limits or EnvironmentConfig(), chat.tokenizer)
    try:
        for prompt in prompts:
            _prompt_ids(prompt, _open_tools(runtime, prompt), chat, max_tokens)
    finally:
        runtime.close()


def _open_tools(runtime: ToolRuntime, prompt: Prompt) -> EpisodeTools:
    """A fresh environment for one episode of the prompt, and its tools."""
    try:
        return runtime.open(prompt)
    except ConfigError as error:
        raise ConfigError(f"prompt {prompt.id!r}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"prompt {prompt.id!r}: environment {prompt.environment!r} refuses its task "
            f"({type(error).__name__}: {error}); mend the row"
        ) from error


def _prompt_ids(
    prompt: Prompt, tools: EpisodeTools, chat: ChatFormat, max_tokens: int
) -> list[int]:
    ids = chat.prompt_ids(prompt.messages, tools.specs)
    if len(ids) >= max_tokens:
        raise ConfigError(
            f"prompt {prompt.id!r} has {len(ids)} tokens, rollout.max_tokens is {max_tokens}: "
            "raise rollout.max_tokens (and packing.tokens) or leave the prompt out"
        )
    return ids


class Collector:
    """Plays prompts against their environments with one engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        dialect: str,
        config: RolloutConfig,
        limits: EnvironmentConfig,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stop()` is asked between turns: once true, collection ends without a result.

        Where the engine decodes every episode on its own, episodes are advanced from several
        threads at a time; an episode's own turns and calls come one after another.
        """
        self._engine, self._tokenizer, self._chat, self._dialect = engine, tokenizer, chat, dialect
        self._config, self._limits, self._stop = config, limits, stop
        self._tools = ToolRuntime(limits, tokenizer)
        self._side_by_side = threading.BoundedSemaphore(limits.parallel_episodes)

    def collect(
        self,
        prompts: Sequence[Prompt],
        siblings: int,
        sampling: Sampling,
        seed: object,
        first_P: Sequence[int] | None = None,
    ) -> list[list[Trajectory]] | None:
        """`siblings` trajectories of every prompt, [P][G]; None when a stop was asked for.

        `first_P`: number of each prompt's first sibling, 0 unless given: a prompt that is drawn
        twice is played anew under other numbers.

        `seed` with a prompt's id, the sibling and the turn decides what is sampled, whatever else
        is in the batch.
        """
        firsts = first_P if first_P is not None else [0] * len(prompts)
        episodes = [
            e
            for prompt, first in zip(prompts, firsts, strict=True)
            for e in self._open(prompt, range(first, first + siblings))
        ]
        stopped = self._stop()

        def follow(index: int, done: Completion) -> Request | None:
            nonlocal stopped
            episode = episodes[index]
            with self._side_by_side:
                self._advance(episode, done)
            if not episode.stop:
                stopped = stopped or self._stop()
            return None if stopped or episode.stop else self._request(episode, seed)

        if not stopped:
            self._engine.play([self._request(e, seed) for e in episodes], sampling, follow)
        if stopped:
            return None
        trajectories = [self._close(e) for e in episodes]
        return [trajectories[i : i + siblings] for i in range(0, len(trajectories), siblings)]

    def _open(self, prompt: Prompt, numbers: Sequence[int]) -> list[_Episode]:
        tools = [_open_tools(self._tools, prompt) for _ in numbers]
        ids = _prompt_ids(prompt, tools[0], self._chat, self._config.max_tokens)
        pairs = zip(numbers, tools, strict=True)
        return [_Episode(prompt, number, one, Ledger(ids)) for number, one in pairs]

    def _request(self, episode: _Episode, seed: object) -> Request:
        room = self._config.max_tokens - len(episode.ledger)
        drawn_by = turn_seed(seed, episode.prompt.id, episode.sibling, len(episode.turns))
        return Request(episode.ledger.ids_T, min(self._config.max_new_tokens, room), drawn_by)

    def _advance(self, episode: _Episode, done: Completion) -> None:
        """Record a sampled turn, and answer it: its calls by their results, a reply without calls
        by what the user says next; without either the episode is over."""
        turn = len(episode.turns)
        start, end = episode.ledger.sample(done, turn)
        ids = done.ids_T[:-1] if done.finished else done.ids_T
        text = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids)
        reply = parse(text, self._dialect)
        calls = (
            done.finished
            and (reply.calls or not reply.well_formed)
            and episode.prompt.environment != "none"
        )
        outcomes = episode.tools.answer(reply) if calls else ()
        episode.turns.append(
            Turn(
                start=start,
                end=end,
                text=text.decode("utf-8", "replace"),
                well_formed=reply.well_formed and done.finished,
                ended=done.finished,
                answer=reply.answer,
                calls=reply.calls,
                outcomes=outcomes,
            )
        )
        said = episode.tools.next_user(reply.answer) if done.finished and not calls else None
        if not calls and said is None:
            self._finish(episode, reply, done)
        elif turn + 1 == self._config.max_turns:
            episode.stop = "turn_limit"
        else:
            self._observe(episode, self._delta(episode.turns[-1], said))

    def _finish(self, episode: _Episode, reply: Reply, done: Completion) -> None:
        episode.stop = "answered" if done.finished else "token_limit"
        episode.answer = reply.answer if done.finished else ""

    def _delta(self, turn: Turn, said: str | None) -> list[int]:
        """Ids of what the user says after the turn, or of its calls' results."""
        if said is not None:
            return self._chat.user_ids(said)
        malformed = not turn.well_formed  # one outcome speaks for the whole reply
        names = [""] * len(turn.outcomes) if malformed else [call.name for call in turn.calls]
        results = [
            (name, outcome.content) for name, outcome in zip(names, turn.outcomes, strict=True)
        ]
        return self._chat.tool_result_ids(results)

    def _observe(self, episode: _Episode, ids: list[int]) -> None:
        """Append what answers a turn, unless no room is left to reply to it."""
        if len(episode.ledger) + len(ids) >= self._config.max_tokens:
            episode.stop = "length"
        else:
            episode.ledger.observe(ids)

    def _close(self, episode: _Episode) -> Trajectory:
        ledger = episode.ledger
        return Trajectory(
            prompt=episode.prompt,
            sibling=episode.sibling,
            ids_T=ledger.ids_T,
            logprobs_T=ledger.logprobs_T,
            mask_T=ledger.mask_T,
            turn_T=ledger.turn_T,
            version_T=ledger.version_T,
            turns=tuple(episode.turns),
            stop=episode.stop,
            result=episode.tools.finish(episode.answer),
        )
