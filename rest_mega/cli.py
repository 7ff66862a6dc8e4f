"""Command line: VERB CONFIG.yaml [section.key=value ...] [--megatron-name value ...] -> RunConfig
-> the verb; or a verb with words of its own."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rest_mega import launch
from rest_mega.config import ConfigError, RunConfig, known_keys

VERBS = {
    "train": ("rest_mega.train", "train with ResT; resumes from the newest checkpoint in run.dir"),
    "sft": ("rest_mega.sft", "supervised warm start on chat dialogues"),
    "eval": ("rest_mega.evaluate", "held-out success of a checkpoint, without training"),
}

OWN_WORDS = {
    "convert": ("rest_mega.convert", "Hugging Face <-> Megatron checkpoint: SOURCE TARGET"),
    "eval --suite": ("rest_mega.benchmark", "a benchmark of a model, checkpoint or endpoint"),
    "compare": ("rest_mega.compare", "two evaluations by their samples: RESULTS RESULTS"),
    "replay": (
        "rest_mega.replay",
        "a step of a run once more, from its kept episodes: RUN --step N",
    ),
    "plan": (
        "rest_mega.plan",
        "does it fit, how fast will it go: CONFIG [--gpus N] [--gpu NAME] [section.key=value ...]",
    ),
    "doctor": ("rest_mega.doctor", "is this machine ready, are these ranks: [CONFIG ...]"),
    "tail": ("rest_mega.tail", "what a run says, as it says it: RUN"),
    "report": ("rest_mega.telemetry.report", "a page of runs, side by side: RUN [RUN ...]"),
}
"""Verbs with words of their own: their module's `main` reads what follows."""

MEGATRON_ALIASES = {
    "--tensor-model-parallel-size": "parallel.tensor",
    "--pipeline-model-parallel-size": "parallel.pipeline",
    "--num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline",
    "--virtual-pipeline-model-parallel-size": "parallel.virtual_pipeline",
    "--context-parallel-size": "parallel.context",
    "--expert-model-parallel-size": "parallel.expert",
    "--sequence-parallel": "parallel.sequence",
    "--use-distributed-optimizer": "optimizer.distributed",
    "--lr": "optimizer.lr",
    "--weight-decay": "optimizer.weight_decay",
    "--adam-beta1": "optimizer.beta1",
    "--adam-beta2": "optimizer.beta2",
    "--adam-eps": "optimizer.eps",
    "--clip-grad": "optimizer.clip_grad",
    "--seed": "run.seed",
    "--train-iters": "run.steps",
    "--load": "run.load",
    "--fresh": "run.fresh",
}
"""Megatron's own names (and --fresh); the flags among them stand for true."""

NO_COUNTERPART = {
    "--micro-batch-size": "micro-batches are filled by tokens: set packing.tokens",
    "--global-batch-size": "a step has rollout.prompts_per_step x rollout.samples_per_prompt "
    "trajectories",
    "--expert-tensor-parallel-size": "an expert is never cut: set parallel.expert",
    "--save": "checkpoints are written into run.dir; set run.dir",
}
"""Names of Megatron's that many type, and what to write instead."""

_BEFORE_TRAINING = "interrupted before training began"
_FLAGS = ("--sequence-parallel", "--use-distributed-optimizer", "--fresh")

