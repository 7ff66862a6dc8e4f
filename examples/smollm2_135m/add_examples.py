"""A file of prompts in ToolRL's format -> the same prompts with two worked examples before the
question.

    python examples/smollm2_135m/add_examples.py PROMPTS OUT.jsonl

A model of 135 M parameters does not follow a written description of a format, but it imitates
earlier turns: with them some replies of a group are right and some wrong, which is what a policy
gradient needs. The worked examples are two rows of examples/data/toolrl_made_up.jsonl, question
and gold reply; PROMPTS itself may be that file (they are left out), or ToolRL's rlla_4k Parquet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rest_mega.data.prompts import load_prompts
from rest_mega.records import Message, Prompt

WORKED = Path(__file__).parents[1] / "data" / "toolrl_made_up.jsonl"
CHOSEN = ("made_up-train-0", "made_up-train-2")


def worked_examples() -> list[Message]:
    """Question and gold reply of the chosen rows, as turns."""
    rows = {prompt.id: prompt for prompt in load_prompts(WORKED)}
    return [
        message
        for name in CHOSEN
        for message in (
            rows[name].messages[-1],
            {"role": "assistant", "content": rows[name].task["ground_truth"]},
        )
    ]


def with_examples(prompt: Prompt, examples: Sequence[Message]) -> dict[str, Any]:
    """A row of ours: the system message, the worked examples, then the rest."""
    system = [message for message in prompt.messages if message["role"] == "system"]
    rest = [message for message in prompt.messages if message["role"] != "system"]
    return {
        "id": prompt.id,
        "messages": [*system, *examples, *rest],
        "environment": prompt.environment,
        "task": dict(prompt.task),
    }


def main() -> None:
    """Read, add, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    words = parser.parse_args()
    examples = worked_examples()
    rows = [with_examples(p, examples) for p in load_prompts(words.prompts) if p.id not in CHOSEN]
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{words.out}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
