"""Conversion is exact: Hugging Face files and Megatron checkpoints hold the same bits, at every
layout, for every family, and damage is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rest_mega.config import ConfigError, ModelConfig, ParallelConfig
from rest_mega.sync import manifest
from tests.support.models import save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tied": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "vocab_size": 129}),
    "qwen2 with one KV head": ("qwen2", {"num_key_value_heads": 1}),
    "llama with llama3 rope": ("llama", {}),
    "llama with linear rope, one KV head per head": ("llama_linear", {"num_key_value_heads": 8}),
}
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "tp2 pp2 sp": ParallelConfig(tensor=2, pipeline=2, sequence=True),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def convert_words(*lines: list[str]) -> list[tuple[int, str]]:
    """(exit code, what was written) of `rest-mega convert` for each line of words."""
    from rest_mega.cli import main

    answers = []
    for words in lines:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(["convert", "--quiet", *words])
        answers.append((code, said.getvalue()))
    return answers


def run_words(*lines: list[Any]) -> list[tuple[int, str]]:
    return run_ranks(convert_words, 1, *[[str(word) for word in words] for words in lines])[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/NAME, and what the command line made of it: td/NAME and back/NAME."""
    root = tmp_path_factory.mktemp("convert")
    lines = []
    for name, (family, more) in MODELS.items():
        source = save_model(root / "hf" / name, family, **more)
        (source / "chat_template.jinja").write_text("{{ messages }}")
        lines.append([source, root / "td" / name, "--logits"])
        lines.append([root / "td" / name, root / "back" / name])
    for (code, said), words in zip(run_words(*lines), lines, strict=True):
        assert code == 0, said
        assert "read back bit for bit" in said
        assert ("logits agree with transformers" in said) == ("--logits" in words)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_and_side_file_is_the_same(root: Path, name: str) -> None:
    before, after = root / "hf" / name, root / "back" / name
    assert_same(tensors(after), tensors(before))
    assert (after / "chat_template.jinja").read_text() == "{{ messages }}"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (before, after)]
    assert configs[0] == configs[1]


def _load_and_export(paths: list[str], parallel: ParallelConfig) -> list[dict[str, np.ndarray]]:
    from rest_mega.sync.export import Exporter
    from rest_mega.sync.load import load, open_source
    from rest_mega.trainer import model as models
    from rest_mega.trainer import parallel as places

    place, answers = places.start(parallel, "cpu"), []
    for path in paths:
        a = models.read_architecture(path)
        chunks = models.build(a, ModelConfig(), place)
        load(chunks, open_source(path, "load", a, 0), a, place)
        answers.append({n: t.numpy() for n, t in Exporter(chunks, a, place).stream()})
    places.stop()
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_loads_through_mcore_at_every_layout(
    root: Path, layout: str
) -> None:
    parallel = LAYOUTS[layout]
    paths = [str(root / "td" / name) for name in MODELS]
    loaded = run_ranks(_load_and_export, parallel.replica_size, paths, parallel)[0]
    for name, found in zip(MODELS, loaded, strict=True):
        whole = {n: torch.from_numpy(array) for n, array in found.items()}
        assert_same(whole, tensors(root / "hf" / name))


def _train_and_save(path: str, folder: str, sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Save one step's checkpoint, optimizer included; the parameters at that time."""
    from rest_mega.config import OptimizerConfig
    from rest_mega.sync.export import Exporter
    from rest_mega.trainer import checkpoint
    from rest_mega.trainer.model import read_architecture
    from tests.support.bench import Bench
    from tests.support.models import random_samples

    bench = Bench((path, read_architecture(path)), **sizes)
    trainer = bench.trainer(OptimizerConfig(lr=0.01))
    bench.step(trainer, random_samples())
    state = {"verb": "train", "config": {"model": {"path": path}}}
    (Path(folder) / "checkpoints").mkdir(parents=True, exist_ok=True)
    saver = checkpoint.Saver(trainer, Path(folder), 1)
    saver.begin(1, state)
    saver.finish()
    exporter = Exporter(trainer.modules, bench.architecture, bench.place)
    return {n: t.numpy() for n, t in exporter.stream()}


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}])
def test_a_runs_checkpoint_of_any_layout_becomes_the_policy_in_hugging_face_form(
    root: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    ranks = ParallelConfig(**sizes).replica_size
    source = root / "hf" / "qwen3 tied"
    want = run_ranks(_train_and_save, ranks, str(source), str(tmp_path / "run"), sizes)[0]
    ((code, said),) = run_words([tmp_path / "run", tmp_path / "hf", "--logits"])
    assert code == 0, said
    found = tensors(tmp_path / "hf")
    assert_same(found, {name: torch.from_numpy(array) for name, array in want.items()})
    trained = load_file(source / "model.safetensors")
    assert any(not torch.equal(found[name], trained[name]) for name in trained)


def test_a_chosen_dtype_is_torchs_rounding(root: Path, tmp_path: Path) -> None:
    source = root / "hf" / "qwen3 untied"
    answers = run_words(
        [source, tmp_path / "td", "--dtype", "bf16"], [tmp_path / "td", tmp_path / "hf"]
    )
    assert [code for code, _ in answers] == [0, 0], answers
    want = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(source).items()}
    assert_same(tensors(tmp_path / "hf"), want)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_beyond_the_chosen_dtype_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(root / "hf" / "qwen3 tied", tmp_path / "hf"))
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"][3] = 1e6
    save_file(held, source / "model.safetensors")
    ((code, said),) = run_words([source, tmp_path / "td", "--dtype", "fp16"])
    assert code == 2
    assert "model.norm.weight has values beyond the range of float16 (up to 1e+06)" in said
    assert not list(tmp_path.glob("td*"))


