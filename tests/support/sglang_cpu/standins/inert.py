"""Modules whose every name can be imported and named, and which refuse to compute."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _Refusing(type):
    """A class that can be named and subclassed, as can all its attributes; calling it raises."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is an inert stand-in: it computes nothing")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refusing(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any submodule of `root` that has no file of its own is an empty module of refusing names."""

    def __init__(self, root: str) -> None:
        self._prefix = root + "."

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        fill(module)


def fill(module: ModuleType) -> None:
    """Names that the module lacks become refusing classes."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Refusing(name, (), {})
        setattr(module, name, made)
        return made

    module.__dict__.setdefault("__getattr__", missing)


def make_inert(root: str) -> None:
    """The package `root`, being imported, and everything below it."""
    sys.meta_path.append(_Finder(root))
    fill(sys.modules[root])
