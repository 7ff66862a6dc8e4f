"""An episode while it grows, its siblings, and both as rows of JSON that a later process goes on
from."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rest_mega.environments import EpisodeTools
from rest_mega.records import Ints, Prompt, ToolCall, ToolOutcome, Trajectory, Turn
from rest_mega.rollout.engine import Completion, seed_of
from rest_mega.rollout.ledger import Ledger

Row = Mapping[str, Any]
"""One episode as JSON holds it; see `row_of`."""


@dataclass(eq=False)
class Episode:
    """One trajectory while it grows."""

    prompt: Prompt
    seed: str
    sibling: int
    tools: EpisodeTools
    ledger: Ledger
    turns: list[Turn] = field(default_factory=list)
    begun: Completion | None = None
    """The beginning of the next turn, where the engine stopped before its end."""
    answer: str = ""
    stop: str = ""

    @property
    def turn_seed(self) -> int:
        """What decides the draws of the next turn: the seed of the collection, the prompt's id,
        sibling and turn."""
        return seed_of(self.seed, self.prompt.id, self.sibling, len(self.turns))


@dataclass(eq=False)
class Group:
    """The siblings of one prompt, played or being played."""

    prompt: Prompt
    seed: str
    members: list[Episode | Trajectory]
    """A trajectory where the episode is over."""

    @property
    def done(self) -> bool:
        """Every episode is over."""
        return not self.open

    @property
    def open(self) -> list[int]:
        """Places of the episodes that are not over."""
        return [i for i, member in enumerate(self.members) if isinstance(member, Episode)]

    @property
    def trajectories(self) -> list[Trajectory]:
        """Of the episodes that are over."""
        return [member for member in self.members if isinstance(member, Trajectory)]

    def key(self, place: int) -> str:
        """The key of the episode in that place."""
        return key_of(self.seed, self.prompt.id, self.members[place].sibling)


def key_of(seed: str, prompt: str, sibling: int) -> str:
    """Names an episode among all of a run."""
    return f"{seed}/{prompt}/{sibling}"


# ------------------------------------------------------------------ rows


def row_of(member: Episode | Trajectory, seed: str) -> dict[str, Any]:
    """The episode as JSON holds it, to the bit.

    RuntimeError where the environment's verdict is nothing that JSON has.
    """
    tokens: Trajectory | Ledger
    if isinstance(member, Trajectory):
        tokens, begun, result = member, None, _plain(member)
    else:
        tokens, begun, result = member.ledger, member.begun, None
    return {
        "seed": seed,
        "prompt": member.prompt.id,
        "sibling": member.sibling,
        "ids": _packed(tokens.ids_T),
        "logprobs": _packed(tokens.logprobs_T),
        "turn": _packed(tokens.turn_T),
        "version": _packed(tokens.version_T),
        "turns": [_turn_row(turn) for turn in member.turns],
        "begun": begun and [_packed(x) for x in (begun.ids_T, begun.logprobs_T, begun.version_T)],
        "stop": member.stop,
        "result": result,
    }


def is_over(row: Row) -> bool:
    """The row is a trajectory's; otherwise an episode's that was stopped on its way."""
    return bool(row["stop"])


def key_of_row(row: Row) -> str:
    """Of the episode that the row holds."""
    return key_of(row["seed"], row["prompt"], row["sibling"])


def trajectory_of(row: Row, prompt: Prompt) -> Trajectory:
    """The trajectory that `row_of` was given."""
    turn_T = _unpacked(row["turn"], np.int32)
    return Trajectory(
        prompt=prompt,
        sibling=row["sibling"],
        ids_T=_unpacked(row["ids"], np.int32),
        logprobs_T=_unpacked(row["logprobs"], np.float32),
        mask_T=turn_T >= 0,
        turn_T=turn_T,
        version_T=_unpacked(row["version"], np.int32),
        turns=tuple(map(_turn_of, row["turns"])),
        stop=row["stop"],
        result=row["result"],
    )


def completions_of(row: Row) -> list[Completion]:
    """The turns that are over, as the engine gave them."""
    ids_T, logprobs_T = _unpacked(row["ids"], np.int32), _unpacked(row["logprobs"], np.float32)
    version_T = _unpacked(row["version"], np.int32)
    spans = [(slice(turn["start"], turn["end"]), turn["ended"]) for turn in row["turns"]]
    return [Completion(ids_T[s], logprobs_T[s], ended, version_T[s]) for s, ended in spans]


def ids_of(row: Row) -> Ints:
    """All tokens of the turns that are over, and what was observed after them."""
    return np.asarray(_unpacked(row["ids"], np.int32))


def begun_of(row: Row) -> Completion | None:
    """The beginning of the turn after them."""
    if row["begun"] is None:
        return None
    ids, logprobs, version = row["begun"]
    return Completion(
        ids_T=_unpacked(ids, np.int32),
        logprobs_T=_unpacked(logprobs, np.float32),
        finished=False,
        version_T=_unpacked(version, np.int32),
        aborted=True,
    )


def prompt_ids_of(row: Row) -> Ints:
    """The tokens before the first that was sampled."""
    sampled = np.flatnonzero(_unpacked(row["turn"], np.int32) >= 0)
    return ids_of(row)[: sampled[0] if len(sampled) else None]


def _packed(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode("ascii")


def _unpacked(text: str, dtype: type[np.generic]) -> Any:
    kind = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(base64.b64decode(text, validate=True), kind).astype(dtype)


def _turn_row(turn: Turn) -> dict[str, Any]:
    return {
        "start": turn.start,
        "end": turn.end,
        "text": turn.text,
        "well_formed": turn.well_formed,
        "ended": turn.ended,
        "answer": turn.answer,
        "calls": [[call.name, dict(call.arguments)] for call in turn.calls],
        "outcomes": [[o.status, o.content, o.seconds] for o in turn.outcomes],
    }


def _turn_of(row: Row) -> Turn:
    calls: Sequence[Any] = row["calls"]
    outcomes: Sequence[Any] = row["outcomes"]
    return Turn(
        **{
            **row,
            "calls": tuple(ToolCall(*call) for call in calls),
            "outcomes": tuple(ToolOutcome(*outcome) for outcome in outcomes),
        }
    )


def _plain(trajectory: Trajectory) -> Any:
    """The verdict with numpy's numbers as Python's."""

    def number(value: object) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} is nothing that JSON has")

    try:
        return json.loads(json.dumps(dict(trajectory.result), default=number))
    except (TypeError, ValueError) as error:
        name, prompt = trajectory.prompt.environment, trajectory.prompt.id
        raise RuntimeError(
            f"the verdict of environment {name!r} on prompt {prompt!r} cannot be kept ({error}): "
            "let its finish() return numbers, strings, lists and mappings, or set "
            "rollout.bank=false"
        ) from error