def _convert_with_little_room(limit: int, *lines: list[str]) -> list[tuple[int, str]]:
    """As on a disk whose files end at `limit` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return convert_words(*lines)


def test_a_disk_without_room_is_said_before_anything_is_moved(root: Path, tmp_path: Path) -> None:
    sources = [root / kind / "qwen3 tied" for kind in ("hf", "td")]
    lines = [[str(source), str(tmp_path / source.parent.name)] for source in sources]
    for code, said in run_ranks(_convert_with_little_room, 1, 20_000, *lines)[0]:
        assert code == 2, said
        assert re.search(r"there is no room for \S+/(hf|td) \(.*\); make some", said), said
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ anything at all


def _any_model(folder: str, examples: int) -> int:
    """Random configurations, dtypes and cuts into files, there and back; how many were tried."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from rest_mega.sync import byte_ranges, convert
    from rest_mega.sync.names import hf_names, hf_shape
    from rest_mega.sync.safetensors_files import Entry, plan, write_index
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.model import read_architecture

    place, tried = places.start(ParallelConfig(), "cpu"), 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        kv_heads=st.integers(1, 4),
        queries=st.integers(1, 3),
        head_dim=st.sampled_from([2, 4, 6]),
        width=st.integers(1, 6),
        ffn=st.integers(1, 40),
        layers=st.integers(1, 4),
        vocab=st.integers(1, 300),
        tied=st.booleans(),
        dtypes=st.lists(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=2
        ),
        block=st.integers(1, 5000),
        item=st.integers(1, 5000),
        limit=st.integers(500, 100_000),
    )
    def there_and_back(**case: Any) -> None:
        nonlocal tried
        tried += 1
        byte_ranges.BLOCK_BYTES, convert.ITEM_BYTES = case["block"], case["item"]
        base = Path(folder) / str(tried)
        base.mkdir()
        config = {
            "model_type": case["family"],
            "hidden_size": case["kv_heads"] * case["queries"] * case["width"],
            "intermediate_size": case["ffn"],
            "num_hidden_layers": case["layers"],
            "num_attention_heads": case["kv_heads"] * case["queries"],
            "num_key_value_heads": case["kv_heads"],
            "head_dim": case["head_dim"],
            "vocab_size": case["vocab"],
            "tie_word_embeddings": case["tied"],
            "sliding_window": None,
        }
        source = base / "hf"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        a = read_architecture(str(source))
        generator = torch.Generator().manual_seed(tried)
        widest = max(case["dtypes"], key=lambda dtype: dtype.itemsize)
        if len(set(case["dtypes"])) > 1:
            widest = torch.float32
        held = {
            name: torch.randn(hf_shape(name, a), generator=generator).to(
                case["dtypes"][number % len(case["dtypes"])]
            )
            for number, name in enumerate(hf_names(a))
        }
        files = plan([Entry(n, tuple(t.shape), t.dtype) for n, t in held.items()], case["limit"])
        for file, group in files.items():
            save_file({e.name: held[e.name] for e in group}, source / file)
        write_index(source, {f: [e.name for e in group] for f, group in files.items()}, 0)
        convert.convert(convert.prepare(source, base / "td", quiet=True), place)
        assert convert.check(base / "td", place, quiet=True) == len(held)
        job = convert.prepare(base / "td", base / "back", quiet=True, shard_bytes=case["limit"])
        convert.convert(job, place)
        back = tensors(base / "back")
        assert back.keys() == held.keys()
        for name, tensor in held.items():
            assert back[name].dtype in (tensor.dtype, widest), name
            assert torch.equal(back[name], tensor.to(back[name].dtype)), name
        shutil.rmtree(base)

    there_and_back()
    places.stop()
    return tried


def test_any_configuration_goes_there_and_back(tmp_path: Path) -> None:
    assert run_ranks(_any_model, 1, str(tmp_path), 20)[0] >= 20


# ------------------------------------------------------------------ damage


