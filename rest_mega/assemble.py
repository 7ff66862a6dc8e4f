"""RunConfig -> the parts of a run on this rank, every input checked before training starts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rest_mega import launch
from rest_mega.config import ConfigError, RunConfig, one_of, require
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import load_tokenizer
from rest_mega.dialects import DIALECTS, Region
from rest_mega.environments import load_modules
from rest_mega.evaluation.play import Benchmark, open_benchmarks
from rest_mega.evaluation.split import check_split
from rest_mega.losses import head
from rest_mega.records import Prompt
from rest_mega.rewards import Rubric
from rest_mega.rollout.bank import Bank, NoBank, ReadOnlyBank, stamp_of
from rest_mega.rollout.collect import Collector, check_prompts
from rest_mega.rollout.engine import Engine
from rest_mega.rollout.sglang_placement import Machine, row
from rest_mega.run_directory import RunDirectory
from rest_mega.session import Inputs, Session
from rest_mega.stop import Stop
from rest_mega.sync.export import Exporter
from rest_mega.sync.load import Source, load, open_source
from rest_mega.telemetry import sinks
from rest_mega.telemetry.profiler import Profiler
from rest_mega.telemetry.reporter import Reporter
from rest_mega.telemetry.timeline import Timeline, kept
from rest_mega.trainer import checkpoint, device, parallel
from rest_mega.trainer.checkpoint_files import (
    candidates,
    damage,
    newest,
    read_episodes,
    read_state,
)
from rest_mega.trainer.model import Architecture, read_architecture
from rest_mega.trainer.trainer import Trainer
from rest_mega.watchdog import FAILED, HUNG, Watchdog

T = TypeVar("T")

_SAME_MODEL = ("model.path", "model.init", "tokenizer.path", "tokenizer.dialect")
_SAME_TRAINING = ("run.seed", "optimizer.name", "optimizer.distributed")
_SAME_RUN = {
    "train": (*_SAME_MODEL, *_SAME_TRAINING, "data.train"),
    "sft": (*_SAME_MODEL, *_SAME_TRAINING, "sft.data"),
    "eval": _SAME_MODEL,
}
"""Verb -> what must be as the checkpoint's run had it."""


# ------------------------------------------------------------------ before the ranks meet


def read_inputs(config: RunConfig, verb: str, *, benchmarks_alone: bool = False) -> Inputs:
    """Read model, tokenizer, environments, prompts and benchmarks; ConfigError says what does not
    fit. `benchmarks_alone`: no prompts.

    Every rank reads for itself and finds the same: no process group exists yet.
    """
    if verb == "train":
        config.check_world(launch.world_size())
    config.parallel.data_parallel(launch.world_size())
    device.check(config.run.device)
    head.check_form(config.model.head)
    require(
        bool(config.model.path), "model.path is empty; point it at a Hugging Face checkpoint folder"
    )
    sinks.check(config.telemetry)
    load_modules(config.environment.modules)
    one_of("tokenizer.dialect", config.tokenizer.dialect, DIALECTS)
    architecture = read_architecture(config.model.path)
    architecture.check(config.parallel)
    tokenizer = load_tokenizer(
        config.tokenizer.path or config.model.path, config.tokenizer.chat_template
    )
    require(
        tokenizer.vocab_size <= architecture.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} tokens, the model {architecture.vocab_size} "
        "embedding rows: use the tokenizer that belongs to the model",
    )
    chat = ChatFormat(tokenizer)
    train, held_out = ([], []) if benchmarks_alone else _prompts(config, verb)
    check_prompts(train + held_out, chat, config.rollout.max_tokens, config.environment)
    benchmarks = [] if verb == "eval" and not benchmarks_alone else _benchmarks(config, chat)
    check_split(train, held_out, benchmarks)
    rubric = Rubric(config.rewards)
    source = open_source(config.model.path, config.model.init, architecture, config.run.seed)
    reference = None
    if verb == "train" and config.needs_reference:
        reference = _reference(config, architecture) if config.model.reference else source
    _check_checkpoint(config, verb)
    return Inputs(
        architecture, source, reference, tokenizer, chat, rubric, train, held_out, benchmarks
    )


