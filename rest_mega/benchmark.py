"""`rest-mega eval --suite`: a benchmark of a model, a checkpoint or an OpenAI-compatible
endpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rest_mega import launch
from rest_mega.cli import lay_over, overrides, read_yaml
from rest_mega.config import RunConfig, require
from rest_mega.data.rows import digest
from rest_mega.environments import ToolRuntime, load_modules
from rest_mega.evaluation.benchmark import progress, write_report
from rest_mega.evaluation.play import (
    Benchmark,
    judge_of,
    open_benchmarks,
    rollout_of,
    settings_of,
)
from rest_mega.evaluation.results import Results, check_settings, read_samples
from rest_mega.run_directory import RunDirectory

MOST_TOKENS, NEW_TOKENS = 8192, 1024
"""Of an episode and of a turn, where no config file says; fewer where the model has fewer
positions."""


def main(words: Sequence[str]) -> int:
    """Evaluate, and print the table; returns the exit code. ConfigError says what does not fit."""
    given, more = _parser().parse_known_intermixed_args(list(words))
    config = read(given, more)
    if config.evaluation.endpoint.url:
        return _endpoint(config, given)
    return _model(config, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest-mega eval",
        description="Play a benchmark and write RESULTS: samples.jsonl (everything of every "
        "sample), summary.json, table.txt, failures.html. The same command goes on where it was "
        "interrupted, and never draws a finished sample again. Under torchrun as train is.",
        epilog="What follows is laid over the config: section.key=value ...",
    )
    add = parser.add_argument
    what = "a config file; a Hugging Face folder, a run directory, a checkpoint or an http address"
    add("words", nargs="*", metavar="CONFIG.yaml | TARGET", help=what)
    add("--suite", required=True, help="api-bank or bfcl")
    add("--model", help="as TARGET; with an endpoint the model's name there")
    add("--data", help="the suite's data, where it brings none")
    add("--category", action="append", default=[], help="this one alone; may be repeated")
    add("--limit", type=int, help="tasks of each category, drawn by --seed; 0: all")
    add("--samples", type=int, help="replies to each task, for pass@k and mean@k")
    add("--seed", type=int, help="of the tasks and the replies drawn")
    add("--temperature", type=float, help="0: greedy, the default")
    add("--max-new-tokens", type=int, help="of a turn")
    add("--max-tokens", type=int, help="of an episode")
    add("--mode", choices=("tools", "text"), help="how an endpoint is told of tools")
    add("--out", type=Path, help="RESULTS; default: runs/eval/SUITE/NAME")
    add("--fresh", action="store_true", help="begin anew, moving aside what RESULTS holds")
    return parser


# ------------------------------------------------------------------ words -> config


def read(given: argparse.Namespace, more: Sequence[str]) -> RunConfig:
    """The config of the evaluation; the words over the flags over the file."""
    more = [*filter(_is_override, given.words), *more]
    plain = [word for word in given.words if word not in more]
    files = [word for word in plain if word.endswith((".yaml", ".yml"))]
    targets = [word for word in plain if word not in files]
    require(len(files) <= 1 and len(targets) <= 1, f"{plain}: give one config file and one target")
    tree = read_yaml(Path(files[0])) if files else {}
    target = targets[0] if targets else ("" if files else given.model or "")
    laid = overrides(list(more))
    _lay_target(tree, target, given, alone=not files, laid=dict(laid))
    for key, value in [*_flags(given).items(), *laid]:
        lay_over(tree, key, value)
    return RunConfig.from_dict(tree)


def _is_override(word: str) -> bool:
    key, found, _ = word.partition("=")
    return bool(found) and "." in key and "/" not in key


def _flags(given: argparse.Namespace) -> dict[str, Any]:
    """The keys that flags stand for."""
    names = ("limit", "samples", "seed", "temperature", "max_new_tokens", "max_tokens")
    flags = {f"evaluation.{n}": getattr(given, n) for n in names if getattr(given, n) is not None}
    flags["evaluation.suites"] = {given.suite: given.category}
    flags["evaluation.data"] = {given.suite: given.data} if given.data else {}
    if given.mode:
        flags["evaluation.endpoint.mode"] = given.mode
    return flags


def _lay_target(
    tree: dict[str, Any], target: str, given: argparse.Namespace, *, alone: bool, laid: Any
) -> None:
    """Lay what is evaluated, and where the results go, over the tree."""
    name = Path(target.rstrip("/")).name if target else "config"
    if target.startswith(("http://", "https://")):
        lay_over(tree, "evaluation.endpoint.url", target)
        name = given.model or target.partition("//")[2].replace("/", "_")
        if given.model:
            lay_over(tree, "evaluation.endpoint.model", given.model)
        if alone:
            _lay_limits(tree, MOST_TOKENS)
    elif target:
        if alone:  # its config.json is read for the limits
            modules = laid.get("environment.modules")
            load_modules(modules if isinstance(modules, list) else ())
        _lay_folder(tree, Path(target), alone=alone)
    else:
        require(not alone, "nothing to evaluate: give a model folder, a run, or an address")
        # The newest checkpoint of the config's run, as `rest-mega eval CONFIG` takes it.
        run = dict(tree.get("run") or {})
        name = Path(laid.get("run.dir", run.get("dir", "run"))).name
        lay_over(tree, "run.load", _checkpoint_of(laid.get("run.dir", run.get("dir", ""))))
    out = given.out or Path("runs") / "eval" / given.suite / name
    lay_over(tree, "run.dir", str(out))
    lay_over(tree, "run.fresh", False)


def _checkpoint_of(run_dir: str) -> str:
    from rest_mega.trainer import checkpoint_files

    return str((checkpoint_files.newest(Path(run_dir)) if run_dir else None) or "")


def _lay_folder(tree: dict[str, Any], folder: Path, *, alone: bool) -> None:
    from rest_mega.trainer import checkpoint_files
    from rest_mega.trainer.model import read_architecture

    if (folder / "config.json").is_file():
        lay_over(tree, "model.path", str(folder))
        lay_over(tree, "run.load", "")
        if alone:
            _lay_limits(tree, read_architecture(str(folder)).max_positions)
        return
    found = checkpoint_files.newest(folder)
    require(
        found is not None,
        f"{str(folder)!r} is neither a Hugging Face folder (no config.json) nor a run directory or "
        "checkpoint of this trainer; other Megatron checkpoints: `rest-mega convert` first",
    )
    if alone:
        tree |= checkpoint_files.read_state(found)["config"] if found else {}
        for section in ("parallel",) if launch.world_size() == 1 else ():
            tree[section] = {}
        if tree["rollout"]["engine"] == "replay":
            lay_over(tree, "rollout.engine", "embedded")
    lay_over(tree, "run.load", str(found))


def _lay_limits(tree: dict[str, Any], positions: int) -> None:
    most = min(MOST_TOKENS, positions)
    lay_over(tree, "rollout.max_tokens", most)
    lay_over(tree, "rollout.max_new_tokens", min(NEW_TOKENS, most // 2))
    lay_over(tree, "packing.tokens", most)


# ------------------------------------------------------------------ playing


def _model(config: RunConfig, given: argparse.Namespace) -> int:
    from rest_mega.assemble import open_session, read_inputs

    inputs = read_inputs(config, "eval", benchmarks_alone=True)
    (benchmark,) = inputs.benchmarks
    most, positions = _longest(config, benchmark), inputs.architecture.max_positions
    require(
        most <= positions,
        f"episodes of {most} tokens exceed the model's {positions} positions: lower --max-tokens",
    )
    out, head, weights = Path(config.run.dir), launch.rank() == 0, _weights(config)
    if not given.fresh:
        template = inputs.tokenizer.chat_template
        check_settings(out, settings_of(config, benchmark, template, weights))
    directory = RunDirectory(out, fresh=given.fresh) if head else None
    try:
        with open_session(config, inputs, "eval", total_steps=1, rollouts=True) as session:
            step = int(session.resumed.get("step", 0))
            session.publish(step)
            with session.phase("evaluate"):
                metrics = session.run_benchmark(benchmark, out, weights)
            if not metrics:
                return session.interrupted()
    finally:
        if directory is not None:
            directory.release()
    if head:
        _tell(out)
    return 0


def _longest(config: RunConfig, benchmark: Benchmark) -> int:
    return rollout_of(benchmark.suite, config.evaluation, config.rollout).max_tokens


def _weights(config: RunConfig) -> str:
    """Which weights of the model: the checkpoint's step, or what its files look like."""
    if config.run.load:
        return Path(config.run.load).name
    if config.model.init == "random":
        return f"random, run.seed={config.run.seed}"
    files = sorted(Path(config.model.path).glob("*.safetensors"))
    looks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{len(files)} files, {digest(looks)[:16]}"


