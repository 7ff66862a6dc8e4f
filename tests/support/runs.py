"""A whole tiny run in a folder (model, tokenizer, environment, prompts, dialogues, config), and how
to start it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.models import save_model
from tests.support.ranks import Job, run_ranks

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_bpe"

MODULE = '''"""The environment and the reward of the tiny run."""

import contextlib
import os
import signal
from pathlib import Path

from rest_mega.environments import ToolEnvironment, environment, tool
from rest_mega.rewards.rubric import reward


@environment("parity")
class Parity(ToolEnvironment):
    """Success: an even number of characters in the answer."""

    def __init__(self, task):
        super().__init__(task)
        self.want = task["want"]

    @tool
    def double(self, number: int) -> int:
        """Twice the number.

        Args:
            number: any
        """
        return 2 * number

    def finish(self, answer: str) -> dict:
        asked = Path(__file__).with_name("interrupt")
        with contextlib.suppress(FileNotFoundError):  # episodes end side by side
            asked.unlink()
            os.kill(os.getpid(), signal.SIGINT)
        with Path(__file__).with_name("verdicts").open("a") as file:
            file.write(f"{self.want}\\n")
        return {"success": len(answer) % 2 == self.want}


@reward("even")
def even(trajectory) -> float:
    """Share of even ids among the sampled tokens: random weights can already get better at it."""
    return float((trajectory.ids_T[trajectory.mask_T] % 2 == 0).mean())
'''

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"steps": 4, "save_every": 1, "keep_checkpoints": 9, "device": "auto"},
    "model": {},
    "tokenizer": {"chat_template": "hermes"},
    "optimizer": {"lr": 1e-3, "distributed": True},
    "rollout": {
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_turns": 2,
        "max_new_tokens": 8,
        "max_tokens": 400,
    },
    "packing": {"tokens": 512},
    "rewards": {"parts": {"even": 1.0}},
    "sft": {"dialogues_per_step": 4},
    "evaluation": {"prompts": 2, "every": 2},
    "telemetry": {"tensorboard": False, "console": "plain"},
}


@dataclass(frozen=True)
class Run:
    """The files of a tiny run."""

    root: Path

    @property
    def dir(self) -> Path:
        """Its run directory."""
        return self.root / "run"

    @property
    def config(self) -> Path:
        """Its config file."""
        return self.root / "config.yaml"

    def rows(self, name: str = "metrics", folder: Path | None = None) -> list[dict[str, Any]]:
        """The rows of one of its JSONL files."""
        text = ((folder or self.dir) / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def measured(self, folder: Path | None = None) -> list[dict[str, Any]]:
        """The metrics without what depends on the clock."""
        timed = ("time/", "tokens/s")
        return [
            {name: value for name, value in row.items() if not name.startswith(timed)}
            for row in self.rows(folder=folder)
        ]

    @property
    def verdicts(self) -> int:
        """How many episodes have ended, of all runs in this folder."""
        return len((self.root / "verdicts").read_text().splitlines())

    def interrupt_once(self) -> None:
        """The next episode that ends sends its process a SIGINT."""
        (self.root / "interrupt").touch()


def make_run(root: Path) -> Run:
    """The files of a tiny run in `root`: a random Qwen3 of two layers and six prompts."""
    model = save_model(root / "model", "qwen3", vocab_size=512, num_hidden_layers=2)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, model / file.name)
    (root / "parity.py").write_text(MODULE)
    write_rows(root / "train.jsonl", [prompt(i) for i in range(6)])
    write_rows(root / "held_out.jsonl", [prompt(i) for i in range(6, 8)])
    write_rows(root / "dialogues.jsonl", [dialogue(i) for i in range(6)])
    tree = {section: dict(values) for section, values in CONFIG.items()}
    tree["run"]["dir"] = str(root / "run")
    tree["model"]["path"] = str(model)
    tree["environment"] = {"modules": [str(root / "parity.py")]}
    tree["data"] = {
        "train": str(root / "train.jsonl"),
        "held_out": str(root / "held_out.jsonl"),
    }
    tree["sft"]["data"] = str(root / "dialogues.jsonl")
    (root / "config.yaml").write_text(json.dumps(tree, indent=1))  # JSON is YAML too
    return Run(root)


def prompt(number: int) -> dict[str, Any]:
    """One row of prompts."""
    return {
        "id": f"p{number}",
        "messages": [{"role": "user", "content": f"Double {number}."}],
        "environment": "parity",
        "task": {"want": number % 2, "kind": "parity"},
    }


def dialogue(number: int) -> dict[str, Any]:
    """One row of dialogues."""
    return {
        "messages": [
            {"role": "user", "content": f"Double {number}."},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Ended:
    """How a command ended on one rank."""

    code: int
    out: str
    err: str


def start(world_size: int, *words: object, machines: int = 1) -> list[Ended]:
    """`rest-mega WORDS` on every rank of a new run."""
    return run_ranks(run_verb, world_size, [str(word) for word in words], machines=machines)


def job_of(world_size: int, folder: Path, *words: object) -> Job:
    """The same, for a test that kills ranks: it does not wait."""
    return Job(_run, world_size, folder, [str(word) for word in words])


def _run(words: list[str]) -> int:
    from rest_mega.cli import main

    return main(words)


def run_verb(words: list[str]) -> Ended:
    """`rest-mega WORDS` on this rank."""
    from rest_mega.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as leave:
            code = int(str(leave.code))
    return Ended(code, out.getvalue(), err.getvalue())
