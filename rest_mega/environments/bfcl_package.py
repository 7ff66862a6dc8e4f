"""The package bfcl-eval: the one door to its data, its backends, its function documents and its
checkers.

BFCL's scores change with its version, so there is one that we know: another is refused. The package
is Apache-2.0; nothing of its executor is used, which evaluates model text as Python.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rest_mega.config import ConfigError, one_of, require
from rest_mega.environments.schema import Spec

VERSION = "2026.3.23"
"""Of bfcl-eval."""
BACKENDS: Mapping[str, str] = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Class -> its module, and the file of its function documents."""

_IMPORTING = threading.RLock()


@lru_cache
def package_data() -> Path:
    """The data folder of the package; ConfigError where it is missing or of another version."""
    spec = importlib.util.find_spec("bfcl_eval")
    remedy = "make bfcl, or pip install --no-deps and the list of packages in that make target"
    if spec is None or spec.origin is None:
        raise ConfigError(f"BFCL needs the package bfcl-eval {VERSION}: {remedy}")
    found = importlib.metadata.version("bfcl-eval")
    require(
        found == VERSION,
        f"bfcl-eval is {found} and must be {VERSION}, as scores of its versions differ: {remedy}",
    )
    return Path(spec.origin).parent / "data"


def backend(name: str) -> Any:
    """The class of that name; ConfigError where it or the package is missing."""
    one_of("class of a bfcl task", name, BACKENDS)
    module = f"eval_checker.multi_turn_eval.func_source_code.{BACKENDS[name]}"
    return getattr(official(module), name)


@lru_cache
def official(module: str) -> Any:
    """`bfcl_eval.MODULE`, imported without what judging does not use; ConfigError where the package
    or one of the small packages that it needs is missing."""
    package_data()
    try:
        with _IMPORTING, _stand_ins():
            return importlib.import_module(f"bfcl_eval.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"bfcl_eval.{module} needs the package {error.name}: make bfcl installs it"
        ) from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """During an import: no table of models (it loads the SDKs of all their vendors; of its fields
    the checkers read one), and no folders made beside the package (eval_config does on import)."""
    keep = SimpleNamespace(underscore_to_dot=False)  # our prompts show names with their dots
    models = ModuleType("bfcl_eval.constants.model_config")
    models.__dict__["MODEL_CONFIG_MAPPING"] = defaultdict(lambda: keep)
    paths = ModuleType("bfcl_eval.constants.eval_config")
    fakes = {module.__name__: module for module in (models, paths)}
    data = package_data()
    paths.__dict__.update(
        PROMPT_PATH=data,
        MULTI_TURN_FUNC_DOC_PATH=data / "multi_turn_func_doc",
        POSSIBLE_ANSWER_PATH=data / "possible_answer",
    )
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@lru_cache
def function_documents(name: str) -> tuple[Mapping[str, Any], ...]:
    """What BFCL writes of a backend's functions; ConfigError where the class is unknown."""
    one_of("class of a bfcl task", name, BACKENDS)
    file = package_data() / "multi_turn_func_doc" / f"{BACKENDS[name]}.json"
    return tuple(json.loads(line) for line in file.read_text("utf-8").splitlines() if line)


def tool_specs(documents: Sequence[Mapping[str, Any]], category: str) -> list[Spec]:
    """OpenAI specs of function documents as BFCL's runner shows them to models with tool use: types
    of JSON schema, and hints at the language. Names keep their dots."""
    entry = {"id": f"{category}_0", "function": copy.deepcopy(list(documents))}
    (hinted,) = official("utils").add_language_specific_hint_to_function_doc([entry])
    converted = official("model_handler.utils").convert_to_tool(
        hinted["function"],
        official("constants.type_mappings").GORILLA_TO_OPENAPI,
        official("constants.enums").ModelStyle.OPENAI_COMPLETIONS,
    )
    return [
        {**spec, "function": {**spec["function"], "name": document["name"]}}
        for spec, document in zip(converted, documents, strict=True)
    ]
