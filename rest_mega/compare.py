"""`rest-mega compare A B`: two evaluations by their samples, paired."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_mega.config import require
from rest_mega.evaluation.paired import Comparison, compare
from rest_mega.evaluation.results import read_samples, read_settings

SAME = ("suite", "version")
"""Settings without which two results are of different things."""
SUBJECT = ("model", "weights", *SAME)


def main(words: Sequence[str]) -> int:
    """Print the comparison by category; returns the exit code 0. ConfigError says what does not
    fit."""
    given = _parser().parse_args(list(words))
    settings = [read_settings(folder) for folder in (given.a, given.b)]
    for name in SAME:
        a, b = (one.get(name) for one in settings)
        require(a == b, f"{name} is {a!r} in {given.a} and {b!r} in {given.b}: not comparable")
    rows = [read_samples(folder) for folder in (given.a, given.b)]
    sys.stdout.write(f"A  {given.a}\nB  {given.b}\n" + _caution(*settings))
    categories = list(dict.fromkeys(row["category"] for row in rows[0]))
    shared = [c for c in categories if any(row["category"] == c for row in rows[1])]
    for category in shared if len(shared) > 1 else []:
        some = [[row for row in one if row["category"] == category] for one in rows]
        sys.stdout.write(_line(category, compare(*some)))
    sys.stdout.write(_line("all samples", compare(*rows)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest-mega compare",
        description="Compare two results of `rest-mega eval --suite` on the samples that both "
        "have: McNemar's exact test, and the 95 % interval of the difference. All samples are "
        "pooled, whatever weights the suite's overall score gives to categories.",
    )
    parser.add_argument("a", type=Path, help="RESULTS")
    parser.add_argument("b", type=Path, help="RESULTS")
    return parser


def _caution(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What differs besides the model."""
    names = [n for n in sorted({*a, *b} - {*SUBJECT}) if a.get(n) != b.get(n)]
    changes = "; ".join(f"{n} {a.get(n)!r} and {b.get(n)!r}" for n in names)
    return f"besides the model these differ: {changes}\n" if names else ""


def _line(name: str, found: Comparison) -> str:
    left_out = f", {found.left_out} samples of one alone left out" if found.left_out else ""
    return (
        f"{name}: A {found.score_a:.1%}, B {found.score_b:.1%}, B - A "
        f"{100 * (found.score_b - found.score_a):+.1f} points "
        f"(95 % {100 * found.low:+.1f} .. {100 * found.high:+.1f}), "
        f"{found.better} tasks better, {found.worse} worse, p = {found.p:.3g} "
        f"({found.tasks} tasks x {found.samples}{left_out})\n"
    )
