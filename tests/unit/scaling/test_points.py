"""A sweep's file: what it asks for, what is refused, and that the shipped ones can be run."""

from __future__ import annotations

from pathlib import Path

import pytest
from points import LAUNCH, Sweep, read_sweep
from prediction import device, predict
from sweep import launch, options

from rest_mega.config import ConfigError
from rest_mega.planning import GPUS
from rest_mega.trainer.model import read_architecture

SCALING = Path(__file__).parents[3] / "examples" / "scaling"
TINY = SCALING / "models" / "tiny"
HEAD = f"gpu: measured\nranks_per_node: 4\nmodels: {{tiny: {TINY}}}\n"
SETTINGS = "settings: {model: tiny, scaling: strong, trajectories: 8, length: 64, tokens: 128}\n"


def read(tmp_path: Path, text: str) -> Sweep:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path)


def one(points: str, **more: str) -> str:
    keys = "".join(f"{key}: {value}\n" for key, value in more.items())
    return HEAD + keys + SETTINGS + f"series: {{a: {{points: {points}}}}}\n"


def test_a_point_s_keys_go_over_its_series_and_those_over_settings(tmp_path: Path) -> None:
    text = HEAD + SETTINGS
    text += "series: {a: {length: 32, points: [{ranks: 1}, {ranks: 2, tensor: 2, length: 16}]}}"
    first, second = read(tmp_path, text).points
    assert (first.length, first.tokens, first.tensor) == (32, 128, 1)
    assert (second.length, second.tokens, second.tensor) == (16, 128, 2)
    assert first.model == second.model == str(TINY)


def test_the_batch_stays_in_strong_scaling_and_grows_in_weak(tmp_path: Path) -> None:
    points = "[{ranks: 1}, {ranks: 2}, {ranks: 4, scaling: weak, pipeline: 2}]"
    assert [p.trajectories for p in read(tmp_path, one(points)).points] == [8, 8, 32]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (one("[{ranks: 2, tensr: 2}]"), ["series a, point 1", "'tensr'", "nearest: tensor"]),
        (one("[{ranks: 0}]"), ["ranks=0 must be a whole number, at least 1"]),
        (one("[{ranks: two}]"), ["ranks='two' must be a whole number"]),
        (one("[{ranks: 2, sequence: 1}]"), ["sequence=1 must be true or false"]),
        (one("[{tensor: 2}]"), ["point 1: ranks is missing; set it there"]),
        (one("[{ranks: 1, scaling: wide}]"), ["scaling='wide' is not known; choose one of strong"]),
        (one("[{ranks: 1, model: huge}]"), ["model='huge' is not known; choose one of tiny"]),
        (one("[{ranks: 3, tensor: 2}]"), ["world size 3 is not a multiple of tensor 2"]),
        (one("[{ranks: 3, pipeline: 3}]"), ["point 1", "=3 does not divide the model's 4 layers"]),
        (one("[{ranks: 3}]"), ["8 trajectories of a step are not a multiple of the 3 replicas"]),
        (one("[{ranks: 1, length: 256}]"), ["exceeds packing.tokens=128", "raise packing.tokens"]),
        (one("[{ranks: 2, pipeline: 2}, 3]"), ["point 2 is 3; write it as {ranks: 2"]),
        (one("[]"), ["series a: points=[]; list one or more"]),
        (one("[{ranks: 1}, {ranks: 1}]"), ["a point stands twice", "--repeats"]),
        (HEAD + SETTINGS, ["series is empty; name one with points"]),
        (one("[{ranks: 1}]", gpus="8"), ["key='gpus' is not known", "nearest: gpu"]),
        (one("[{ranks: 1}]").replace("measured", "h1"), ["gpu='h1' is not known", "h100-80g"]),
        (one("[{ranks: 1}]", minutes="0"), ["minutes=0", "must be positive"]),
        (one("[{ranks: 1}]", launch="[srun, '{node}']"), ["'{node}'", "{nodes}"]),
        (one("[{ranks: 8}]"), ["8 ranks take more than one node", "set launch"]),
        (one("[{ranks: 8}]", launch="[x]"), ["gpu=measured knows one link", "name a row"]),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_runs(
    tmp_path: Path, text: str, told: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert "sweep.yaml" in str(error.value)
    for words in told:
        assert words in str(error.value)


def test_ranks_on_one_node_and_on_several_are_started_by_the_file_s_words(tmp_path: Path) -> None:
    text = one("[{ranks: 2}, {ranks: 8}]", launch="[go, '{nodes}x{per_node}', '{ranks}']")
    sweep = read(tmp_path, text.replace("measured", "h100-80g"))
    assert [launch(sweep, point) for point in sweep.points] == [
        ["go", "1x2", "2"],
        ["go", "2x4", "8"],
    ]


def test_a_rank_is_given_its_replica_s_share_of_the_batch(tmp_path: Path) -> None:
    sweep = read(tmp_path, one("[{ranks: 4, pipeline: 2, virtual_pipeline: 2}]"))
    assert sweep.launch == LAUNCH
    words = options(sweep, sweep.points[0], tmp_path / "x.json", 0.5)
    assert {"--samples=4", "--pipeline=2", "--virtual-pipeline=2", "--speed", "--quiet=0.5"} <= set(
        words
    )
    assert "--sequence" not in words


def test_every_point_for_gpus_can_be_cut_so_and_fits() -> None:
    sweep = read_sweep(SCALING / "gpus.yaml")
    assert {point.ranks for point in sweep.points} >= {8, 64, 1024}
    for point in sweep.points:
        read_architecture(point.model).check(point.parallel)
        made = predict(point, GPUS[sweep.gpu], "bf16")
        assert made["fits"], f"{point.name}: {made['memory'] / 2**30:.0f} GiB"
        assert 0 < made["mfu"] < 1


def test_the_cpu_s_sweep_has_both_kinds_and_every_way_to_cut_a_model() -> None:
    points = read_sweep(SCALING / "cpu.yaml").points
    assert {point.scaling for point in points} == {"strong", "weak"}
    for size in ("tensor", "pipeline", "virtual_pipeline", "expert"):
        assert any(getattr(point, size) > 1 for point in points), size


def test_ranks_that_share_a_device_are_planned_with_what_each_has_of_it(tmp_path: Path) -> None:
    sweep = read(tmp_path, one("[{ranks: 1}, {ranks: 4}]"))
    speed = {"flops": 4e10, "bandwidth": 1e10, "link": 0.0, "memory": 1e9}
    alone = device(sweep, {"run": {"ranks": 1}, "speed": speed})
    shared = device(sweep, {"run": {"ranks": 4}, "speed": {**speed, "flops": 1e10, "link": 1e30}})
    first, fourth = (
        predict(p, g, "fp32") for p, g in zip(sweep.points, (alone, shared), strict=True)
    )
    # Links of no cost, Adam apart: four ranks with a quarter of a device each are one device.
    assert fourth["tokens_per_second"] == pytest.approx(first["tokens_per_second"], rel=0.1)
    assert first["bubble"] == fourth["bubble"] == 0
