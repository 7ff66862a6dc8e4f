"""A checkpoint is the same run at any layout: bit-equal parameters, and the steps that would have
come next."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_mega.config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
from tests.support.models import random_samples, save_model
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "1": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2 vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "tp2 pp2 sp": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
}
ADAM = OptimizerConfig(lr=1e-2, distributed=True, decay="linear", min_lr_ratio=0.1)
PLAIN = dataclasses.replace(ADAM, distributed=False)
MUON = OptimizerConfig(name="muon", lr=1e-2, muon_lr=0.05, distributed=False)
SGD = OptimizerConfig(name="sgd", lr=1e-2, distributed=False)
OPTIMIZERS = {"adam distributed": ADAM, "adam": PLAIN, "muon": MUON, "sgd": SGD}
BEFORE, AFTER = 2, 2
"""Steps taken before and after the checkpoint."""


def _trainer(path: str, parallel: ParallelConfig, optimizer: OptimizerConfig) -> Any:
    from rest_mega.trainer import parallel as places

    return _trainer_at(places.start(parallel, "auto"), path, optimizer)


def _trainer_at(place: Any, path: str, optimizer: OptimizerConfig) -> Any:
    from rest_mega.sync.load import load, open_source
    from rest_mega.trainer.model import read_architecture
    from rest_mega.trainer.trainer import Trainer

    architecture = read_architecture(path)
    trainer = Trainer(
        architecture,
        place,
        model=ModelConfig(path=path),
        optimizer=optimizer,
        loss=LossConfig(),
        packing=PackingConfig(tokens=128),
        temperature=1.0,
        total_steps=10,
    )
    load(trainer.modules, open_source(path, "load", architecture, 0), architecture, place)
    trainer.prepare()
    return trainer


def _exported(trainer: Any) -> dict[str, Any]:
    from rest_mega.sync.export import Exporter

    stream = Exporter(trainer.modules, trainer.architecture, trainer.parallel).stream()
    return {name: tensor.numpy().copy() for name, tensor in stream}


def _steps(trainer: Any, first: int, count: int) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of supervised steps on the samples of each step."""
    place, results = trainer.parallel, []
    for step in range(first, first + count):
        samples = random_samples(8, seed=step)[place.data_rank :: place.data_size]
        result = trainer.supervised_step(trainer.pack(samples)[0])
        results.append((result.loss, result.grad_norm, result.lr))
    return results


def _go_on(trainer: Any) -> dict[str, Any]:
    """What the run holds now, and what comes next."""
    now = _exported(trainer)
    return {"now": now, "steps": _steps(trainer, BEFORE, AFTER), "then": _exported(trainer)}


def _save_now(trainer: Any, run_dir: str, step: int, keep: int = 1) -> Path:
    from rest_mega.trainer.checkpoint import Saver

    saver = Saver(trainer, Path(run_dir), keep)
    saver.begin(step, {"verb": "sft", "config": {}, "note": "kept"})
    folder = saver.finish()
    assert folder is not None
    return folder


def _save(path: str, run_dir: str, parallel: ParallelConfig, optimizer: OptimizerConfig) -> Any:
    trainer = _trainer(path, parallel, optimizer)
    _steps(trainer, 0, BEFORE)
    _save_now(trainer, run_dir, BEFORE)
    return _go_on(trainer)


def _resume(path: str, run_dir: str, parallel: ParallelConfig, optimizer: OptimizerConfig) -> Any:
    from rest_mega.trainer import checkpoint

    trainer = _trainer(path, parallel, optimizer)
    found, problems = checkpoint.find_intact(trainer.parallel, Path(run_dir))
    assert found is not None, problems
    state = checkpoint.load(trainer, found)
    assert (state["step"], state["note"], trainer.optimizer_steps) == (BEFORE, "kept", BEFORE)
    return _go_on(trainer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), "qwen3"))