HELP = """usage: rest-mega VERB CONFIG.yaml [section.key=value ...] [--megatron-name value ...]
       torchrun --nproc-per-node N -m rest_mega VERB CONFIG.yaml ...

verbs:
{verbs}

Relative paths are relative to the current directory. `rest-mega keys` lists every config key,
`rest-mega convert --help` (and doctor, plan, eval, compare, replay, report, tail) what follows that
verb.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code.

    0 done, 1 failed, 2 bad input, 3 stopped by the guard, 4 losses not finite, 70 a phase beyond
    its deadline, 130 Ctrl-C and 143 SIGTERM (both after saving).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        verbs = (VERBS | OWN_WORDS).items()
        sys.stdout.write(
            HELP.format(verbs="\n".join(f"  {verb:12} {text}" for verb, (_, text) in verbs))
        )
        return 0 if words else 2
    if words[0] == "keys":
        sys.stdout.write("\n".join(known_keys()) + "\n")
        return 0
    own = words[0] if words[0] in OWN_WORDS else f"{words[0]} --suite"
    if words[0] == "train" and "--dry-run" in words:
        dry_run = importlib.import_module("rest_mega.dry_run")
        return _run(lambda: dry_run.main(words[1:]), "interrupted")
    if own in OWN_WORDS and (own == words[0] or _names_a_suite(words)):
        module = importlib.import_module(OWN_WORDS[own][0])
        return _run(lambda: module.main(words[1:]), "interrupted")
    try:
        verb, config = read(words)
        module = importlib.import_module(VERBS[verb][0])
        inputs = module.read(config)
    except ConfigError as error:
        if launch.local_rank() == 0:  # all ranks of a machine read the same files
            sys.stderr.write(f"rest-mega: {error}\n")
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    return _run(lambda: module.run(config, inputs))


def _names_a_suite(words: Sequence[str]) -> bool:
    return any(word == "--help" or word.partition("=")[0] == "--suite" for word in words)


def _run(verb: Callable[[], int], if_interrupted: str = _BEFORE_TRAINING) -> int:
    try:
        return int(verb())
    except ConfigError as error:
        who = f" [rank {launch.rank()}]" if launch.world_size() > 1 else ""
        sys.stderr.write(f"rest-mega{who}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return _interrupted(if_interrupted)
    except Exception:
        # Tell why before torchrun ends the peers that now wait for this rank.
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def _interrupted(what: str = _BEFORE_TRAINING) -> int:
    sys.stderr.write(f"rest-mega: {what}\n")
    return 130


def read(words: Sequence[str]) -> tuple[str, RunConfig]:
    """(verb, config) of a command line; ConfigError names what is unknown and the nearest known
    names."""
    verb, rest = words[0], list(words[1:])
    known = [*VERBS, *(name for name in OWN_WORDS if " " not in name)]
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb!r}; choose one of {', '.join(known)}{_near(verb, known)}"
        )
    if not rest or "=" in rest[0] or rest[0].startswith("--"):
        raise ConfigError(
            f"{verb} needs a config file: rest-mega {verb} CONFIG.yaml [section.key=value ...]"
        )
    tree = read_yaml(Path(rest[0]))
    for key, value in overrides(rest[1:]):
        lay_over(tree, key, value)
    return verb, RunConfig.from_dict(tree)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as nested dictionaries; a key that stands twice is an error with its line."""
    if not path.is_file():
        here = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"no config file {str(path)!r}{_near(str(path), here)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections with keys, not {type(tree).__name__}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"{key!r} in line {line} cannot be a key")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def lay_over(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` (or deeper) in the nested dictionaries of `tree`."""
    *path, last = key.split(".")
    for part in path:
        if tree.get(part) is None:  # absent, or a section without keys
            tree[part] = {}
        below = tree[part]
        if not isinstance(below, dict):
            raise ConfigError(f"{key}: {part} is {below!r}, which has no keys below it")
        tree = below
    tree[last] = value


def overrides(words: list[str]) -> list[tuple[str, Any]]:
    """(key, value) of every section.key=value and of every option of Megatron's."""
    found: list[tuple[str, Any]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            found.append(_megatron(word, words))
        elif "=" in word and "." in word.split("=")[0]:
            key, text = word.split("=", 1)
            found.append((key, _value(key, text)))
        else:
            raise ConfigError(
                f"{word!r} is neither section.key=value nor one of Megatron's options"
                f"{_near_key(word.split('=')[0])}"
            )
    return found


def _megatron(word: str, words: list[str]) -> tuple[str, Any]:
    name, has_value, text = word.partition("=")
    if name == "--profile" and (text or words):
        key, has_value, window = (text or words.pop(0)).partition("=")
        return f"profile.{key}", _value(f"profile.{key}", window if has_value else "")
    if name == "--bf16":
        return "model.dtype", "bf16"
    if name in NO_COUNTERPART:
        raise ConfigError(f"{name} has no counterpart here: {NO_COUNTERPART[name]}")
    if name not in MEGATRON_ALIASES:
        raise ConfigError(
            f"unknown option {name!r}{_near(name, list(MEGATRON_ALIASES))}; or write "
            "section.key=value"
        )
    if name in _FLAGS and not has_value:
        return MEGATRON_ALIASES[name], True
    if not has_value:
        if not words:
            raise ConfigError(f"{name} needs a value")
        text = words.pop(0)
    return MEGATRON_ALIASES[name], _value(name, text)


def _value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text!r} is not a YAML value: {error}") from error
    return "" if value is None and text == "" else value


def _near_key(word: str) -> str:
    """The keys whose last part is nearest to `word`."""
    near = difflib.get_close_matches(word, [key.split(".")[-1] for key in known_keys()], n=1)
    keys = [key for key in known_keys() if key.split(".")[-1] in near]
    return f"; did you mean {' or '.join(keys[:3])}?" if keys else ""


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
