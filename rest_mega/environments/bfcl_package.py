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
from rest_mega.records import Message

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

_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
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


def with_hints(documents: Sequence[Mapping[str, Any]], category: str) -> list[Mapping[str, Any]]:
    """Function documents as BFCL's runner shows them: the language is named, and arguments in Java
    and JavaScript are strings."""
    entry = {"id": f"{category}_0", "function": copy.deepcopy(list(documents))}
    (hinted,) = official("utils").add_language_specific_hint_to_function_doc([entry])
    found: list[Mapping[str, Any]] = hinted["function"]
    return found


def tool_specs(documents: Sequence[Mapping[str, Any]], category: str) -> list[Spec]:
    """OpenAI specs of function documents as BFCL's runner shows them to models with tool use: with
    hints, and types of JSON schema. Names keep their dots."""
    converted = official("model_handler.utils").convert_to_tool(
        with_hints(documents, category),
        official("constants.type_mappings").GORILLA_TO_OPENAPI,
        official("constants.enums").ModelStyle.OPENAI_COMPLETIONS,
    )
    return [
        {**spec, "function": {**spec["function"], "name": document["name"]}}
        for spec, document in zip(converted, documents, strict=True)
    ]


def prompted(
    messages: Sequence[Message], documents: Sequence[Mapping[str, Any]], category: str
) -> list[Message]:
    """The messages with BFCL's own system prompt before them, which shows the functions and asks
    for Python calls: what its runner tells models without tool use."""
    write = official("model_handler.utils").system_prompt_pre_processing_chat_model
    hinted = with_hints(documents, category)
    found: list[Message] = write(copy.deepcopy(list(messages)), hinted, f"{category}_0")
    return found


@lru_cache
def function_specs(name: str) -> tuple[Spec, ...]:
    """OpenAI function specs of a backend class, from BFCL's own documents."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": document["name"],
                "description": document["description"],
                "parameters": _json_schema(document["parameters"]),
            },
        }
        for document in function_documents(name)
    )


@lru_cache
def benchmark_specs(name: str) -> tuple[Spec, ...]:
    """The same as BFCL's runner shows them."""
    return tuple(tool_specs(function_documents(name), "multi_turn"))


def _json_schema(schema: Any) -> Any:
    """BFCL writes Python's names of types; objects without named properties take any."""
    if isinstance(schema, list):
        return [_json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _json_schema(value) for key, value in schema.items()}
    if isinstance(kind := schema.get("type"), str):
        found["type"] = _JSON_TYPES.get(kind, kind)
        if found["type"] == "object" and not schema.get("properties"):
            found["additionalProperties"] = True
    return found
