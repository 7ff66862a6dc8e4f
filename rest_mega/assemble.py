"""RunConfig -> the parts of a run on this rank, every input checked before training starts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rest_mega import launch
from rest_mega.config import ConfigError, RunConfig, one_of, require
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import Tokenizer, load_tokenizer
from rest_mega.dialects import DIALECTS, Region
from rest_mega.environments import load_modules
from rest_mega.records import Prompt
from rest_mega.rewards import Rubric
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Engine
from rest_mega.sync.export import Exporter
from rest_mega.sync.load import load, open_source
from rest_mega.telemetry.reporter import Reporter
from rest_mega.trainer import checkpoint, parallel
from rest_mega.trainer.model import Architecture, read_architecture
from rest_mega.trainer.trainer import Trainer


class Stop:
    """Remembers that SIGINT or SIGTERM asked the run to end; a second signal ends it at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def watch(self) -> None:
        """Take over both signals; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on what the terminal already sent: count a signal once per kind.
        self._asked.set()

    def __call__(self) -> bool:
        """True once a signal came."""
        return self._asked.is_set()


@dataclass
class Inputs:
    """What the config points at, read and checked."""

    architecture: Architecture
    tokenizer: Tokenizer
    chat: ChatFormat
    rubric: Rubric
    train: list[Prompt] = field(default_factory=list)
    held_out: list[Prompt] = field(default_factory=list)


@dataclass
class Session:
    """One rank's parts of a run. Engine and collector exist on leads only."""

    config: RunConfig
    inputs: Inputs
    place: parallel.Parallel
    trainer: Trainer
    exporter: Exporter
    reporter: Reporter
    engine: Engine | None
    collector: Collector | None
    stop: Stop
    resumed: Mapping[str, Any] = field(default_factory=dict)
    """The run state of the checkpoint this run resumed from; empty for a new run."""

    def close(self) -> None:
        """End the engine, the reporter and the process groups."""
        if self.engine is not None:
            self.engine.close()
        self.reporter.close()
        parallel.stop()


def read_inputs(config: RunConfig, *, prompts: bool) -> Inputs:
    """Read model config, tokenizer, environments and prompts; ConfigError says what does not
    fit."""
    config.check_world(launch.world_size())
    require(
        bool(config.model.path), "model.path is empty; point it at a Hugging Face checkpoint folder"
    )
    one_of("tokenizer.dialect", config.tokenizer.dialect, DIALECTS)
    load_modules(config.environment.modules)
    architecture = read_architecture(config.model.path)
    architecture.check(config.parallel)
    tokenizer = load_tokenizer(
        config.tokenizer.path or config.model.path, config.tokenizer.chat_template
    )
    require(
        tokenizer.vocab_size <= architecture.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} tokens, the model {architecture.vocab_size} "
        "embedding rows: "
        "use the tokenizer that belongs to the model",
    )
    inputs = Inputs(architecture, tokenizer, ChatFormat(tokenizer), Rubric(config.rewards))
    if prompts:
        require(
            bool(config.data.train), "data.train is empty; name a JSONL or Parquet file of prompts"
        )
        inputs.train = load_prompts(config.data.train, config.data.system)
    if config.data.held_out:
        inputs.held_out = load_prompts(config.data.held_out, config.data.system)[
            : config.evaluation.prompts
        ]
    return inputs


def open_session(config: RunConfig, inputs: Inputs, *, total_steps: int, rollouts: bool) -> Session:
    """Start the process groups, build or resume the trainer, start the engine; every rank calls it
    together."""
    stop = Stop()
    stop.watch()
    place = parallel.start(config.parallel, config.run.device)
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
    run_dir = Path(config.run.dir)
    resume_from = _run_directory(config, run_dir, place)
    source = open_source(config.model.path, config.model.init, inputs.architecture, config.run.seed)
    load(trainer.modules, source, inputs.architecture, place)
    trainer.prepare()
    resumed = checkpoint.load(trainer, resume_from) if resume_from else {}
    engine = _engine(config, inputs, place) if rollouts and place.is_lead else None
    reporter = Reporter(
        run_dir,
        config.telemetry,
        total_steps=config.run.steps,
        active=place.is_head,
        resume_step=resumed.get("step"),
        region_names=[region.name for region in Region],
        config_tree=config.to_dict(),
    )
    return Session(
        config=config,
        inputs=inputs,
        place=place,
        trainer=trainer,
        exporter=Exporter(trainer.modules, inputs.architecture, place),
        reporter=reporter,
        engine=engine,
        collector=_collector(config, inputs, engine, stop) if engine is not None else None,
        stop=stop,
        resumed=resumed,
    )


def _run_directory(config: RunConfig, run_dir: Path, place: parallel.Parallel) -> Path | None:
    """Make the run directory; the checkpoint to resume from, the same on all ranks."""
    if place.is_head:
        if config.run.fresh and run_dir.exists():
            _move_aside(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    place.barrier()
    found = checkpoint.newest(run_dir)
    if found is not None:
        _check_same_run(config, checkpoint.read_state(found), found)
    return found


def _move_aside(run_dir: Path) -> None:
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    os.replace(run_dir, target)


_FIXED = (
    "model.path",
    "model.init",
    "tokenizer.path",
    "tokenizer.dialect",
    "data.train",
    "run.seed",
    "optimizer.name",
)


def _check_same_run(config: RunConfig, state: Mapping[str, Any], folder: Path) -> None:
    now, then = config.to_dict(), state["config"]
    for key in _FIXED:
        section, name = key.split(".")
        if now[section][name] != then[section][name]:
            raise ConfigError(
                f"{key}={now[section][name]!r} contradicts the checkpoint {folder}, made with "
                f"{then[section][name]!r}; "
                "use another run.dir, or start anew with run.fresh=true"
            )


def _engine(config: RunConfig, inputs: Inputs, place: parallel.Parallel) -> Engine:
    from rest_mega.rollout.engines import make_engine

    return make_engine(
        config.rollout,
        model_path=config.model.path,
        dtype=config.model.dtype,
        tokenizer=inputs.tokenizer,
        device=place.device,
        record_to=Path(config.run.dir) / "rollouts" / f"replica_{place.data_rank}.jsonl",
    )


def _collector(config: RunConfig, inputs: Inputs, engine: Engine, stop: Stop) -> Collector:
    collector = Collector(
        engine,
        inputs.tokenizer,
        inputs.chat,
        config.tokenizer.dialect,
        config.rollout,
        config.environment,
        stop=stop,
    )
    collector.check(inputs.train + inputs.held_out)
    return collector


def run_state(session: Session, **more: Any) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors."""
    return {"config": session.config.to_dict(), **more}


__all__ = ["Inputs", "Session", "Stop", "open_session", "read_inputs", "run_state"]
