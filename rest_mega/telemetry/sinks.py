"""Sinks: where a run's rows and events go. Files, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rest_mega import launch
from rest_mega.config import ConfigError, TelemetryConfig, require
from rest_mega.telemetry.rows import EVENTS, METRICS, TRAJECTORIES, WRITTEN, append

Row = Mapping[str, Any]
"""Metric -> finite number, or None."""

TRACKING = "tracking.json"
"""In the run directory: under which id a tracker knows the run."""


class Sink:
    """The protocol; what a sink does not care for does nothing."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def step(self, step: int, row: Row, trajectories: Sequence[Mapping[str, Any]] = ()) -> None:
        """A training step or an evaluation is over."""

    def event(self, kind: str, text: str) -> None:
        """Something notable happened."""

    def close(self) -> None:
        """Nothing more comes."""


class Files(Sink):
    """RUN/metrics.jsonl, trajectories.jsonl, events.jsonl."""

    def __init__(self, run_dir: Path, trajectories: int) -> None:
        """`trajectories`: kept per step, at most."""
        self._dir, self._most = run_dir, trajectories

    def step(self, step: int, row: Row, trajectories: Sequence[Mapping[str, Any]] = ()) -> None:
        """A line of metrics, and one per trajectory."""
        append(self._dir / METRICS, [{"step": step, **row, WRITTEN: time.time()}])
        append(self._dir / TRAJECTORIES, trajectories[: self._most])

    def event(self, kind: str, text: str) -> None:
        """A line."""
        append(self._dir / EVENTS, [{"time": time.time(), "kind": kind, "text": text}])


class Tracker(Sink):
    """Rows go to `log(step, numbers)`, the end to `end()`."""

    def __init__(self, log: Callable[[int, dict[str, float]], None], end: Callable[[], None]):
        self._log, self.close = log, end  # type: ignore[method-assign]

    def step(self, step: int, row: Row, trajectories: Sequence[Mapping[str, Any]] = ()) -> None:
        """What is a number."""
        self._log(step, {name: float(value) for name, value in row.items() if value is not None})


# ------------------------------------------------------------------ trackers


def check(config: TelemetryConfig) -> None:
    """ConfigError where a tracker is asked for whose package is not installed."""
    for key in ("wandb", "mlflow"):
        require(
            not getattr(config, key) or importlib.util.find_spec(key) is not None,
            f"telemetry.{key}={getattr(config, key)!r} needs the package {key}: install "
            "rest-mega[tracking], or leave the key out",
        )


def open_trackers(
    run_dir: Path, config: TelemetryConfig, tree: Mapping[str, Any], resume_step: int | None
) -> dict[str, Sink]:
    """The trackers that the config asks for, by name. A resumed run goes on under its old id.

    ConfigError where one cannot be reached.
    """
    makers = {
        "tensorboard": (config.tensorboard, _tensorboard),
        "wandb": (bool(config.wandb), _wandb),
        "mlflow": (bool(config.mlflow), _mlflow),
    }
    ids: dict[str, str] = {}
    if resume_step is not None and (run_dir / TRACKING).is_file():
        ids = json.loads((run_dir / TRACKING).read_text(encoding="utf-8"))
    opened: dict[str, Sink] = {}
    for name, (asked, make) in makers.items():
        if asked:
            opened[name] = make(run_dir, config, tree, resume_step, ids)
    (run_dir / TRACKING).write_text(json.dumps(ids), encoding="utf-8")
    return opened


def _tensorboard(
    run_dir: Path, config: TelemetryConfig, tree: Any, step: int | None, ids: Any
) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # A new run in an old directory purges everything that was written there before.
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0 if step is None else step + 1)

    def log(step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(
    run_dir: Path, config: TelemetryConfig, tree: Any, step: int | None, ids: dict[str, str]
) -> Sink:
    """Offline, its files are in RUN/wandb, for `wandb sync`."""
    import wandb

    ids.setdefault("wandb", secrets.token_hex(8))
    try:
        run = wandb.init(
            mode=cast(Any, config.wandb),
            dir=str(run_dir.resolve()),
            project=config.project,
            name=config.name or run_dir.name,
            id=ids["wandb"],
            resume="allow",
            config=dict(tree),
            settings=wandb.Settings(console="off", silent=True),
        )
    except (wandb.errors.Error, OSError) as error:
        raise ConfigError(
            f"telemetry.wandb={config.wandb}: {error}; log in with `wandb login`, or set "
            "telemetry.wandb=offline"
        ) from error
    # Its own counter refuses a second row of a step, and those of a run that has gone back.
    run.define_metric("*", step_metric="step")

    def end() -> None:
        run.finish()
        wandb.teardown()  # its writer is another process; this waits until all is on disk

    return Tracker(lambda step, row: run.log({"step": step, **row}), end)


def _mlflow(
    run_dir: Path, config: TelemetryConfig, tree: Any, step: int | None, ids: dict[str, str]
) -> Sink:
    """`telemetry.mlflow` is a tracking server's URL, or a folder."""
    if "://" not in config.mlflow:
        launch.allow_mlflow_files()
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    address = config.mlflow if "://" in config.mlflow else Path(config.mlflow).resolve().as_uri()
    try:
        client = MlflowClient(address)
        if "mlflow" not in ids:
            found = client.get_experiment_by_name(config.project)
            experiment = found.experiment_id if found else client.create_experiment(config.project)
            run = client.create_run(experiment, run_name=config.name or run_dir.name)
            ids["mlflow"] = run.info.run_id
            params = [Param(name, json.dumps(value)[:500]) for name, value in leaves(tree)]
            for i in range(0, len(params), 100):  # the server's limit
                client.log_batch(ids["mlflow"], params=params[i : i + 100])
        client.update_run(ids["mlflow"], status="RUNNING")
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"telemetry.mlflow={config.mlflow!r}: {error}; name a folder or the URL of a server "
            "that answers"
        ) from error

    def log(step: int, row: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in row.items()]
        client.log_batch(ids["mlflow"], metrics=metrics)

    return Tracker(log, lambda: client.set_terminated(ids["mlflow"]))


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(section.key, value) of a nested config."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """The row with None for what is not a finite number."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