def _benchmarks(config: RunConfig, chat: ChatFormat) -> list[Benchmark]:
    """The benchmarks, of each category one prompt tried with the chat template; a prompt that is
    too long is a wrong answer later."""
    benchmarks = open_benchmarks(config.evaluation)
    for benchmark in benchmarks:
        first = {task.category: task.prompt for task in reversed(benchmark.tasks)}
        check_prompts(list(first.values()), chat, sys.maxsize, config.environment)
    return benchmarks


def _reference(config: RunConfig, architecture: Architecture) -> Source:
    """The weights in `model.reference`; ConfigError unless they fit the policy's architecture."""
    path = config.model.reference
    other = read_architecture(path, "model.reference")
    sizes = [f.name for f in dataclasses.fields(Architecture) if f.name != "max_positions"]
    differing = [n for n in sizes if getattr(other, n) != getattr(architecture, n)]
    require(
        not differing,
        f"model.reference={path} differs from model.path in {', '.join(differing)}: the reference "
        "runs in the policy's modules; name a checkpoint of the same architecture",
    )
    return open_source(path, "load", architecture, config.run.seed)


def _prompts(config: RunConfig, verb: str) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out), as far as the verb uses them."""
    data, train, held_out = config.data, [], []
    if verb == "train":
        require(bool(data.train), "data.train is empty; name a JSONL or Parquet file of prompts")
        train = load_prompts(data.train, data.system)
    if verb == "eval":
        require(
            bool(data.held_out),
            "data.held_out is empty; name a JSONL or Parquet file of prompts to evaluate on",
        )
    if data.held_out:
        held_out = load_prompts(data.held_out, data.system)[: config.evaluation.prompts]
    return train, held_out


def _check_checkpoint(config: RunConfig, verb: str) -> None:
    """ConfigError when the checkpoint that this run would resume from is damaged or another
    run's."""
    run_dir, load_from = Path(config.run.dir), Path(config.run.load)
    fresh = config.run.fresh and verb != "eval"
    found = None if fresh else newest(run_dir)
    if found is None and not fresh:
        _refuse_if_damaged(run_dir, found, [damage(folder) for folder in candidates(run_dir)])
    if found is None and config.run.load:
        found = newest(load_from)
        require(
            found is not None,
            f"run.load={str(load_from)!r} is neither a checkpoint nor a run directory with an "
            f"intact one{_first([damage(folder) for folder in candidates(load_from)])}; name "
            "RUN or RUN/checkpoints/step_NNNNNNNN",
        )
    if found is None:
        return
    state = read_state(found)
    remedy = "use another run.dir, or start anew with run.fresh=true"
    require(
        verb in ("eval", state["verb"]),
        f"the checkpoint {found} was made by `{state['verb']}`, not `{verb}`; {remedy}",
    )
    now, then = config.to_dict(), state["config"]
    for key in _SAME_RUN[verb]:
        section, name = key.split(".")
        new, old = now[section][name], then.get(section, {}).get(name)
        require(
            new == old,
            f"{key}={new!r} contradicts the checkpoint {found}, made with {old!r}; {remedy}",
        )


def _first(problems: Sequence[str]) -> str:
    return f" ({problems[0]})" if problems else ""


def _refuse_if_damaged(run_dir: Path, found: Path | None, problems: Sequence[str]) -> None:
    """ConfigError when there are checkpoints but not one of them is intact."""
    require(
        found is not None or not problems,
        f"none of the checkpoints in {run_dir} is intact: {'; '.join(problems[:2])}; restore one, "
        "or start anew with run.fresh=true",
    )


# ------------------------------------------------------------------ all ranks together


def open_session(
    config: RunConfig, inputs: Inputs, verb: str, *, total_steps: int, rollouts: bool
) -> Session:
    """Start the process groups, build or resume the trainer, start the engine; every rank calls it
    together."""
    store, watchdog = _meet(config)
    try:
        place = parallel.start(
            config.parallel, config.run.device, config.deadlines, store,
            leads_play=not config.rollout.starts_engines,
        )  # fmt: skip
        return _open(config, inputs, verb, place, watchdog, total_steps, rollouts)
    except BaseException as error:
        try:
            watchdog.tell(error)
        finally:
            watchdog.close()
            parallel.stop()
        raise


