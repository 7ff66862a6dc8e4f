"""The quick-start's config takes the same first step at every layout: rollouts, loss, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
CONFIG = "examples/quickstart/config.yaml"
LAYOUTS = {
    "one process": (1, ["parallel.pipeline=1"]),
    "pp2": (2, []),
    "dp2": (2, ["parallel.pipeline=1"]),
    "tp2 pp2": (4, ["parallel.tensor=2"]),
    "pp2 dp2 on two machines": (4, []),
}
MACHINES = {"pp2 dp2 on two machines": 2}
"""A stage on each, and so two players of each replica."""


def _train(words: list[str]) -> int:
    import os

    from rest_mega.cli import main

    os.chdir(REPOSITORY)
    return main(["train", CONFIG, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rest_mega.environments import load_modules

    (module,) = load_modules([str(REPOSITORY / "examples" / "quickstart" / "make_data.py")])
    folder: Path = tmp_path_factory.mktemp("data")
    module.write(folder, seed=0, train=100, held_out=10)
    return folder


def _first_step(name: str, data: Path, run_dir: Path) -> dict[str, Any]:
    world, layout = LAYOUTS[name]
    words = [
        f"run.dir={run_dir}",
        f"data.train={data / 'train.jsonl'}",
        "data.held_out=",
        "run.steps=1",
        "run.export=false",
        "rollout.prompts_per_step=10",
        "rollout.samples_per_prompt=4",
        "telemetry.tensorboard=false",
        *layout,
    ]
    assert run_ranks(_train, world, words, machines=MACHINES.get(name, 1)) == [0] * world
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if "train/loss" in row)


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _first_step("one process", data, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_the_first_step_does_not_depend_on_the_layout(
    name: str, reference: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    got = _first_step(name, data, tmp_path)
    compared = [key for key in reference if not key.startswith(("time/", "tokens/s"))]
    assert {"train/loss", "train/grad_norm", "weight/TOOL_NAME", "reward/mean"} <= set(compared)
    differing = {k: (got[k], reference[k]) for k in compared if got[k] != _about(reference[k], k)}
    assert differing == {}


def _about(value: float, key: str) -> Any:
    # The bound divides by entropies that are next to nothing: their last digits show in it. The gap
    # to the engine is nothing but last digits of log-probs.
    relative = 1e-3 if key == "credit/variance_bound_ratio" else 1e-5
    return pytest.approx(value, rel=relative, abs=1e-5 if "gap" in key else 1e-6)


def test_the_engine_samples_with_the_trainers_policy(reference: dict[str, Any]) -> None:
    assert reference["policy/rollout_gap_max"] < 1e-4
    assert reference["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
