"""A sweep's YAML file -> its points, every one checked before the first is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rest_mega.cli import read_yaml
from rest_mega.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    one_of,
    require,
)
from rest_mega.planning import GPUS
from rest_mega.trainer.model import read_architecture

MEASURED = "measured"
"""The device is what `benchmarks/train_step.py --speed` measures beside each point."""
LAUNCH = ("{python}", "-m", "torch.distributed.run", "--nproc-per-node", "{per_node}",
          "--master-port", "{port}")  # fmt: skip
"""How the ranks of a point on one node are started."""
WORDS = {"python", "ranks", "nodes", "per_node", "host", "port"}
"""What a launch may name in braces."""


@dataclass(frozen=True)
class Point:
    """One layout of one model on a number of ranks; the key under which its results are kept."""

    series: str
    scaling: str
    model: str
    """Folder of a config.json."""
    ranks: int
    trajectories: int
    """Of a step, over all replicas."""
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    recompute: str = "none"
    layers: str = "auto"
    length: int = 512
    """Tokens of every trajectory; all of them are trained, as the plan assumes."""
    tokens: int = 4096
    """Of a micro-batch."""
    steps: int = 3
    """Timed, after one that is not."""

    @property
    def parallel(self) -> ParallelConfig:
        """Its layout."""
        names = (field.name for field in dataclasses.fields(ParallelConfig))
        return ParallelConfig(**{name: getattr(self, name) for name in names})

    @property
    def layout(self) -> str:
        """Its layout in words: TP2 PP4, or DP2."""
        sizes = {
            "TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual_pipeline,
            "CP": self.context, "EP": self.expert, "DP": self.parallel.data_parallel(self.ranks),
        }  # fmt: skip
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"

    @property
    def name(self) -> str:
        """For logs and messages."""
        return f"{self.series} at {self.ranks} ({Path(self.model).name}, {self.layout})"

    def config(self, dtype: str) -> RunConfig:
        """The run that the plan is asked about: every trajectory as long as the longest."""
        return RunConfig(
            model=ModelConfig(dtype=dtype, recompute=self.recompute, layers=self.layers),
            parallel=self.parallel,
            optimizer=OptimizerConfig(distributed=True),
            rollout=RolloutConfig(
                engine="replay",  # the benchmark samples nothing
                replay=".",
                prompts_per_step=self.trajectories,
                samples_per_prompt=1,
                max_tokens=self.length,
            ),
            packing=PackingConfig(tokens=self.tokens),
        )


@dataclass(frozen=True)
class Sweep:
    """What a file asks for."""

    gpu: str
    """A row of rest_mega/planning/gpus.py, or `measured`."""
    ranks_per_node: int
    launch: tuple[str, ...]
    minutes: float
    """A point that takes longer is ended and counts as failed."""
    points: tuple[Point, ...]


TOP = {"gpu", "ranks_per_node", "launch", "minutes", "models", "settings", "series"}
OWN = {field.name: field for field in dataclasses.fields(Point)}
OWN.pop("series")


def read_sweep(path: Path, gpu: str | None = None) -> Sweep:
    """The sweep of a file, on another `gpu` where one is given; ConfigError tells the value, the
    rule and the remedy."""
    tree = read_yaml(path)
    for key in tree:
        one_of(f"{path}: key", key, sorted(TOP))
    models = _mapping(tree, "models", path)
    folders = {name: str((path.parent / str(folder)).resolve()) for name, folder in models.items()}
    settings = _mapping(tree, "settings", path)
    points = []
    for series, found in _mapping(tree, "series", path).items():
        place = f"{path}: series {series}"
        require(isinstance(found, dict), f"{place} is {found!r}; give it keys, points among them")
        rows = found.get("points")
        require(
            bool(rows) and isinstance(rows, list), f"{place}: points={rows!r}; list one or more"
        )
        shared = {**settings, **{key: value for key, value in found.items() if key != "points"}}
        for number, row in enumerate(rows, start=1):
            here = f"{place}, point {number}"
            require(
                isinstance(row, dict), f"{here} is {row!r}; write it as {{ranks: 2, tensor: 2}}"
            )
            points.append(_point({**shared, **row}, str(series), folders, here))
    require(bool(points), f"{path}: series is empty; name one with points")
    sweep = Sweep(
        gpu=gpu or str(tree.get("gpu", MEASURED)),
        ranks_per_node=_number(tree.get("ranks_per_node", 8), "ranks_per_node", str(path)),
        launch=tuple(str(word) for word in tree.get("launch", LAUNCH)),
        minutes=float(tree.get("minutes", 30)),
        points=tuple(points),
    )
    _check(sweep, "launch" in tree, path)
    return sweep


def _mapping(tree: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = tree.get(key) or {}
    require(isinstance(found, dict), f"{path}: {key}={found!r} must hold keys with values")
    return dict(found)


def _number(value: object, key: str, place: str) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(good, f"{place}: {key}={value!r} must be a whole number, at least 1")
    assert isinstance(value, int)
    return value


def _point(row: dict[str, Any], series: str, folders: dict[str, str], place: str) -> Point:
    for key in row:
        one_of(f"{place}: key", key, sorted(OWN))
    for key in ("scaling", "model", "ranks", "trajectories"):
        require(
            key in row, f"{place}: {key} is missing; set it there, in its series or in settings"
        )
    one_of(f"{place}: scaling", row["scaling"], ("strong", "weak"))
    one_of(f"{place}: model", row["model"], folders)
    for key, value in row.items():
        if OWN[key].type == "int":
            _number(value, key, place)
        elif OWN[key].type == "bool":
            require(isinstance(value, bool), f"{place}: {key}={value!r} must be true or false")
    if row["scaling"] == "weak":  # the batch grows with the ranks
        row = {**row, "trajectories": row["trajectories"] * row["ranks"]}
    point = Point(series=series, **{**row, "model": folders[row["model"]]})
    try:
        replicas = point.parallel.data_parallel(point.ranks)
        require(
            point.trajectories % replicas == 0,
            f"{point.trajectories} trajectories of a step are not a multiple of the {replicas} "
            f"replicas; use a multiple of {replicas}",
        )
        point.config("fp32").check_world(point.ranks)
        read_architecture(point.model, "model").check(point.parallel)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return point


def _check(sweep: Sweep, launched: bool, path: Path) -> None:
    """What concerns the machine and all points together."""
    one_of(f"{path}: gpu", sweep.gpu, (MEASURED, *GPUS))
    require(sweep.minutes > 0, f"{path}: minutes={sweep.minutes} must be positive")
    for word in sweep.launch:
        try:
            word.format(**dict.fromkeys(WORDS, ""))
        except (KeyError, IndexError, ValueError) as error:
            known = ", ".join(f"{{{name}}}" for name in sorted(WORDS))
            raise ConfigError(
                f"{path}: launch has the word {word!r}; braces may hold {known}"
            ) from error
    most = max(point.ranks for point in sweep.points)
    several = most > sweep.ranks_per_node
    require(
        launched or not several,
        f"{path}: {most} ranks take more than one node of ranks_per_node={sweep.ranks_per_node}, "
        "and nothing says how to start ranks on several: set launch (examples/scaling/gpus.yaml "
        "has one for Slurm), or raise ranks_per_node",
    )
    require(
        sweep.gpu != MEASURED or not several,
        f"{path}: gpu=measured knows one link, and {most} ranks take more than one node of "
        f"ranks_per_node={sweep.ranks_per_node}: name a row of rest_mega/planning/gpus.py",
    )
    require(
        len(set(sweep.points)) == len(sweep.points),
        f"{path}: a point stands twice in a series; leave one out (--repeats N measures again)",
    )
