"""The registry of environments, and the loading of the modules that fill it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from rest_mega.config import ConfigError, one_of, require
from rest_mega.environments.tools import Conduct, ToolEnvironment, Traits
from rest_mega.records import ToolCall


class Environment(Protocol):
    """What answers the calls of one episode and judges it; made anew for every trajectory.

    Episodes may run at the same time in several threads: state belongs to the instance."""

    @property
    def specs(self) -> Sequence[Mapping[str, Any]]:
        """OpenAI function specs of the tools; arguments are checked against them before `call`."""
        ...

    @property
    def traits(self) -> Mapping[str, Traits]:
        """How each tool may be run, by its name."""
        ...

    @property
    def conduct(self) -> Conduct:
        """How its episodes are led."""
        ...

    def call(self, call: ToolCall) -> str:
        """The tool's output; an exception becomes an outcome that the model sees."""
        ...

    def next_user(self, answer: str) -> str | None:
        """What the user says after a reply without calls, whose text is `answer`; None: nothing
        more, the episode is over. Tools that the message offers are in `specs` from then on."""
        ...

    def finish(self, answer: str) -> Mapping[str, Any]:
        """The verdict on the final state and the last answer: {"success": bool, ...}, or {}."""
        ...


DECLARED = "tools"

ENVIRONMENTS: dict[str, Callable[[Mapping[str, Any]], Environment]] = {
    "none": ToolEnvironment,
    DECLARED: ToolEnvironment,
    "bfcl": lambda task: _bfcl(task),
}
"""Name -> class, called with the task of a prompt. "none" answers no call, "tools" has the tools
that the config declares; neither judges."""

C = TypeVar("C", bound=Callable[[Mapping[str, Any]], Environment])


def _bfcl(task: Mapping[str, Any]) -> Environment:
    from rest_mega.environments.bfcl import BfclEnvironment

    return BfclEnvironment(task)


def environment(name: str) -> Callable[[C], C]:
    """Register a class under `name`; ConfigError when the name is taken by another class."""

    def register(kind: C) -> C:
        taken = ENVIRONMENTS.setdefault(name, kind)
        require(
            taken is kind,
            f"environment {name!r} is already registered by {taken!r}; choose another name",
        )
        return kind

    return register


def make_environment(name: str, task: Mapping[str, Any]) -> Environment:
    """A fresh environment for one episode; ConfigError names the known ones."""
    one_of("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name](task)


def load_modules(names: Sequence[str]) -> tuple[ModuleType, ...]:
    """Import the modules that register tools, environments or rewards: dotted names, or paths of
    .py files.

    A file is loaded once however often it is named. Raises ConfigError when one cannot be imported.
    """
    return tuple(
        _load_file(Path(name)) if name.endswith(".py") else _import(name) for name in names
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(
            f"environment.modules: cannot import {name!r} ({type(error).__name__}: {error}); "
            "give an importable module name or the path of a .py file"
        ) from error


def _load_file(path: Path) -> ModuleType:
    require(
        path.is_file(),
        f"environment.modules: no file {str(path)!r}; paths are relative to {str(Path.cwd())!r}",
    )
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"rest_mega_module_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"environment.modules: {path} failed with {type(error).__name__}: {error}"
        ) from error
    return module
