"""Checkpoints: shards read as one file, and an error tells what is wrong and its remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rest_mega.config import ConfigError
from rest_mega.sync.load import RandomSource, SafetensorsSource, open_source
from rest_mega.sync.names import Piece, hf_names, hf_shape
from rest_mega.trainer.model import Architecture, read_architecture
from tests.support.models import save_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", num_hidden_layers=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def whole(name: str, a: Architecture) -> Piece:
    return Piece(name, 0, 0, hf_shape(name, a)[0])


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut_in_two(folder: Path) -> dict[str, str]:
    """Replace model.safetensors by two shards and an index; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)]
    where = {name: names[n % 2] for n, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return where


def test_shards_read_as_the_single_file_whole_and_in_slices(folder: Path) -> None:
    a = read_architecture(str(folder))
    tensors = load_file(folder / "model.safetensors")
    single = SafetensorsSource(str(folder), a)
    cut_in_two(folder)
    sharded = SafetensorsSource(str(folder), a)
    assert sorted(tensors) == sorted(hf_names(a))
    for name, tensor in tensors.items():
        parts = [whole(name, a), Piece(name, 0, 1, 3)]
        parts += [Piece(name, 1, 2, 5)] if tensor.ndim == 2 else []
        for part in parts:
            want = tensor.narrow(part.axis, part.start, part.stop - part.start)
            assert torch.equal(single.read(part), want)
            assert torch.equal(sharded.read(part), want)


def test_a_tied_model_may_carry_the_head_it_does_not_need(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3", num_hidden_layers=1)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    a = read_architecture(str(folder))
    assert "lm_head.weight" not in hf_names(a)
    SafetensorsSource(str(folder), a)


def test_an_empty_folder_tells_what_was_looked_for_and_how_to_draw_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor .*model\.init=random"):
        open_source(str(folder), "load", read_architecture(str(folder)), 0)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=rf"{file}.* truncated .*fetch it anew"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda t: t.pop(NORM))
    with pytest.raises(ConfigError, match=rf"missing \['{NORM}'\] \(1 in all\).*belong together"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.mlp.router.weight": torch.zeros(2)}))
    with pytest.raises(ConfigError, match=r"unexpected \['model\.layers\.0\.mlp\.router\.weight'"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    edit(folder, lambda t: t.update({NORM: torch.zeros(63)}))
    with pytest.raises(ConfigError, match=rf"{NORM} has shape \(63,\), .* asks for \(64,\)"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


def test_an_index_that_names_a_missing_shard_tells_which(folder: Path) -> None:
    shard = folder / sorted(set(cut_in_two(folder).values()))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"{shard} is missing.*fetch it anew"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(folder: Path, text: str) -> None:
    cut_in_two(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ConfigError, match=rf"{index} is no safetensors index.*fetch it anew"):
        SafetensorsSource(str(folder), read_architecture(str(folder)))


def test_drawn_weights_depend_on_seed_and_name_alone(original: Path) -> None:
    a = read_architecture(str(original))
    source, again, other = RandomSource(a, 1), RandomSource(a, 1), RandomSource(a, 2)
    seen = []
    for name in reversed(hf_names(a)):  # in another order than a model reads them
        tensor = source.read(whole(name, a))
        assert torch.equal(again.read(Piece(name, 0, 5, 9)), tensor[5:9])
        if name.endswith(("norm.weight", "bias")):
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
        else:
            assert not torch.equal(other.read(whole(name, a)), tensor)
            seen.append(tensor.flatten()[:4])
    assert len(torch.stack(seen).unique(dim=0)) == len(seen)


def test_drawn_projections_into_the_residual_stream_are_narrower(original: Path) -> None:
    a = read_architecture(str(original))
    source = RandomSource(a, 0)
    want = {"mlp.up_proj": 0.02, "mlp.down_proj": 0.01, "self_attn.o_proj": 0.01}
    for name, std in want.items():  # two layers: 0.02 / sqrt(4)
        tensor = source.read(whole(f"model.layers.0.{name}.weight", a))
        assert float(tensor.std()) == pytest.approx(std, rel=0.05)