def _meet(config: RunConfig) -> tuple[Any, Watchdog]:
    """The ranks' store, once all of them are there, and watched."""
    rank, size, seconds = launch.rank(), launch.world_size(), config.deadlines.join
    try:
        store = parallel.meet(seconds)
        deadlines = dataclasses.asdict(config.deadlines)
        watchdog = Watchdog(store, rank, size, Path(config.run.dir) / "hang", deadlines)
        watchdog.arrive()
    except (TimeoutError, ConnectionError) as error:
        late = isinstance(error, TimeoutError)
        within = f" within {seconds:.0f} s (deadlines.join)" if late else ""
        sys.stderr.write(f"rest-mega [rank {rank}]: not all ranks arrived{within}: {error}\n")
        raise SystemExit(HUNG if late else FAILED) from error
    watchdog.start()
    return store, watchdog


def _together(place: parallel.Parallel, build: Callable[[], T]) -> T:
    """What `build()` makes; where it raises ConfigError on some ranks, the first of them raises it
    and all others leave with exit code 2 in silence."""
    made: T | None = None
    problem = ""
    try:
        made = build()
    except ConfigError as error:
        problem = str(error)
    problems = [text.strip() for text in place.gather_text(problem)]
    failed = [rank for rank, text in enumerate(problems) if text]
    if failed and place.rank == failed[0]:
        raise ConfigError(problem)
    if failed:
        raise SystemExit(2)
    return cast(T, made)


def _open(
    config: RunConfig,
    inputs: Inputs,
    verb: str,
    place: parallel.Parallel,
    watchdog: Watchdog,
    total_steps: int,
    rollouts: bool,
) -> Session:
    trainer = _together(place, lambda: _trainer(config, inputs, place, total_steps))
    run_dir, trains = Path(config.run.dir), verb != "eval"
    if trains:
        trainer.prepare()
    claim = trains and place.is_head
    directory = _together(
        place, lambda: RunDirectory(run_dir, fresh=config.run.fresh) if claim else None
    )
    origin = run_dir
    found, damaged = checkpoint.find_intact(place, origin)
    if found is None and not damaged and config.run.load:
        origin = Path(config.run.load)
        found, damaged = checkpoint.find_intact(place, origin)
    _together(place, lambda: _refuse_if_damaged(origin, found, damaged))
    resumed: Mapping[str, Any] = {}
    if found is not None:
        restore = checkpoint.load if trains else checkpoint.load_parameters
        resumed = _together(place, lambda: restore(trainer, found))
    stop, plays = Stop(), rollouts and place.is_player
    machine = _machine(place)
    engine = _together(place, lambda: _engine(config, inputs, place, machine) if plays else None)
    collector = _collector(config, inputs, engine, stop) if engine is not None else None
    bank = _together(place, lambda: _bank(config, place) if plays and verb == "train" else None)
    carried = [json.loads(line) for line in read_episodes(found)] if bank and found else []
    timeline, profiler = _watching(config, place, resumed.get("step")) if trains else (None, None)
    if config.profile.steps and profiler is not None:
        trainer.time_pieces(profiler)
    reporter = _together(
        place,
        lambda: Reporter(
            run_dir,
            config.telemetry,
            total_steps=config.run.last_step,
            active=place.is_head and trains,
            resume_step=resumed.get("step"),
            region_names=[region.name for region in Region],
            config_tree=config.to_dict(),
            timeline=timeline,
            profiler=profiler,
        ),
    )
    if directory is not None and directory.unlocked:
        reporter.event("unlocked", f"{run_dir} cannot be locked: {directory.unlocked}")
    if machine.idle and rollouts and config.rollout.starts_engines:
        reporter.event(
            "idle",
            f"{machine.idle} machines train but do not sample: they hold unequal parts of a "
            "replica; choose parallel sizes that cut replicas evenly by machines",
        )
    for problem in damaged:
        reporter.event("damaged", f"left out a damaged checkpoint: {problem}")
    exporter = Exporter(trainer.modules, inputs.architecture, place)
    saver = checkpoint.Saver(trainer, run_dir, config.run.keep_checkpoints)
    stop.watch()
    watchdog.enter("loop")
    return Session(
        config=config,
        verb=verb,
        inputs=inputs,
        place=place,
        trainer=trainer,
        saver=saver,
        exporter=exporter,
        reporter=reporter,
        engine=engine,
        collector=collector,
        bank=bank,
        stop=stop,
        watchdog=watchdog,
        directory=directory,
        resumed=resumed,
        carried=carried,
    )


