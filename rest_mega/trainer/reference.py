"""The reference policy: a second copy of this rank's parameters in host memory, swapped into the
modules for a forward pass.

Swapping exchanges the two sets of numbers in place, one parameter at a time: the device holds one
more parameter for a moment, the host one copy of the shard, and views of the parameters (the
optimizer's, the gradient buffers') stay what they are. On a GPU the copy is pinned and both ways
are queued on the current stream, in whose order they happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Reference:
    """The parameters that the modules have now, kept."""

    def __init__(self, modules: Sequence[Any]) -> None:
        parameters = dict.fromkeys(p for module in modules for p in module.parameters())
        self._pairs = [(p, _on_host(p)) for p in parameters]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules are the reference inside, and to the bit what they were afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, kept in self._pairs:
            held = parameter.detach().clone()
            parameter.copy_(kept, non_blocking=True)
            kept.copy_(held, non_blocking=True)


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())