def test_damage_is_refused_with_the_remedy(root: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(root / "td" / "qwen3 tied", tmp_path / name))

    flipped, cut, other, bare = copy("flipped"), copy("cut"), copy("other"), copy("bare")
    older = copy("older")
    text = (older / "conversion.json").read_text()
    known = json.loads(text) | {"checksum": "crc32"}
    known["digest"] = manifest._digest({k: v for k, v in known.items() if k != "digest"})
    (older / "conversion.json").write_text(json.dumps(known))
    data = bytearray((flipped / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (flipped / "__0_0.distcp").write_bytes(data)
    (cut / "__0_0.distcp").write_bytes(data[:-1])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    (bare / "conversion.json").unlink()
    (bare / "__0_0.distcp").write_bytes(data[: len(data) // 3])
    answers = run_words(
        [flipped],
        [flipped, tmp_path / "a"],
        [cut, tmp_path / "b"],
        [other, tmp_path / "c"],
        [bare, tmp_path / "d"],
        [bare],
        [root / "hf" / "qwen3 tied"],
        [root / "td" / "qwen3 tied", tmp_path / "flipped"],
        [tmp_path / "absent", tmp_path / "e"],
        [older],
    )
    wanted = [
        "was damaged since its conversion.*1 tensors in all.*convert the checkpoint anew",
        "was damaged since its conversion.*1 tensors in all.*convert the checkpoint anew",
        "__0_0.distcp is not the file of conversion.json.*convert the checkpoint anew",
        "converted with norm_eps=1e-06, config.json now says 0.1; restore config.json",
        "hold no chunk of shape|ends before byte",
        "has no conversion.json; only conversions can be checked",
        "has no conversion.json; only conversions can be checked",
        "exists already; move it away or name another folder",
        "is no folder; name a checkpoint folder",
        "has crc32 sums, this version compares xxh3_128; convert the checkpoint anew",
    ]
    for (code, said), pattern in zip(answers, wanted, strict=True):
        assert code == 2, said
        assert re.search(pattern, said), said
    assert not [p for p in tmp_path.iterdir() if p.name[0] in "abcde" and len(p.name) < 3]


def test_the_trainers_loading_refuses_what_does_not_fit_its_manifest(
    root: Path, tmp_path: Path
) -> None:
    from rest_mega.sync.load import open_source
    from rest_mega.trainer.model import read_architecture

    for kind in ("td", "back"):
        folder = Path(shutil.copytree(root / kind / "qwen3 tied", tmp_path / kind))
        a = read_architecture(str(folder))
        open_source(str(folder), "load", a, 0)
        text = (folder / "conversion.json").read_text()
        for damaged in (text[:-20], text.replace("result", "tluser", 1), "", "[]"):
            (folder / "conversion.json").write_text(damaged)
            with pytest.raises(
                ConfigError, match=r"conversion\.json is damaged.*convert the check"
            ):
                open_source(str(folder), "load", a, 0)
        (folder / "conversion.json").write_text(text)
        file = next(f for f in folder.iterdir() if f.suffix in (".distcp", ".safetensors"))
        file.write_bytes(file.read_bytes() + b"\0")
        with pytest.raises(ConfigError, match=rf"{file.name} is not the file of conversion"):
            open_source(str(folder), "load", a, 0)


def test_a_checkpoint_of_another_model_is_refused_by_the_names_it_lacks(
    root: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(root / "td" / "qwen3 tied", tmp_path / "bare"))
    for name in ("conversion.json", "config.json"):
        (bare / name).unlink()
    hf = root / "hf"
    answers = run_words(
        [bare, tmp_path / "a"],
        [bare, tmp_path / "b", "--model", hf / "qwen2 with one KV head"],
        [bare, tmp_path / "c", "--model", hf / "qwen3 untied"],
        [bare, tmp_path / "d", "--model", hf / "qwen3 tied"],
    )
    wanted = [
        "has no config.json.*--model",
        r"missing .*linear_qkv\.bias.*unexpected .*q_layernorm\.weight.*belong together",
        r"missing \['output_layer\.weight'\] \(1 in all\)",
        "read back bit for bit",
    ]
    assert [code for code, _ in answers] == [2, 2, 2, 0], answers
    for (_, said), pattern in zip(answers, wanted, strict=True):
        assert re.search(pattern, said), said


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_and_with_fewer_kept(
    root: Path, tmp_path: Path
) -> None:
    tokenizer = Path(__file__).parents[1] / "data" / "tiny_bpe"
    small = save_model(tmp_path / "small", "llama", num_hidden_layers=1, vocab_size=100)
    shutil.copytree(tokenizer, small, dirs_exist_ok=True)
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    enough = save_model(tmp_path / "enough", "llama", num_hidden_layers=1, vocab_size=size + 90)
    shutil.copytree(tokenizer, enough, dirs_exist_ok=True)
    answers = run_words([small, tmp_path / "a"], [enough, tmp_path / "b"])
    assert [code for code, _ in answers] == [2, 0], answers
    assert "tokens, config.json 100 embedding rows" in answers[0][1]
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (
        tokenizer / "tokenizer.json"
    ).read_bytes()