def _watching(
    config: RunConfig, place: parallel.Parallel, step: int | None
) -> tuple[Timeline | None, Profiler]:
    """This rank's timeline, where it keeps one, and its profiler. Collective."""
    offset, run_dir = place.clock_offset(), Path(config.run.dir)
    where = f"DP {place.data_rank} PP {place.pipeline_rank} CP {place.context_rank} "
    where += f"TP {place.tensor_rank}"
    profiler = Profiler(
        run_dir,
        config.profile,
        place.rank,
        where,
        step=step or 0,
        clock_offset=offset,
        on_gpu=place.device.type == "cuda",
    )
    if not kept(place.rank, place.world_size, config.telemetry.timelines):
        return None, profiler
    timeline = Timeline(
        run_dir,
        place.rank,
        where,
        waits=place.take_waits,
        clock_offset=offset,
        resume_step=step,
    )
    return timeline, profiler


def _trainer(
    config: RunConfig, inputs: Inputs, place: parallel.Parallel, total_steps: int
) -> Trainer:
    """The policy with the weights that `model` names, and the reference where one is needed; the
    optimizer not yet built."""
    trainer = Trainer(
        inputs.architecture,
        place,
        model=config.model,
        optimizer=config.optimizer,
        loss=config.loss,
        packing=config.packing,
        temperature=config.rollout.temperature,
        total_steps=total_steps,
    )
    first = inputs.source if inputs.reference is None else inputs.reference
    load(trainer.modules, first, inputs.architecture, place)
    if inputs.reference is not None:
        trainer.keep_reference()
    if first is not inputs.source:
        load(trainer.modules, inputs.source, inputs.architecture, place)
    return trainer


def _bank(config: RunConfig, place: parallel.Parallel) -> Bank:
    """Where the episodes of this player are kept, or come from."""
    rollout, folder = config.rollout, Path(config.run.dir) / "bank"
    if rollout.engine == "replay":
        return ReadOnlyBank(Path(rollout.replay))
    return Bank(folder, stamp_of(config), place.player) if rollout.bank else NoBank(folder)


def _machine(place: parallel.Parallel) -> Machine:
    """Who trains on which GPU here; collective."""
    mine = row(launch.machine(), launch.local_rank(), place.is_player, place.data_rank)
    return Machine.of(place.gather_text(mine), place.rank, device.count(place.device))


def _engine(
    config: RunConfig, inputs: Inputs, place: parallel.Parallel, machine: Machine
) -> Engine:
    from rest_mega.rollout.engines import make_engine

    run_dir, rollout = Path(config.run.dir), config.rollout
    sglang = rollout.sglang
    require(
        len(sglang.urls) % place.data_size == 0,
        f"rollout.sglang.urls names {len(sglang.urls)} servers for {place.data_size} replicas: "
        f"give a multiple of {place.data_size}",
    )
    require(
        len(place.players) == 1 or "://" not in sglang.router,
        f"rollout.sglang.router={sglang.router!r} with {len(place.players)} processes that load "
        "the weights of their own servers at times of their own (one on each machine of every "
        "replica): use rollout.sglang.router=start",
    )
    urls = sglang.urls[place.data_rank :: place.data_size]
    return make_engine(
        dataclasses.replace(rollout, sglang=dataclasses.replace(sglang, urls=urls)),
        model_path=config.model.path,
        dtype=config.model.dtype,
        tokenizer=inputs.tokenizer,
        device=place.device,
        folder=run_dir / "servers" / f"player_{place.player}",
        machine=machine,
    )


def _collector(config: RunConfig, inputs: Inputs, engine: Engine, stop: Stop) -> Collector:
    return Collector(
        engine,
        inputs.tokenizer,
        inputs.chat,
        config.tokenizer.dialect,
        config.rollout,
        config.environment,
        stop=stop,
    )
