"""Session: one rank's parts of a run, and what every kind of training does between its steps."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.config import RunConfig, one_of
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.evaluation.benchmark import evaluate_benchmark
from rest_mega.evaluation.held_out import evaluate
from rest_mega.evaluation.play import Benchmark, rollout_of, settings_of
from rest_mega.records import Prompt
from rest_mega.rewards import Rubric
from rest_mega.rollout.bank import Bank, as_lines
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Engine, Sampling
from rest_mega.rollout.episode import Row
from rest_mega.run_directory import RunDirectory
from rest_mega.stop import Stop
from rest_mega.sync.export import Exporter, save_hf
from rest_mega.sync.load import Source
from rest_mega.sync.names import hf_names, hf_shape
from rest_mega.sync.publish import publish
from rest_mega.telemetry.profiler import merge
from rest_mega.telemetry.report import summary_line, write_report
from rest_mega.telemetry.reporter import Reporter
from rest_mega.trainer import device, parallel
from rest_mega.trainer.checkpoint import Saver
from rest_mega.trainer.checkpoint_files import step_of
from rest_mega.trainer.model import Architecture
from rest_mega.trainer.trainer import Trainer
from rest_mega.watchdog import Watchdog


@dataclass
class Inputs:
    """What the config points at, read and checked."""

    architecture: Architecture
    source: Source
    """The weights to start from."""
    reference: Source | None
    """Those of the reference policy; None where nothing is compared with it."""
    tokenizer: Tokenizer
    chat: ChatFormat
    rubric: Rubric
    train: list[Prompt] = field(default_factory=list)
    held_out: list[Prompt] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)

    @property
    def evaluated(self) -> bool:
        """There is something to evaluate on."""
        return bool(self.held_out or self.benchmarks)


@dataclass
class Session:
    """One rank's parts of a run. Engine and collector exist on players only; the methods are called
    by all ranks together."""

    config: RunConfig
    verb: str
    inputs: Inputs
    place: parallel.Parallel
    trainer: Trainer
    saver: Saver
    exporter: Exporter
    reporter: Reporter
    engine: Engine | None
    collector: Collector | None
    bank: Bank | None
    """Of players, where rollouts are trained on."""
    stop: Stop
    watchdog: Watchdog
    directory: RunDirectory | None
    """Held by the head of a run that writes."""
    resumed: Mapping[str, Any] = field(default_factory=dict)
    """The run state of the checkpoint this run resumed from; empty for a new run."""
    carried: Sequence[Row] = ()
    """The episodes that it had not finished; of all players, on players."""

    def __post_init__(self) -> None:
        self._published = -1
        self._evaluated = int(self.resumed.get("evaluated", -1))
        self._saved = (int(self.resumed.get("step", -1)), self._evaluated)
        self._best: dict[str, float] | None = self.resumed.get("best")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named part of the run: timed by the reporter, under its deadline."""
        with self.reporter.phase(name), self.watchdog.phase(name):
            yield

    def announce(self, step: int) -> None:
        """Say what begins: the model, the layout, where the run stands."""
        a, sizes, run = self.inputs.architecture, self.config.parallel, self.config.run
        count = sum(math.prod(hf_shape(name, a)) for name in hf_names(a))
        size = f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.1f} B"
        layout = f"TP {sizes.tensor} x PP {sizes.pipeline} x CP {sizes.context}"
        last = run.last_step
        todo = f"steps {step + 1} to {last}" if step < last else f"all {step} steps done"
        self.reporter.event(
            "start",
            f"{self.verb}: {size} parameters from {self.config.model.path}, {layout} x DP "
            f"{self.place.data_size}, {todo} in {run.dir}",
        )

    def publish(self, step: int) -> None:
        """Load the parameters into the engine, as version `step`."""
        with self.phase("publish"):
            if self.config.rollout.sglang.colocate:
                device.give_back(self.place.device)
                self.place.barrier()
            publish(self.exporter, self.engine, step)
        self._published = step

    def rest(self) -> None:
        """Nothing is sampled before the next `publish`: servers that share GPUs with ranks free
        their memory before any of them goes on."""
        if self.config.rollout.sglang.colocate:
            if self.engine is not None:
                self.engine.rest()
            self.place.barrier()

    def evaluate(self, step: int, *, first: bool) -> bool:
        """Evaluate after `step` where it is due (`first`: also before any step) and not yet done.

        False when a stop was asked for meanwhile: the run that resumes evaluates anew.
        """
        due = self._due(self.config.evaluation.every, step) or (first and step == 0)
        if not self.inputs.evaluated or not due or self._evaluated == step:
            return True
        if self._published != step:
            self.publish(step)
        with self.phase("evaluate"):
            metrics = self.measure() if self.inputs.held_out else {}
            if self.inputs.held_out and not metrics:
                return False
            for benchmark in self.inputs.benchmarks:
                folder = Path(self.config.run.dir) / "evaluation" / f"step_{step}"
                if not (
                    found := self.run_benchmark(
                        benchmark, folder / benchmark.suite.name, f"step {step}"
                    )
                ):
                    return False
                metrics |= found
        self.reporter.step(step, metrics)
        self._evaluated = step
        self._keep_best(step, metrics)
        return True

    def run_benchmark(self, benchmark: Benchmark, folder: Path, weights: str) -> dict[str, float]:
        """Metrics of a benchmark with the published parameters (called `weights` in its files, in
        `folder`); empty when a stop was asked for.

        In training what the folder had is drawn anew: it may be of other weights.
        """
        config, inputs, alone = self.config, self.inputs, self.verb == "eval"
        limits = rollout_of(benchmark.suite, config.evaluation, config.rollout)
        dialect = benchmark.suite.dialect or config.tokenizer.dialect
        if not alone:
            if self.place.is_head:
                shutil.rmtree(folder, ignore_errors=True)
            self.place.barrier()
        collector = None
        if self.engine is not None:
            collector = Collector(
                self.engine, inputs.tokenizer, inputs.chat, dialect, limits, config.environment,
                stop=self.stop,
            )  # fmt: skip
        return evaluate_benchmark(
            self.place,
            collector,
            benchmark,
            config.evaluation,
            limits,
            folder,
            settings_of(config, benchmark, inputs.tokenizer.chat_template, weights),
            show=alone,
        )

    def _keep_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export the weights where they are the best so far by `evaluation.best`."""
        name = self.config.evaluation.best
        if not name:
            return
        known = {key.removeprefix("eval/"): value for key, value in metrics.items()}
        one_of("evaluation.best", name, known)
        if self._best is not None and known[name] <= self._best["value"]:
            return
        self._best = {"step": step, "value": known[name]}
        self._export(Path(self.config.run.dir) / "best")
        self.reporter.event("best", f"step {step} is the best so far: {name} {known[name]:.4f}")

    def measure(self) -> dict[str, float]:
        """Held-out metrics of the published parameters, sampled and (evaluation.greedy) greedy;
        empty when a stop was asked for."""
        config = self.config
        modes = {"sampled": Sampling(config.rollout.temperature)}
        if config.evaluation.greedy:
            modes["greedy"] = Sampling(greedy=True)
        inputs = self.inputs
        return evaluate(
            self.place, self.collector, inputs.rubric, inputs.held_out, modes, config.run.seed
        )

    def save(self, step: int, episodes: Callable[[], Sequence[Row]] = tuple, **state: Any) -> None:
        """Begin the checkpoint of `step` with the loop's own `state`, unless it is there already.

        `episodes()`: those that this player has begun and not finished.
        """
        if self._saved == (step, self._evaluated):
            return
        whole = {
            "verb": self.verb,
            "config": self.config.to_dict(),
            "evaluated": self._evaluated,
            "best": self._best,
            **state,
        }
        with self.phase("save"):
            self._tell_saved(self.saver.begin(step, whole, as_lines(episodes())))
            if not self.config.run.async_save:
                self._tell_saved(self.saver.finish())
        self._saved = (step, self._evaluated)

    def save_where_due(self, step: int, **state: Any) -> None:
        """Export and save after every `run.export_every` and `run.save_every` steps and after the
        last one; called once per step."""
        with self.phase("save"):
            self._tell_saved(self.saver.poll())
        run = self.config.run
        if run.export_every > 0 and step % run.export_every == 0 and step < run.steps:
            self._export(Path(run.dir) / f"hf_step_{step}")
        if self._due(run.save_every, step):
            self.save(step, **state)

    def keep(self, step: int, **state: Any) -> None:
        """Save `step`, and wait until the checkpoint is whole."""
        self.save(step, **state)
        self._finish_saving()

    def _finish_saving(self) -> None:
        with self.phase("save"):
            self._tell_saved(self.saver.finish())

    def _tell_saved(self, folder: Path | None) -> None:
        if folder is None:
            return
        self.reporter.event("checkpoint", f"saved {folder}")
        step = step_of(folder)
        if self.bank is not None and not self.config.rollout.record and step is not None:
            self.bank.prune(step)

    def interrupt(self, step: int, **state: Any) -> int:
        """Save what was reached; returns the exit code of an interrupted run."""
        self.keep(step, **state)
        code = self.interrupted()
        self.reporter.event(
            "interrupted",
            f"interrupted after step {step} by {signal.Signals(code - 128).name}; the same command "
            "resumes there",
        )
        return code

    def interrupted(self) -> int:
        """Exit code of a run that a signal ended: 128 + its number, the same on every rank (130
        Ctrl-C, 143 SIGTERM, as of a preempted job)."""
        return 128 + int(self.place.maximum(np.array([float(self.stop.signal)]))[0])

    def finish(self) -> int:
        """Export, report, and the one line that says what came of it; returns the exit code 0."""
        run_dir = Path(self.config.run.dir)
        self._finish_saving()
        if self.config.run.export:
            self._export(run_dir / "hf")
        self.place.barrier()  # every rank has written what it saw
        if self.place.is_head:
            merge(run_dir)
            write_report(run_dir)
            self.reporter.event("done", summary_line(run_dir))
        self.place.barrier()
        return 0

    def _export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint; all ranks together."""
        inputs, config, head = self.inputs, self.config, self.place.is_head
        with self.phase("save"):
            save_hf(
                self.exporter,
                inputs.architecture,
                config.model.path,
                folder,
                write=head,
                tokenizer=config.tokenizer.path,
            )

    def _due(self, every: int, step: int) -> bool:
        return step == self.config.run.last_step or (every > 0 and step > 0 and step % every == 0)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                self.watchdog.tell(error)
        finally:
            self.close()

    def close(self) -> None:
        """End the engine, the reporter and the process groups."""
        self.watchdog.close()
        self.stop.release()
        if self.engine is not None:
            self.engine.close()
        self.reporter.close()
        parallel.stop()
        if self.directory is not None:
            self.directory.release()
