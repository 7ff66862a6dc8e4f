"""Writes the quick-start's data: prompts to train on, held-out prompts, and dialogues for the warm
start.

    python examples/quickstart/make_data.py --out runs/quickstart/data [--dialogues 12800]

The dialogues are in the order of a curriculum: tasks of one call, then all, then all by a careless
assistant. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rest_mega.environments import load_modules, make_environment
from rest_mega.records import ToolCall

HERE = Path(__file__).parent
_, tasks = load_modules([str(HERE / "desk.py"), str(HERE / "tasks.py")])

TRAIN, HELD_OUT = 2048, 256
EASY, CARELESS = 0.2, 0.6
"""Until here one call each; from here on by the careless assistant (shares of the dialogues)."""
FLAWED = 0.75
"""Share of the careless assistant's dialogues that follow the slip of their kind."""


def draw(rng: random.Random, kinds: Iterable[str], *, held_out: bool) -> Iterator[Any]:
    """Endless tasks, the kinds in turn, either all from the held-out combinations or none."""
    for kind in itertools.cycle(kinds):
        yield next(t for t in _endless(rng, kind) if t.held_out == held_out)


def _endless(rng: random.Random, kind: str) -> Iterator[Any]:
    while True:
        yield tasks.KINDS[kind](rng)


def row(task: Any) -> dict[str, Any]:
    """A prompt as rest_mega.data.prompts reads it."""
    return {
        "id": f"{task.kind}-{task.digest:016x}",
        "messages": [{"role": "user", "content": task.question}],
        "environment": "desk",
        "task": record(task),
    }


def record(task: Any) -> dict[str, Any]:
    """What the environment and the rewards need to know of a task."""
    return {
        "kind": task.kind,
        "stock": task.stock,
        "free": task.free,
        "calls": task.calls,
        "answer": task.answer,
    }


def prompts(seed: str, count: int, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """`count` rows, the kinds in turn, no combination twice."""
    rng = random.Random(seed)
    seen: set[int] = set()
    for kind in itertools.islice(itertools.cycle(tasks.KINDS), count):
        fresh = (t for t in _endless(rng, kind) if t.held_out == held_out and t.digest not in seen)
        task = next(fresh)
        seen.add(task.digest)
        yield row(task)


def dialogue(task: Any, turns: Any, answer: int) -> dict[str, Any]:
    """The conversation in which an assistant makes these calls and answers; the tools really
    answer."""
    desk = make_environment("desk", record(task))
    messages: list[dict[str, Any]] = [{"role": "user", "content": task.question}]
    for calls in turns:
        asked = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": asked})
        messages += [{"role": "tool", "name": n, "content": _answer(desk, n, a)} for n, a in calls]
    messages.append({"role": "assistant", "content": f"Answer: {answer}"})
    return {"messages": messages, "tools": list(desk.specs)}


def demonstrations(seed: str, count: int) -> Iterator[dict[str, Any]]:
    """The warm start's curriculum, none of it held out."""
    rng = random.Random(seed)
    easy = draw(rng, [kind.__name__ for kind in tasks.EASY], held_out=False)
    mixed = draw(rng, tasks.KINDS, held_out=False)
    for index in range(count):
        task = next(easy if index < EASY * count else mixed)
        flawed = task.flawed and index >= CARELESS * count and rng.random() < FLAWED
        yield dialogue(task, *(task.flawed if flawed else (task.turns, task.answer)))


def _answer(desk: Any, name: str, arguments: dict[str, Any]) -> str:
    try:
        return str(desk.call(ToolCall(name, arguments)))
    except Exception as error:
        return f"error: {error}"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def write(
    out: Path,
    *,
    seed: int,
    train: int = TRAIN,
    held_out: int = HELD_OUT,
    dialogues: int = 0,
) -> None:
    """The files; another seed draws other tasks, but held-out combinations stay held out."""
    _write(out / "train.jsonl", prompts(f"train {seed}", train, held_out=False))
    _write(out / "held_out.jsonl", prompts(f"held out {seed}", held_out, held_out=True))
    if dialogues:
        _write(out / "dialogues.jsonl", demonstrations(f"dialogues {seed}", dialogues))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the files to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other tasks")
    parser.add_argument("--dialogues", type=int, default=0, help="so many for the warm start")
    arguments = parser.parse_args()
    write(arguments.out, seed=arguments.seed, dialogues=arguments.dialogues)


if __name__ == "__main__":
    main()