SAME = [("adam distributed", "dp2"), ("adam", "tp2"), ("muon", "pp2"), ("sgd", "1")]
OTHER = [
    ("adam distributed", "dp2", "tp2"),
    ("adam distributed", "dp2", "pp2 vpp2"),
    ("adam distributed", "tp2 pp2 sp", "1"),
    ("adam", "tp2", "pp2"),
    ("muon", "pp2", "dp2"),
]
"""(optimizer, layout that saves, layout that goes on)."""
GOES_ON = [(name, layout, layout) for name, layout in SAME] + OTHER


def _on_all(run: Any, cases: dict[Any, tuple[Any, ...]], layouts: dict[Any, str]) -> dict[Any, Any]:
    """Rank 0's answer to each case, a case's ranks by its layout: those of one number of ranks run
    one after another in the same processes."""
    answers: dict[Any, Any] = {}
    for world in sorted({LAYOUTS[layout][0] for layout in layouts.values()}):
        mine = [case for case in cases if LAYOUTS[layouts[case]][0] == world]
        lines = [(str(case), *cases[case]) for case in mine]
        answers |= dict(
            zip(mine, run_ranks(in_turn, world, lines, run, timeout=300)[0], strict=True)
        )
    return answers


@pytest.fixture(scope="module")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(optimizer, layout) -> (run directory, what the run that saved it went on to do)."""
    runs = {(name, layout): layout for name, layout, _ in GOES_ON}
    folders = {run: str(tmp_path_factory.mktemp("run")) for run in runs}
    cases = {
        run: (model, folders[run], LAYOUTS[layout][1], OPTIMIZERS[run[0]])
        for run, layout in runs.items()
    }
    answers = _on_all(_save, cases, runs)
    return {run: (folders[run], answers[run]) for run in runs}


@pytest.fixture(scope="module")
def resumed(model: str, saved: Any) -> dict[Any, Any]:
    """Each of GOES_ON -> what the run did that resumed there."""
    layouts = {case: case[2] for case in GOES_ON}
    cases = {
        (name, before, after): (
            model, saved[name, before][0], LAYOUTS[after][1], OPTIMIZERS[name]
        )
        for name, before, after in GOES_ON
    }  # fmt: skip
    return _on_all(_resume, cases, layouts)


def _same(got: dict[str, Any], want: dict[str, Any], *, exact: bool) -> None:
    assert set(got["now"]) == set(want["now"])
    for name, value in want["now"].items():
        np.testing.assert_array_equal(got["now"][name], value, err_msg=name)
    if exact:
        assert got["steps"] == want["steps"]
        for name, value in want["then"].items():
            np.testing.assert_array_equal(got["then"][name], value, err_msg=name)
    else:  # the second step depends on the optimizer's state and schedule
        np.testing.assert_allclose(got["steps"], want["steps"], rtol=1e-5)


@pytest.mark.parametrize(("name", "layout"), SAME)
def test_at_the_same_layout_the_run_goes_on_bit_for_bit(
    name: str, layout: str, saved: Any, resumed: Any
) -> None:
    _same(resumed[name, layout, layout], saved[name, layout][1], exact=True)


@pytest.mark.parametrize(("name", "layout", "other"), OTHER)
def test_at_another_layout_the_same_run_goes_on(
    name: str, layout: str, other: str, saved: Any, resumed: Any
) -> None:
    _same(resumed[name, layout, other], saved[name, layout][1], exact=False)


def _save_at_once(path: str, run_dir: str, optimizer: OptimizerConfig) -> Any:
    """Two steps from the start, and two from a checkpoint made before any step."""
    from rest_mega.trainer import checkpoint

    first = _trainer(path, ParallelConfig(), optimizer)
    folder = _save_now(first, run_dir, 0)
    again = _trainer_at(first.parallel, path, optimizer)
    checkpoint.load(again, folder)
    return _steps(first, 0, 2), _steps(again, 0, 2)


def test_a_checkpoint_before_the_first_step_is_the_start(model: str, tmp_path: Path) -> None:
    cases = []
    for name, optimizer in OPTIMIZERS.items():
        (tmp_path / name).mkdir()
        cases.append((name, model, str(tmp_path / name), optimizer))
    for answers in run_ranks(in_turn, 2, cases, _save_at_once):
        for name, (first, again) in zip(OPTIMIZERS, answers, strict=True):
            assert first == again, name


# ------------------------------------------------------------------ experts

SPREAD = {
    "ep2": (2, ParallelConfig(expert=2)),
    "pp2 (no experts on the first stage)": (2, ParallelConfig(pipeline=2)),
    "tp2 sp": (2, ParallelConfig(tensor=2, sequence=True)),
}
ADAPTED = {name: OPTIMIZERS[name] for name in ("adam distributed", "adam", "muon")}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(path of a mixture of experts, optimizer -> folder of a run saved with its experts spread,
    and what each went on to do)."""
    path = str(save_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe_mixed"))
    folders = {name: str(tmp_path_factory.mktemp("run")) for name in ADAPTED}
    cases = [(n, path, folders[n], SPREAD["ep2"][1], o) for n, o in ADAPTED.items()]
    answers = run_ranks(in_turn, 2, cases, _save)[0]
    return path, folders, dict(zip(ADAPTED, answers, strict=True))


@pytest.mark.parametrize("other", SPREAD)
def test_a_run_with_spread_experts_goes_on_with_others(other: str, mixture: Any) -> None:
    path, folders, went_on = mixture
    world, parallel = SPREAD[other]
    names = [name for name in ADAPTED if not (name == "muon" and parallel.tensor > 1)]
    cases = [(n, path, folders[n], parallel, ADAPTED[n]) for n in names]
    answers = run_ranks(in_turn, world, cases, _resume)[0]
    for name, answer in zip(names, answers, strict=True):
        _same(answer, went_on[name], exact=other == "ep2")


@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_with_all_of_a_layers_experts_on_one_rank_goes_on_with_them_spread(
    stages: int, mixture: Any, tmp_path: Path
) -> None:
    path, parallel = mixture[0], SPREAD["ep2"][1]
    folders = {name: str(tmp_path / name) for name in ADAPTED}
    for folder in folders.values():
        Path(folder).mkdir()
    whole = ParallelConfig(pipeline=stages)
    saves = [(n, path, folders[n], whole, o) for n, o in ADAPTED.items()]
    went_on = run_ranks(in_turn, stages, saves, _save)[0]
    cases = [(n, path, folders[n], parallel, o) for n, o in ADAPTED.items()]
    for want, answer in zip(went_on, run_ranks(in_turn, 2, cases, _resume)[0], strict=True):
        _same(answer, want, exact=False)


# ------------------------------------------------------------------ damage


def _refusals(
    path: str, folders: list[str], parallel: ParallelConfig, optimizer: OptimizerConfig
) -> list[str]:
    from rest_mega.config import ConfigError
    from rest_mega.trainer import checkpoint

    trainer, messages = _trainer(path, parallel, optimizer), []
    for folder in folders:
        try:
            checkpoint.load(trainer, Path(folder))
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


class MakesFolder:
    """Unpickled by making the folder `victim`."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


def _forge(folder: Path, kind: str) -> None:
    """`folder`.victim appears as soon as somebody unpickles the forged part without care."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    forged = MakesFolder(folder.with_suffix(".victim"))
    metadata = FileSystemReader(folder).read_metadata()
    if kind == "forged common.pt":
        torch.save([forged], folder / "common.pt")
    elif kind == "forged .metadata":
        metadata.planner_data = forged
    else:
        at = next(i for i in metadata.storage_data if "_extra_state/shard_3_4" in i.fqn)
        file = folder / metadata.storage_data[at].relative_path
        begin = file.stat().st_size
        with file.open("ab") as stream:
            torch.save([forged], stream)
            length = stream.tell() - begin
        moved = dataclasses.replace(metadata.storage_data[at], offset=begin, length=length)
        metadata.storage_data[at] = moved
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _damage(folder: Path, kind: str) -> None:
    data = sorted(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)[-1]
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif kind == "empty":
        data.write_bytes(b"")
    elif kind == "missing":
        data.unlink()
    else:
        (folder / kind).write_bytes(b"")


DAMAGE = ["truncated", "empty", "missing", ".metadata", "metadata.json", "common.pt"]
FORGED = ["forged .metadata", "forged common.pt", "forged object"]


def test_damaged_and_forged_files_are_refused_on_every_rank(
    model: str, saved: Any, tmp_path: Path
) -> None:
    source = next((Path(saved["adam distributed", "dp2"][0]) / "checkpoints").iterdir())
    kinds = [*DAMAGE, *FORGED]
    folders = [str(shutil.copytree(source, tmp_path / kind)) for kind in kinds]
    for folder, kind in zip(folders, kinds, strict=True):
        (_forge if kind in FORGED else _damage)(Path(folder), kind)
    for messages in run_ranks(_refusals, 2, model, folders, ParallelConfig(), ADAM):
        for folder, kind, message in zip(folders, kinds, messages, strict=True):
            assert folder in message, f"{kind}: {message!r}"
            assert "run.fresh=true" in message
            assert ("posix.mkdir" in message) == (kind in FORGED), message
    assert not list(tmp_path.glob("*.victim")), "what was forged ran"


def test_another_optimizer_is_refused(model: str, saved: Any) -> None:
    source = next((Path(saved["adam distributed", "dp2"][0]) / "checkpoints").iterdir())
    others = ("adam", "muon")
    cases = [(o, model, [str(source)], ParallelConfig(), OPTIMIZERS[o]) for o in others]
    for answers in run_ranks(in_turn, 2, cases, _refusals):
        for (message,) in answers:
            assert str(source) in message


# ------------------------------------------------------------------ the folder of checkpoints


def _save_many(path: str, run_dir: str) -> list[list[str]]:
    trainer, seen = _trainer(path, ParallelConfig(), PLAIN), []
    folder = Path(run_dir) / "checkpoints"
    (folder / "step_00000009.partial-1").mkdir(parents=True)  # of a save that was cut off
    for step in (1, 2, 3, 3):
        _save_now(trainer, run_dir, step, keep=2)
        seen.append(sorted(p.name for p in folder.iterdir()))
    return seen


def test_the_newest_are_kept_and_leftovers_removed(model: str, tmp_path: Path) -> None:
    names = [f"step_{n:08d}" for n in range(4)]
    assert run_ranks(_save_many, 1, model, str(tmp_path))[0] == [
        names[1:2], names[1:3], names[2:4], names[2:4],
    ]  # fmt: skip


# ------------------------------------------------------------------ while training goes on


def _save_while_training(path: str, run_dir: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    from rest_mega.trainer import checkpoint

    trainer = _trainer(path, ParallelConfig(tensor=2), ADAM)
    saver = checkpoint.Saver(trainer, Path(run_dir), 1)
    before = _exported(trainer)
    assert saver.poll() is None, "nothing was begun"
    saver.begin(0, {"verb": "sft", "config": {}})
    _steps(trainer, 0, BEFORE)
    folder = saver.finish()
    assert folder is not None
    assert saver.poll() is None
    assert saver.finish() is None
    checkpoint.load_parameters(trainer, folder)
    return before, _exported(trainer), folder.name


def test_a_checkpoint_holds_the_moment_it_was_begun(model: str, tmp_path: Path) -> None:
    before, loaded, name = run_ranks(_save_while_training, 2, model, str(tmp_path))[0]
    assert name == "step_00000000"
    for key, value in before.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)


def _no_room(path: str, run_dir: str) -> tuple[str, str, list[str]]:
    """A save that succeeds, one for which rank 1 has no room, and what is left."""
    import resource

    from rest_mega.trainer import checkpoint

    trainer = _trainer(path, ParallelConfig(tensor=2), ADAM)
    _save_now(trainer, run_dir, 1, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.parallel.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    message = ""
    try:
        _save_now(trainer, run_dir, 2, keep=2)
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left, problems = checkpoint.find_intact(trainer.parallel, Path(run_dir))
    _save_now(trainer, run_dir, 3, keep=2)
    names = sorted(p.name for p in (Path(run_dir) / "checkpoints").iterdir())
    assert not problems
    assert left is not None
    return message, left.name, names


def test_a_save_without_room_fails_on_every_rank_and_loses_nothing(
    model: str, tmp_path: Path
) -> None:
    for message, left, names in run_ranks(_no_room, 2, model, str(tmp_path)):
        assert "cannot be written; the ones before it are intact. rank 1" in message
        assert f"MiB are free in {tmp_path / 'checkpoints'}" in message
        assert left == "step_00000001"
        assert names == ["step_00000001", "step_00000003"]


def _two_checkpoints(path: str, run_dir: str) -> None:
    trainer = _trainer(path, ParallelConfig(tensor=2), ADAM)
    for step in (1, 2):
        _save_now(trainer, run_dir, step, keep=2)


def _find(run_dirs: list[str]) -> list[tuple[str, list[str]]]:
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.checkpoint import find_intact

    place = places.start(ParallelConfig(), "auto")
    found = [find_intact(place, Path(run_dir)) for run_dir in run_dirs]
    return [(folder.name if folder else "", problems) for folder, problems in found]


def test_after_a_power_cut_the_checkpoint_before_it_is_used(model: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run_ranks(_two_checkpoints, 2, model, str(tmp_path / "run"))
    files = sorted((tmp_path / "run" / "checkpoints" / "step_00000002").iterdir())
    draw = random.Random(0)
    run_dirs, broken = [], []
    for file in files:
        size = file.stat().st_size
        cuts = [None, *sorted({0, 1, size - 1, *(draw.randrange(size) for _ in range(2))})]
        for cut in [*cuts, -draw.randrange(1, size)]:  # None: missing; negative: a byte changed
            copy = shutil.copytree(tmp_path / "run", tmp_path / f"{file.name}{cut}")
            target = copy / "checkpoints" / "step_00000002" / file.name
            data = bytearray(file.read_bytes())
            if cut is None:
                target.unlink()
            elif cut >= 0:
                target.write_bytes(data[:cut])
            else:
                data[cut] ^= 1
                target.write_bytes(data)
            run_dirs.append(str(copy))
            broken.append(str(target))
    for answers in run_ranks(_find, 2, run_dirs):
        for (name, problems), target in zip(answers, broken, strict=True):
            assert name == "step_00000001", target
            (problem,) = problems  # a changed manifest may blame a file that is as it was
            assert (str(Path(target).parent) if "manifest" in target else target) in problem


@pytest.mark.slow
def test_a_file_of_the_newest_cut_off_at_every_byte_leaves_the_one_before(
    model: str, tmp_path: Path
) -> None:
    """Every length of files up to 16 KiB; of larger ones both ends and 4,000 drawn between."""
    from rest_mega.trainer.checkpoint_files import newest

    run_ranks(_two_checkpoints, 2, model, str(tmp_path))
    draw, tried = random.Random(0), 0
    for file in sorted((tmp_path / "checkpoints" / "step_00000002").iterdir()):
        data = file.read_bytes()
        lengths = set(range(len(data)))
        if len(data) > 2**14:
            ends = {*range(1024), *range(len(data) - 1024, len(data))}
            lengths = ends | {draw.randrange(len(data)) for _ in range(4000)}
        for length in sorted(lengths, reverse=True):
            os.truncate(file, length)
            found = newest(tmp_path)
            assert found is not None
            assert found.name == "step_00000001", f"{file.name} cut off at byte {length}"
            tried += 1
        file.write_bytes(data)
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step_00000002"
    assert tried > 10_000
