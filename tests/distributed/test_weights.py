"""Weights in and out: at every layout, what was loaded (or drawn) is exported bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ModelConfig, ParallelConfig
from tests.support.models import save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "llama": ("llama", {"num_key_value_heads": 8}),
    "a tensor rank of padding alone": ("qwen3", {"vocab_size": 90, "tie_word_embeddings": False}),
}
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp4": ParallelConfig(tensor=4),
    "pp2": ParallelConfig(pipeline=2),
    "pp2 vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp2 pp2 sp": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "cp2": ParallelConfig(context=2),
}
SEED = 11


def _there_and_back(
    cases: list[tuple[str, str, Any]], parallel: ParallelConfig, folder: str, dtype: str
) -> dict[str, Any]:
    """On players: per model, what is exported after loading and after drawing; also saved."""
    from rest_mega.sync.export import Exporter, save_hf
    from rest_mega.sync.load import load, open_source
    from rest_mega.trainer import model as models
    from rest_mega.trainer import parallel as places

    place = places.start(parallel, "cpu")
    answer: dict[str, Any] = {}
    for name, path, architecture in cases:
        chunks = models.build(architecture, ModelConfig(path=path, dtype=dtype), place)
        exporter = Exporter(chunks, architecture, place)
        answer[name] = {}
        for init in ("random", "load"):
            load(chunks, open_source(path, init, architecture, SEED), architecture, place)
            tensors = {n: t.float().numpy() for n, t in exporter.stream()}
            assert place.is_player or not tensors
            answer[name][init] = tensors
        target = Path(folder) / path.split("/")[-1]
        for _ in range(2):  # the second writes over the first
            save_hf(exporter, architecture, path, target, write=place.is_head)
    places.stop()
    return answer


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe_mixed": ("qwen3_moe_mixed", {}),
    "mixtral": ("mixtral", {}),
}
SPREAD = {
    "ep2 over replicas": (2, ParallelConfig(expert=2)),
    "ep2 in a replica": (2, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "ep4 in part, two leads": (4, ParallelConfig(context=2, expert=4)),
    "ep2 over replicas and stages": (4, ParallelConfig(pipeline=2, expert=2)),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, Any]]:
    """(name, path, architecture), read here: transformers takes every fresh rank seconds to
    import."""
    return _cases(MODELS, tmp_path_factory)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, Any]]:
    """The same of mixtures of experts."""
    return _cases(EXPERTS, tmp_path_factory)


def _cases(
    models: dict[str, tuple[str, dict[str, Any]]], folders: pytest.TempPathFactory
) -> list[tuple[str, str, Any]]:
    from rest_mega.trainer.model import read_architecture

    paths = {
        name: str(save_model(folders.mktemp(family), family, **more))
        for name, (family, more) in models.items()
    }
    return [(name, path, read_architecture(path)) for name, path in paths.items()]


def drawn(a: Any) -> dict[str, np.ndarray]:
    """Every tensor of a random model, read whole, without ranks."""
    from rest_mega.sync.load import RandomSource
    from rest_mega.sync.names import Piece, hf_names, hf_shape

    source = RandomSource(a, SEED)
    return {n: source.read(Piece(n, 0, 0, hf_shape(n, a)[0])).numpy() for n in hf_names(a)}


def stored(path: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(f"{path}/model.safetensors"))


def assert_equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "machines"), [*((layout, 1) for layout in LAYOUTS), ("tp2 pp2 sp", 2)]
)
def test_what_was_loaded_or_drawn_is_exported_bit_for_bit(
    layout: str, machines: int, cases: list[tuple[str, str, Any]], tmp_path: Path
) -> None:
    """To a player on each machine of the replica."""
    parallel = LAYOUTS[layout]
    arguments = cases, parallel, str(tmp_path), "fp32"
    answers = run_ranks(_there_and_back, parallel.replica_size, *arguments, machines=machines)
    for name, path, architecture in cases:
        got = [answer[name] for answer in answers if answer[name]["load"]]
        assert len(got) == machines
        for player in got:
            assert_equal(player["load"], stored(path))
            assert_equal(player["random"], drawn(architecture))
        assert_equal(stored(str(tmp_path / Path(path).name)), stored(path))


@pytest.mark.parametrize("layout", SPREAD)
def test_experts_come_to_every_player_from_wherever_they_are(
    layout: str, mixtures: list[tuple[str, str, Any]], tmp_path: Path
) -> None:
    ranks, parallel = SPREAD[layout]
    answers = run_ranks(_there_and_back, ranks, mixtures, parallel, str(tmp_path), "fp32")
    for name, path, architecture in mixtures:
        players = [answer[name] for answer in answers if answer[name]["load"]]
        assert len(players) == ranks // parallel.replica_size
        for answer in players:
            assert_equal(answer["load"], stored(path))
            assert_equal(answer["random"], drawn(architecture))
        assert_equal(stored(str(tmp_path / Path(path).name)), stored(path))


def test_a_saved_policy_loads_in_transformers_with_equal_tensors(
    cases: list[tuple[str, str, Any]], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run_ranks(_there_and_back, 2, cases, ParallelConfig(tensor=2), str(tmp_path), "bf16")
    for _, path, _ in cases:
        saved = tmp_path / Path(path).name
        assert not list(tmp_path.glob("*.partial"))
        theirs, ours = (AutoModelForCausalLM.from_pretrained(p) for p in (path, saved))
        assert ours.dtype == torch.bfloat16  # what config.json says and the file holds
        want, got = theirs.state_dict(), ours.state_dict()
        assert sorted(got) == sorted(want)
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor.bfloat16()), name
