"""One server as a player sees it, and which of them is asked next."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rest_mega.rollout.sglang_client import Client, Piece, ServerInfo
from rest_mega.rollout.sglang_server import Server

STICK = 8
"""An episode stays where its prefix is cached unless another worker has this many fewer
requests."""


@dataclass(eq=False)
class Worker:
    """One server as we see it."""

    client: Client
    server: Server | None
    """None when somebody else started it."""
    info: ServerInfo
    open: bool = True
    running: dict[str, asyncio.Future[Piece]] = field(default_factory=dict)
    """Requests under way, by their ids."""
    released: set[str] = field(default_factory=set)
    """Whose GPU memory it has given back: weights, kv_cache."""
    restarts: int = 0
    answered: int = 0
    """Requests that it has answered, over all its starts."""
    trouble: str = ""
    """Why it was lost last."""


def choose(
    workers: Sequence[Worker], home: Worker | None, failed: Collection[Worker] = ()
) -> Worker | None:
    """The open worker for an episode whose earlier turns `home` answered: home, or the least
    loaded; one that `failed` on this turn only when no other is open. None when none is open."""
    candidates = [worker for worker in workers if worker.open]
    candidates = [worker for worker in candidates if worker not in failed] or candidates
    if not candidates:
        return None
    least = min(candidates, key=lambda worker: len(worker.running))
    if home not in candidates or len(home.running) >= len(least.running) + STICK:
        return least
    return home
