"""Predicted bytes of checkpoints and exports are those that real ranks write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
from rest_mega.planning.parameters import model_parameters
from rest_mega.planning.storage import checkpoint_bytes
from rest_mega.trainer.model import read_architecture
from tests.support.models import save_model
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

ADAM = OptimizerConfig(lr=1e-3)
PLAIN = OptimizerConfig(lr=1e-3, distributed=False)
MUON = OptimizerConfig(name="muon", distributed=False)
SGD = OptimizerConfig(name="sgd", distributed=False)
TIED, UNTIED, MIXED, THIRDS = "qwen3", "qwen2", "qwen3_moe_mixed", "thirds"
CASES: list[tuple[str, int, dict[str, int], str, OptimizerConfig]] = [
    (TIED, 1, {}, "fp32", ADAM),
    (TIED, 1, {}, "bf16", PLAIN),
    (MIXED, 1, {}, "fp32", MUON),
    (UNTIED, 1, {}, "fp32", SGD),
    (TIED, 2, {"tensor": 2}, "bf16", ADAM),
    (TIED, 2, {"pipeline": 2, "virtual_pipeline": 2}, "fp32", ADAM),
    (UNTIED, 2, {"pipeline": 2}, "bf16", PLAIN),
    (UNTIED, 2, {}, "bf16", ADAM),
    (TIED, 2, {"context": 2}, "fp32", PLAIN),
    (MIXED, 2, {"expert": 2}, "bf16", ADAM),
    (MIXED, 2, {"pipeline": 2}, "fp32", ADAM),
    (THIRDS, 3, {"tensor": 3}, "bf16", ADAM),
    (UNTIED, 4, {"tensor": 2, "pipeline": 2}, "fp32", ADAM),
    (TIED, 4, {"tensor": 2}, "bf16", ADAM),
]
PIECE = 4096
"""Bytes allowed beside the values of each piece that a rank writes: torch.save's archive of it
(about 1.6 KB), its lines in .metadata and, on every rank, what is no tensor."""


def written(path: str, folder: str, sizes: Any, dtype: str, optimizer: Any) -> list[str]:
    """A checkpoint, and an export of the same parameters."""
    from rest_mega.sync.export import Exporter, save_hf
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.checkpoint import Saver
    from rest_mega.trainer.trainer import Trainer

    place = places.start(ParallelConfig(**sizes), "cpu")
    a = read_architecture(path)
    trainer = Trainer(
        a,
        place,
        model=ModelConfig(path=path, dtype=dtype),
        optimizer=optimizer,
        loss=LossConfig(),
        packing=PackingConfig(tokens=128),
        temperature=1.0,
        total_steps=1,
    )
    trainer.prepare()
    saver = Saver(trainer, Path(folder), 1)
    saver.begin(0, {"verb": "sft", "config": {}})
    exporter = Exporter(trainer.modules, a, place)
    save_hf(exporter, a, path, Path(folder) / "hf", write=place.is_head)
    return [str(saver.finish())]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path, Path]]:
    """(model, checkpoint, export) of every case."""
    root = tmp_path_factory.mktemp("models")
    thirds = {"vocab_size": 400, "num_attention_heads": 6, "num_key_value_heads": 3}
    for family in (TIED, UNTIED, MIXED):
        save_model(root / family, family)
    save_model(root / THIRDS, TIED, **thirds)
    runs = [tmp_path_factory.mktemp("run") for _ in CASES]
    for world in sorted({case[1] for case in CASES}):
        lines = [
            (str(number), str(root / family), str(run), sizes, dtype, optimizer)
            for number, (run, (family, ranks, sizes, dtype, optimizer)) in enumerate(
                zip(runs, CASES, strict=True)
            )
            if ranks == world
        ]
        run_ranks(in_turn, world, lines, written, timeout=300)
    return [
        (root / case[0], run / "checkpoints" / "step_00000000", run / "hf")
        for case, run in zip(CASES, runs, strict=True)
    ]


NUMBERS = [pytest.param(n, id=f"{c[0]}-{c[2]}-{c[3]}-{c[4].name}") for n, c in enumerate(CASES)]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_checkpoint_has_the_predicted_bytes(number: int, folders: Any) -> None:
    """Tensors exactly; its files have a bounded number of bytes more for each piece."""
    from torch.distributed.checkpoint import FileSystemReader

    _, ranks, sizes, dtype, optimizer = CASES[number]
    model, folder, _ = folders[number]
    told = checkpoint_bytes(
        read_architecture(str(model)),
        ParallelConfig(**sizes),
        ModelConfig(dtype=dtype),
        optimizer,
    )
    metadata = FileSystemReader(folder).read_metadata()
    tensors = [one for one in metadata.state_dict_metadata.values() if hasattr(one, "size")]
    assert told == sum(math.prod(t.size) * t.properties.dtype.itemsize for t in tensors)
    files = sum(file.stat().st_size for file in folder.iterdir())
    assert told < files < told + PIECE * (len(metadata.storage_data) + ranks)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_export_has_the_predicted_bytes(number: int, folders: Any) -> None:
    model, _, folder = folders[number]
    width = {"fp32": 4, "bf16": 2}[CASES[number][3]]
    found = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        spans = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        found += sum(end - begin for begin, end in spans)
    assert found == width * model_parameters(read_architecture(str(model)))
