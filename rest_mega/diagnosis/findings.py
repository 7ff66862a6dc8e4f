"""What was found, on which ranks, and what to do about it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """ok; warning: a run starts, but slower or less safe than it could be; error: it will not run,
    or not rightly."""
    check: str
    """What was looked at, in a word or two."""
    text: str
    """What was seen. No rank, process or machine is named here, so that equal ones are told once.
    """
    remedy: str = ""
    """What to do; empty for ok."""


def dumps(findings: Sequence[Finding]) -> str:
    """As a line of JSON."""
    return json.dumps([asdict(finding) for finding in findings])


def loads(text: str) -> list[Finding]:
    """The findings of `dumps`."""
    return [Finding(**row) for row in json.loads(text)]


def merged(reports: Sequence[Sequence[Finding]]) -> dict[Finding, list[int]]:
    """Each different finding with its ranks, in the order of the first rank that has it.
    `reports`: one per rank."""
    found: dict[Finding, list[int]] = {}
    for rank, report in enumerate(reports):
        for finding in report:
            found.setdefault(finding, []).append(rank)
    return found


def disagreements(
    found: Mapping[Finding, Sequence[int]], answers: Sequence[Finding]
) -> list[Finding]:
    """Those of `answers` whose check has not the same text on all ranks that made it."""
    texts: dict[str, set[str]] = {}
    for finding in found:
        texts.setdefault(finding.check, set()).add(finding.text)
    return [answer for answer in answers if len(texts.get(answer.check, ())) > 1]


def lines(found: Mapping[Finding, Sequence[int]], world_size: int, width: int = 100) -> list[str]:
    """A finding a line or more, at most `width` characters each; ranks are named where not all
    have it."""
    column = 2 + max((len(f.check) for f in found), default=0)
    written = []
    for finding, ranks in found.items():
        text = finding.text
        if len(ranks) < world_size:
            text += f" [{told(ranks)}]"
        if finding.remedy:
            text += f"\n-> {finding.remedy}"
        head = f"{finding.level:8}{finding.check:{column}}"
        for part in text.split("\n"):
            folded = textwrap.wrap(part, width - len(head), break_on_hyphens=False) or [""]
            for line in folded:
                written.append(f"{head}{line}".rstrip())
                head = " " * len(head)
    return written


def told(ranks: Sequence[int]) -> str:
    """`rank 0-3, 6`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return "rank " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