def _endpoint(config: RunConfig, given: argparse.Namespace) -> int:
    """Evaluate an endpoint; 1 where samples were lost: the same command draws them."""
    from rest_mega.evaluation import chat_play

    require(launch.world_size() == 1, "an endpoint is evaluated by one process, without torchrun")
    load_modules(config.environment.modules)
    (benchmark,) = open_benchmarks(config.evaluation)
    evaluation = chat_play.resolve(config.evaluation)
    out, limits = Path(config.run.dir), rollout_of(benchmark.suite, evaluation, config.rollout)
    config = dataclasses.replace(config, evaluation=evaluation)
    settings = settings_of(config, benchmark, "", evaluation.endpoint.model)
    directory = RunDirectory(out, fresh=given.fresh)
    runtime = ToolRuntime(config.environment, chat_play.FourBytes())
    try:
        results = Results(out, settings)
        todo = [(t, n) for t, n in benchmark.pairs if (t.prompt.id, n) not in results.done]
        total = len(benchmark.pairs)
        with progress(benchmark, total, total - len(todo), show=True) as tick:
            player = chat_play.ChatPlayer(
                evaluation,
                benchmark.suite.dialect or config.tokenizer.dialect,
                chat_play.Limits(limits.max_turns, limits.max_new_tokens),
                runtime,
                judge_of(benchmark.suite, results, tick),
            )
            player.play(todo)
        if read_samples(out):
            write_report(benchmark, out)
            _tell(out)
    finally:
        runtime.close()
        directory.release()
    if player.lost:
        sys.stderr.write(
            f"rest-mega: {len(player.lost)} of {total} samples are not done (first: "
            f"{player.lost[0]}); the same command goes on with them\n"
        )
    return int(bool(player.lost))


def _tell(out: Path) -> None:
    text = (out / "table.txt").read_text("utf-8")
    sys.stdout.write(f"{text}{out}: samples.jsonl, summary.json, failures.html\n")
