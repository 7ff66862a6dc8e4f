"""Runs the siblings of each prompt turn by turn, tools between the turns -> groups of
trajectories."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rest_mega.config import ConfigError, EnvironmentConfig, RolloutConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.dialects import Reply
from rest_mega.environments import EpisodeTools, ToolRuntime
from rest_mega.environments.deadline import together
from rest_mega.records import Ints, Prompt, Trajectory, Turn
from rest_mega.rollout.engine import Completion, Engine, Request, Sampling
from rest_mega.rollout.episode import (
    Episode,
    Group,
    Row,
    begun_of,
    completions_of,
    ids_of,
    is_over,
    prompt_ids_of,
    trajectory_of,
)
from rest_mega.rollout.ledger import Ledger


class PromptTooLongError(ConfigError):
    """A prompt that leaves no room to reply."""


def _nowhere(seed: str, member: Episode | Trajectory) -> None:
    """Keeps nothing of an episode that is over."""


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
        raise PromptTooLongError(
            f"prompt {prompt.id!r} has {len(ids)} tokens, rollout.max_tokens is {max_tokens}: "
            "raise rollout.max_tokens (and packing.tokens) or leave the prompt out"
        )
    return ids


def _holds(episode: Episode, ids_T: Ints) -> bool:
    """The episode has just these tokens."""
    return np.array_equal(episode.ledger.ids_T, ids_T)


class _Play:
    """How far a play is: what the threads that follow episodes tell each other."""

    def __init__(self, done: int, need: int | None, stop: Callable[[], bool]) -> None:
        self._done, self._need, self._stop = done, need, stop
        self._lock, self.stopped = threading.Lock(), False

    def over(self, ask: bool = False) -> bool:
        """Nothing more needs to be sampled; `ask`: also whether a stop was asked for."""
        with self._lock:
            if ask:
                self.stopped = self.stopped or self._stop()
            return self.stopped or (self._need is not None and self._done >= self._need)

    def finish(self, group: Group, place: int, trajectory: Trajectory) -> None:
        """One episode more is over."""
        with self._lock:
            group.members[place] = trajectory
            self._done += group.done


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
        self._engine, self._tokenizer, self._chat = engine, tokenizer, chat
        self.dialect = dialect
        self._config, self._limits, self._stop = config, limits, stop
        self._tools = ToolRuntime(limits, tokenizer)
        self._side_by_side = threading.BoundedSemaphore(limits.parallel_episodes)

    @property
    def repeatable(self) -> bool:
        """The same episodes, played together, are the same to the bit."""
        return self._engine.repeatable

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
        groups = [
            self.open(prompt, siblings, str(seed), first)
            for prompt, first in zip(prompts, firsts, strict=True)
        ]
        return [g.trajectories for g in groups] if self.play(groups, sampling) else None

    def open(self, prompt: Prompt, siblings: int, seed: str, first: int = 0) -> Group:
        """Episodes of the siblings `first`, `first` + 1, ..., none of them begun."""
        numbers = range(first, first + siblings)
        tools = [_open_tools(self._tools, prompt) for _ in numbers]
        ids = _prompt_ids(prompt, tools[0], self._chat, self._config.max_tokens)
        pairs = zip(numbers, tools, strict=True)
        return Group(prompt, seed, [Episode(prompt, seed, n, one, Ledger(ids)) for n, one in pairs])

    def play(
        self,
        groups: Sequence[Group],
        sampling: Sampling,
        need: int | None = None,
        keep: Callable[[str, Episode | Trajectory], None] = _nowhere,
    ) -> bool:
        """Play the open episodes of the groups, until `need` groups (all unless given) are done;
        False when a stop was asked for.

        `keep(seed, trajectory)` is called for every episode as soon as it is over. Others stay
        open where they stand: played again, they go on from there.
        """
        places = [(group, place) for group in groups for place in group.open]
        state = _Play(sum(group.done for group in groups), need, self._stop)

        def follow(index: int, done: Completion) -> Request | None:
            group, place = places[index]
            episode = self._member(group, place)
            whole = episode.begun.then(done) if episode.begun is not None else done
            episode.begun = None
            if done.aborted:
                episode.begun = whole if len(whole.ids_T) else None
                return None
            with self._side_by_side:
                self._advance(episode, whole)
                if not episode.stop:
                    return None if state.over(ask=True) else self._request(episode)
                trajectory = self._close(episode)
            keep(group.seed, trajectory)
            state.finish(group, place, trajectory)
            return None

        if not state.over(ask=True):
            requests = [self._request(self._member(*place)) for place in places]
            self._engine.play(requests, sampling, follow, state.over)
        return not state.stopped

    @staticmethod
    def _member(group: Group, place: int) -> Episode:
        member = group.members[place]
        assert isinstance(member, Episode), "only episodes that are not over are played"
        return member

    def restore(self, groups: Sequence[Group], rows: Mapping[str, Row]) -> None:
        """Let episodes go on from what `rows` (by key) has of them.

        A trajectory is taken as it is. Of an episode that was stopped on its way the calls are made
        again, in another environment, which brings that to where it was; where a tool answers
        otherwise, or the prompt is another, the episode stays as it is.
        """
        found = [(g, place, g.key(place)) for g in groups for place in g.open]
        jobs = [
            functools.partial(self._restore, group, place, rows[key])
            for group, place, key in found
            if key in rows
        ]
        together(jobs, self._limits.parallel_episodes)

    def _restore(self, group: Group, place: int, row: Row) -> None:
        before = self._member(group, place)
        fresh = self._member(self.open(group.prompt, 1, group.seed, before.sibling), 0)
        if not _holds(fresh, prompt_ids_of(row)):
            return
        if is_over(row):
            group.members[place] = trajectory_of(row, group.prompt)
            return
        for done in completions_of(row):
            self._advance(fresh, done)
        fresh.begun = begun_of(row)
        if not fresh.stop and _holds(fresh, ids_of(row)):
            group.members[place] = fresh

    def _request(self, episode: Episode) -> Request:
        """The next turn, or what is left of one that has begun."""
        ids_T, room = episode.ledger.ids_T, self._config.max_tokens - len(episode.ledger)
        length = min(self._config.max_new_tokens, room)
        if episode.begun is not None:
            ids_T = np.concatenate([ids_T, episode.begun.ids_T])
            length -= len(episode.begun.ids_T)
        return Request(ids_T, length, episode.turn_seed)

    def _advance(self, episode: Episode, done: Completion) -> None:
        """Record a sampled turn, and answer it: its calls by their results, a reply without calls
        by what the user says next; without either the episode is over."""
        turn = len(episode.turns)
        start, end = episode.ledger.sample(done, turn)
        ids = done.ids_T[:-1] if done.finished else done.ids_T
        text = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids)
        reply = episode.tools.read(text, self.dialect)
        calls = done.finished and episode.tools.takes(reply)
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
        elif turn + 1 == self._config.max_turns or episode.tools.over:
            episode.stop = "turn_limit"
        else:
            self._observe(episode, self._delta(episode.turns[-1], said))

    def _finish(self, episode: Episode, reply: Reply, done: Completion) -> None:
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

    def _observe(self, episode: Episode, ids: list[int]) -> None:
        """Append what answers a turn, unless no room is left to reply to it."""
        if len(episode.ledger) + len(ids) >= self._config.max_tokens:
            episode.stop = "length"
        else:
            episode.ledger.observe(ids)

    def _close(self, episode: Episode) -> Trajectory:
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
