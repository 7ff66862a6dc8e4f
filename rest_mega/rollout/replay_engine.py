"""No engine: to train from kept rollouts (rollout.replay) where nothing can or need be sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rest_mega.config import ConfigError
from rest_mega.rollout.engine import Completion, Enough, Follow, Request, Sampling, never


class ReplayEngine:
    """Accepts parameters, ignores them and samples nothing: every episode must be in the bank."""

    repeatable = True

    def __init__(self, folder: str) -> None:
        """`folder`: of the bank, as errors name it."""
        self._folder, self._version = folder, -1

    @property
    def version(self) -> int:
        """The version last announced."""
        return self._version

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Exhaust the stream."""
        for _ in tensors:
            pass
        self._version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """ConfigError for any request."""
        if not requests:
            return []
        self._refuse(len(requests))

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        """ConfigError unless there is nothing to play."""
        if requests and not enough():
            self._refuse(len(requests))

    def _refuse(self, count: int) -> NoReturn:
        raise ConfigError(
            f"{count} episodes are not in rollout.replay={self._folder!r}: give the run.seed, "
            "prompts and steps of the run that was kept, and data.held_out= (evaluations are not "
            "kept)"
        )

    def rest(self) -> None:
        """Nothing is held that the trainer could use."""

    def close(self) -> None:
        """Nothing to free."""
