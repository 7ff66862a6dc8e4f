"""Speed of region tagging: tokens per second on one core, and how time grows with length and calls.

    python benchmarks/regions.py [--dialect hermes] [--repeats 50]

Replies are made up: reasoning, calls with strings, numbers and nested arguments, an answer; cut
into tokens of about four bytes, tags in one piece. CPU time of this process, median of the repeats.
Targets: at least 1.5 M tokens/s in every row, and time(4k tokens, 8 calls) / time(1k tokens, 1
call) <= 6.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time

from rest_mega.credit.regions import tag
from rest_mega.dialects import parse

SIZES = ((1024, 1), (1024, 4), (2048, 4), (4096, 1), (4096, 8))
WORDS = [
    "the",
    "tool",
    "returns",
    "a",
    "list",
    "of",
    "cities",
    "weather",
    "unit",
    "date",
    "and",
    "value",
    "must",
    "be",
    "given",
    "before",
    "we",
    "call",
    "it",
    "again",
]
PIECE = re.compile(
    rb"</?(?:think|tool_call|response)>| ?[A-Za-z_]{1,5}|[0-9]{1,3}|[^A-Za-z0-9_<]{1,3}|<"
)


def arguments(random_: random.Random) -> dict[str, object]:
    """Six keys: strings, numbers, a list and a nested object."""
    return {
        "city": random_.choice(WORDS),
        "query": " ".join(random_.choices(WORDS, k=12)),
        "limit": random_.randrange(1000),
        "exact": True,
        "tags": random_.choices(WORDS, k=4),
        "range": {"from": "2025-01-01", "to": "2025-12-31"},
    }


def reply(dialect: str, tokens: int, calls: int, seed: int) -> list[bytes]:
    """The tokens of a well-formed reply in `hermes` or `toolrl`."""
    random_ = random.Random(seed)
    key = "arguments" if dialect == "hermes" else "parameters"
    objects = [json.dumps({"name": f"get_{n}", key: arguments(random_)}) for n in range(calls)]
    parted = "\n</tool_call>\n<tool_call>\n" if dialect == "hermes" else "\n"
    block = f"<tool_call>\n{parted.join(objects)}\n</tool_call>"
    missing = tokens - len(PIECE.findall(block.encode())) - 4
    thought = " ".join(random_.choices(WORDS, k=max(missing, 0)))
    pieces = PIECE.findall(f"<think>{thought}</think>\n{block}".encode())
    surplus = len(pieces) - tokens  # drop pieces of the thought: the second piece on
    return pieces[:1] + pieces[1 + max(surplus, 0) :]


def milliseconds(tokens: list[bytes], dialect: str, repeats: int) -> float:
    """Median CPU time of tagging the reply once."""
    times = []
    for _ in range(repeats):
        start = time.process_time_ns()
        tag(tokens, dialect)
        times.append(time.process_time_ns() - start)
    return statistics.median(times) / 1e6


def main() -> None:
    """Print one row per size, then the growth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialect", choices=("hermes", "toolrl"), default="hermes")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    taken = {}
    print(f"{'tokens':>8}{'calls':>7}{'bytes':>8}{'ms':>9}{'M tokens/s':>12}")
    for size, calls in SIZES:
        tokens = reply(options.dialect, size, calls, seed=size + calls)
        parsed = parse(b"".join(tokens), options.dialect)
        assert parsed.well_formed, parsed.error
        assert len(parsed.calls) == calls, (len(parsed.calls), calls)
        taken[size, calls] = ms = milliseconds(tokens, options.dialect, options.repeats)
        count, size_B = len(tokens), len(b"".join(tokens))
        print(f"{count:>8}{calls:>7}{size_B:>8}{ms:>9.3f}{count / ms / 1e3:>12.2f}")
    print(f"growth: time(4k, 8 calls) / time(1k, 1 call) = {taken[4096, 8] / taken[1024, 1]:.1f}")


if __name__ == "__main__":
    main()
