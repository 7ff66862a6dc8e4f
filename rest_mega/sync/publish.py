"""The trainer's parameters -> the rollout engine, once a step; the engine answers with what it
took."""

from __future__ import annotations

from rest_mega.rollout.engine import Engine
from rest_mega.sync.export import Exporter


def publish(exporter: Exporter, engine: Engine | None, version: int) -> None:
    """Load the current parameters into a player's engine under `version`; collective over all
    ranks.

    `engine` is None on ranks that are no players. RuntimeError when the engine did not take every
    tensor.
    """
    tensors = exporter.stream()
    if engine is None:
        for _ in tensors:
            raise AssertionError("only players receive tensors")
        return
    engine.load_parameters(tensors, version)
    left = [name for name, _ in tensors]  # other ranks wait until the stream has been exhausted
    if left:
        raise RuntimeError(
            f"the engine left {len(left)} tensors of version {version} unread, the first is "
            f"{left[0]!r}"
        )
    if engine.version != version:
        raise RuntimeError(
            f"the engine serves version {engine.version} after loading version {version}"
        )
