"""The append-only token ledger of one trajectory: ids exactly as sampled, never re-tokenised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rest_mega.records import Bools, Floats, Ints
from rest_mega.rollout.engine import Completion


class Ledger:
    """Token ids with what is known of each: log-prob, sampled or observed, turn, policy version."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._turn: list[int] = []
        self._version: list[int] = []
        self.observe(prompt_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def observe(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy did not sample: prompt, tool results, template text."""
        self._append(ids, [0.0] * len(ids), -1, [-1] * len(ids))

    def sample(self, completion: Completion, turn: int) -> tuple[int, int]:
        """Append a sampled turn; returns its span [start, end)."""
        start = len(self)
        self._append(
            completion.ids_T.tolist(),
            completion.logprobs_T.tolist(),
            turn,
            completion.version_T.tolist(),
        )
        return start, len(self)

    def _append(
        self, ids: Sequence[int], logprobs: Sequence[float], turn: int, versions: Sequence[int]
    ) -> None:
        if not len(ids) == len(logprobs) == len(versions):
            raise ValueError(
                f"{len(ids)} token ids but {len(logprobs)} log-probs and {len(versions)} versions: "
                "the engine's answer is inconsistent"
            )
        self._ids += ids
        self._logprobs += logprobs
        self._turn += [turn] * len(ids)
        self._version += versions

    @property
    def ids_T(self) -> Ints:
        """All token ids so far."""
        return np.array(self._ids, dtype=np.int32)

    @property
    def logprobs_T(self) -> Floats:
        """Engine log-probs; 0 where observed."""
        return np.array(self._logprobs, dtype=np.float32)

    @property
    def mask_T(self) -> Bools:
        """True where sampled."""
        return self.turn_T >= 0

    @property
    def turn_T(self) -> Ints:
        """Assistant turn, -1 where observed."""
        return np.array(self._turn, dtype=np.int32)

    @property
    def version_T(self) -> Ints:
        """Policy version, -1 where observed."""
        return np.array(self._version, dtype=np.int32)
