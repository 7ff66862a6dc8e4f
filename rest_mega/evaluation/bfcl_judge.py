"""A reply's raw text, or an episode's result -> BFCL's verdict, by its own checkers.

Source: the judges of single samples in bfcl-eval 2026.3.23, eval_checker/eval_runner.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rest_mega.environments.bfcl_decode import LANGUAGES, Calls, DecodeError, decode
from rest_mega.environments.bfcl_package import official

_NOT_RELEVANT = "Invalid syntax. Failed to decode AST when it should have."


@dataclass(frozen=True)
class Judged:
    """BFCL's verdict on one sample."""

    valid: bool
    kind: str = ""
    """BFCL's type of the error, empty where there is none."""
    reason: str = ""
    calls: Calls | None = None
    """What the reply was read as; None where it could not be read."""


def judge_reply(
    text: str, dialect: str, category: str, entry: Mapping[str, Any], gold: Any
) -> Judged:
    """A reply of one turn: `entry` and `gold` are BFCL's entry and its possible answers (None for
    the categories of irrelevance and relevance)."""
    try:
        calls = decode(text, dialect, category)
    except DecodeError as error:
        return judge_unread(category, str(error))
    return judge_calls(calls, category, entry, gold)


def judge_unread(category: str, error: str) -> Judged:
    """A reply in which its handler finds no calls that it can read."""
    if "irrelevance" in category:
        return Judged(True)
    if "relevance" in category:
        return _silent(f"{_NOT_RELEVANT} {error}", None)
    reason = f"Invalid syntax. Failed to decode AST. {error}"
    return Judged(False, "ast_decoder:decoder_failed", reason)


def judge_calls(calls: Calls, category: str, entry: Mapping[str, Any], gold: Any) -> Judged:
    """Calls [{name: {argument: value}}], or what a handler makes of something else."""
    if "relevance" in category:
        return _relevance(calls, category)
    if not official("utils").is_function_calling_format_output(calls):
        kind = "ast_decoder:decoder_wrong_output_format"
        return Judged(False, kind, "Did not output in the specified format.", calls)
    return _checked(calls, category, entry, gold)


def _relevance(calls: Calls, category: str) -> Judged:
    """Whether anything is called at all (_evaluate_single_relevance_entry)."""
    called = not official("utils").is_empty_output(calls)
    if called != ("irrelevance" in category):
        return Judged(True, calls=calls)
    if not called:
        return _silent(f"{_NOT_RELEVANT} None", calls)
    reason = "Valid syntax. Successfully decode AST when it should not."
    return Judged(False, "irrelevance_error:decoder_success", reason, calls)


def _silent(reason: str, calls: Calls | None) -> Judged:
    """Nothing is called where something should be."""
    return Judged(False, "relevance_error:decoder_failed", reason, calls)


def _checked(calls: Calls, category: str, entry: Mapping[str, Any], gold: Any) -> Judged:
    """By BFCL's AST checker. On some nestings of values it raises, which would end BFCL's own run:
    such a reply is wrong."""
    language = official("constants.enums").Language[LANGUAGES.get(category, "PYTHON")]
    checker = official("eval_checker.ast_eval.ast_checker").ast_checker
    try:
        # It may convert values in place.
        found = checker(entry["function"], copy.deepcopy(calls), gold, language, category, "")
    except Exception as error:
        reason = f"BFCL's checker failed: {type(error).__name__}: {error}"
        return Judged(False, "ast_checker:failed", reason, calls)
    if found["valid"]:
        return Judged(True, calls=calls)
    reason = "; ".join(map(str, found["error"]))
    return Judged(False, found["error_type"], reason, calls)


def judge_episode(result: Mapping[str, Any]) -> Judged:
    """An episode of several turns, which its environment has judged (environments/bfcl.py)."""
    return Judged(bool(result["success"]), result["kind"], result["reason"])
