"""Triton's language: `constexpr` annotates, everything else is inert."""

from __future__ import annotations

from typing import Any

import inert


class constexpr:  # triton's spelling
    """A compile-time value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


inert.make_inert(__name__)
