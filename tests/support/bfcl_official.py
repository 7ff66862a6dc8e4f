"""BFCL's official pipeline in this process: its runner's judges of single samples, its handlers'
decoders, its leaderboard.

What these modules import besides and judging does not use (SDKs of vendors, pandas, a reader of
.env files, paths of results) is stood in for while they are imported, and nothing of that stays in
sys.modules. The decoders evaluate text as Python: give them texts of these tests alone.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rest_mega.environments.bfcl_package import package_data


def _anything(*_: Any, **__: Any) -> None:
    """Stands in for a class or a function that is never used."""


def _same(method: Any) -> Any:
    """A decorator that changes nothing."""
    return method


class _Enforce:
    """overrides.EnforceOverrides without its checks."""


MODEL = "m"
"""Name of the model whose outputs are judged."""
_CARD = SimpleNamespace(
    underscore_to_dot=False,
    display_name=MODEL,
    url="",
    org="",
    license="",
    input_price=None,
    output_price=None,
)


def _fakes() -> dict[str, dict[str, Any]]:
    data = package_data()
    paths = {
        "PROMPT_PATH": data,
        "POSSIBLE_ANSWER_PATH": data / "possible_answer",
        "MEMORY_PREREQ_CONVERSATION_PATH": data / "memory_prereq_conversation",
        "MULTI_TURN_FUNC_DOC_PATH": data / "multi_turn_func_doc",
        "FORMAT_SENSITIVITY_IDS_PATH": data / "BFCL_v4_format_sensitivity.json",
        **dict.fromkeys(("RESULT_PATH", "SCORE_PATH", "DOTENV_PATH", "LOCAL_SERVER_PORT")),
    }
    return {
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": defaultdict(lambda: _CARD)},
        "bfcl_eval.constants.eval_config": paths,
        "dotenv": {"load_dotenv": _anything},
        "openai": {"OpenAI": _anything},
        "overrides": {"override": _same, "final": _same, "EnforceOverrides": _Enforce},
        "pandas": {},
        "requests": {},
    }


@contextmanager
def _stand_ins() -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in _fakes()}
    for name, contents in _fakes().items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(contents)
    try:
        yield
    finally:
        for name, found in before.items():
            del sys.modules[name]
            if found is not None:
                sys.modules[name] = found


@lru_cache
def module(name: str) -> Any:
    """`bfcl_eval.NAME`."""
    with _stand_ins():
        return importlib.import_module(f"bfcl_eval.{name}")


@lru_cache
def entries(category: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """Id -> (entry as the runner's judges read it, its ground truth or None)."""
    file = package_data() / f"BFCL_v4_{category}.json"
    answers = package_data() / "possible_answer" / file.name
    truths = _lines(answers) if answers.is_file() else None
    found = _lines(file)
    gold = [row["ground_truth"] for row in truths] if truths else [None] * len(found)
    return {entry["id"]: (entry, truth) for entry, truth in zip(found, gold, strict=True)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@lru_cache
def handler(dialect: str) -> Any:
    """The official handler whose models write calls in this dialect."""
    place = "model_handler.local_inference"
    name, kind = {
        "hermes": ("qwen_fc", "QwenFCHandler"),
        "llama3": ("llama_3_1", "LlamaHandler_3_1"),
        "pythonic": ("base_oss_handler", "OSSHandler"),
    }[dialect]
    found = getattr(module(f"{place}.{name}"), kind)
    return found.__new__(found)  # decoding needs none of what its constructor looks for


def judge(category: str, entry_id: str, result: Any, reader: Any) -> dict[str, Any]:
    """{"valid", "error_type"?, ...} of a model's raw result: a reply, or the replies of each turn.
    `reader` is the handler that takes and decodes them."""
    runner = module("eval_checker.eval_runner")
    result = _taken(result, reader)
    entry, truth = copy.deepcopy(entries(category)[entry_id])
    if category.startswith("multi_turn"):
        _forget_objects()
        return runner._evaluate_single_multi_turn_entry(
            reader, entry_id, result, truth, entry, MODEL, category
        )
    if "relevance" in category:
        return runner._evaluate_single_relevance_entry(
            reader, entry_id, result, entry, MODEL, category
        )
    enums = module("constants.enums")
    language = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}.get(category, "PYTHON")
    return runner._evaluate_single_ast_entry(
        reader,
        entry_id,
        result,
        truth,
        entry,
        MODEL,
        category,
        enums.Language[language],
        enums.ReturnFormat[language],
    )


def _taken(result: Any, reader: Any) -> Any:
    """What the handler keeps of raw replies, as they come from a server."""
    if isinstance(result, list):
        return [_taken(one, reader) for one in result]
    usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1)
    response = SimpleNamespace(choices=[SimpleNamespace(text=result)], usage=usage)
    return reader._parse_query_response_prompting(response)["model_responses"]


def kind(verdict: Mapping[str, Any]) -> str:
    """The type of the error in a verdict of `judge`; empty where there is none."""
    error = verdict.get("error")
    return str(error["error_type"]) if isinstance(error, dict) else verdict.get("error_type", "")


def _forget_objects() -> None:
    """The executor keeps the objects of every entry, under the names of model and entry."""
    kept = vars(module("eval_checker.multi_turn_eval.multi_turn_utils"))
    for name in [name for name in kept if name.endswith("_instance")]:
        del kept[name]


def _with_paths(locks: Path) -> Any:
    """`utils` with the paths that the package's door leaves out."""
    utils = module("utils")
    vars(utils).update(_fakes()["bfcl_eval.constants.eval_config"], LOCK_DIR=locks)
    return utils


def prompts(category: str, locks: Path) -> list[dict[str, Any]]:
    """Entries as the runner gives them to a handler, with the functions in their first message as
    it tells them to models without tool use."""
    found = _with_paths(locks).load_dataset_entry(category)
    for entry in found:
        handler("pythonic")._pre_query_processing_prompting(entry)
    return found


def leaderboard(scores: dict[str, tuple[float, int]], folder: Path) -> dict[str, Sequence[str]]:
    """The files that the leaderboard is made of, by name: header -> its value of this model."""
    helper = module("eval_checker.eval_runner_helper")
    _with_paths(folder)
    table = {MODEL: {c: {"accuracy": a, "total_count": n} for c, (a, n) in scores.items()}}
    helper.generate_leaderboard_csv(table, folder)
    found = {}
    for path in sorted(folder.glob("*.csv")):
        header, row = path.read_text("utf-8").splitlines()
        found[path.stem] = dict(zip(header.split(","), row.split(","), strict=True))
    return found
