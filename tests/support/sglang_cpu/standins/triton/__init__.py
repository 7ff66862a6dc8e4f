"""Triton where no kernel is ever launched: kernels can be defined and named."""

from __future__ import annotations

from typing import Any

import inert

__version__ = "3.9.0"


class _Kernel:
    """A kernel that can be indexed by a grid, not run."""

    def __init__(self, function: Any) -> None:
        self.fn = function

    def __getitem__(self, grid: Any) -> _Kernel:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("Triton is an inert stand-in: it launches no kernel")


def jit(function: Any = None, **_: Any) -> Any:
    """A decorator, with or without options."""
    return _Kernel if function is None else _Kernel(function)


def _pass_through(*_: Any, **__: Any) -> Any:
    return lambda kernel: kernel


autotune = heuristics = _pass_through


def cdiv(number: int, by: int) -> int:
    """Division rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


class Config:
    """A set of kernel settings, kept and never used."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


inert.make_inert(__name__)

from triton import language, runtime  # noqa: E402, F401  # torch names both without importing them
