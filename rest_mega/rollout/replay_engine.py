"""Answers from recorded rollouts: to debug a step, or to train from a file without an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rest_mega.config import ConfigError
from rest_mega.rollout.engine import (
    Completion,
    Engine,
    Follow,
    Request,
    Sampling,
    play_in_rounds,
)


class RecordingEngine:
    """Another engine, every completion of which is also appended to a JSONL file."""

    def __init__(self, inner: Engine, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._inner = inner
        self._file: TextIO = file.open("a")
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The inner engine's version."""
        return self._inner.version

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Passed on."""
        self._inner.load_parameters(tensors, version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Passed on, then recorded."""
        done = self._inner.generate(requests, sampling)
        for request, completion in zip(requests, done, strict=True):
            self._record(request, completion, sampling)
        return done

    def play(self, requests: Sequence[Request], sampling: Sampling, follow: Follow) -> None:
        """Passed on, every completion recorded before it is followed."""
        asked = dict(enumerate(requests))

        def recorded(index: int, done: Completion) -> Request | None:
            self._record(asked[index], done, sampling)
            request = follow(index, done)
            if request is not None:
                asked[index] = request
            return request

        self._inner.play(requests, sampling, recorded)

    def _record(self, request: Request, done: Completion, sampling: Sampling) -> None:
        line = json.dumps(recorded_row(request, done, sampling)) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file and the inner engine."""
        self._file.close()
        self._inner.close()


def _key(request: Request, sampling: Sampling) -> tuple[int, int, bool]:
    return request.seed, len(request.ids_T), sampling.greedy


def recorded_row(request: Request, done: Completion, sampling: Sampling) -> dict[str, Any]:
    """One line of a recording, as JSON holds it."""
    return {
        "key": _key(request, sampling),
        "ids": done.ids_T.tolist(),
        "logprobs": [float(x) for x in done.logprobs_T],
        "finished": done.finished,
        "versions": done.version_T.tolist(),
    }


class ReplayEngine:
    """Serves what a RecordingEngine wrote; parameters are accepted and ignored."""

    def __init__(self, folder: Path) -> None:
        """ConfigError when `folder` holds no recordings or a line is malformed."""
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise ConfigError(
                f"rollout.replay={str(folder)!r} holds no *.jsonl; record with "
                "rollout.record=true first"
            )
        self._done: dict[tuple[Any, ...], Completion] = {}
        for file in files:
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                self._add(line, f"{file}:{number}")
        self._version = -1

    def _add(self, line: str, place: str) -> None:
        try:
            row = json.loads(line)
            ids = np.array(row["ids"], dtype=np.int32)
            logprobs = np.array(row["logprobs"], dtype=np.float32)
            versions = np.array(row["versions"], dtype=np.int32)
            if ids.ndim != 1 or not ids.shape == logprobs.shape == versions.shape:
                shapes = f"{ids.shape}, {logprobs.shape} and {versions.shape}"
                raise ValueError(f"ids, logprobs and versions of shapes {shapes} do not match")
            self._done[tuple(row["key"])] = Completion(
                ids, logprobs, bool(row["finished"]), versions
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(
                f"{place}: not a recorded completion ({error!r}); record the rollouts anew"
            ) from error

    @property
    def version(self) -> int:
        """The version last announced."""
        return self._version

    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Exhaust the stream; recorded completions do not depend on parameters."""
        for _ in tensors:
            pass
        self._version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The recorded completions; ConfigError for a request that was not recorded."""
        try:
            return [self._done[_key(request, sampling)] for request in requests]
        except KeyError as error:
            raise ConfigError(
                f"request {error} was not recorded: replay needs the run.seed, prompts and steps "
                "of the recorded run"
            ) from error

    def play(self, requests: Sequence[Request], sampling: Sampling, follow: Follow) -> None:
        """Turn by turn."""
        play_in_rounds(self, requests, sampling, follow)

    def close(self) -> None:
        """Nothing to free."""
