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

from rest_mega.config import ConfigError, ParallelConfig
from rest_mega.records import Sample
from rest_mega.sync import manifest
from tests.support.bench import TEMPERATURE, Bench
from tests.support.models import FAMILIES, save_model
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tied": ("qwen3", {"num_hidden_layers": 4}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "vocab_size": 129}),
    "qwen2 with one KV head": ("qwen2", {"num_key_value_heads": 1}),
    "llama with llama3 rope": ("llama", {}),
    "llama with linear rope, one KV head per head": ("llama_linear", {"num_key_value_heads": 8}),
    "mistral": ("mistral", {}),
    "smollm2": ("smollm2", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe, dense at first": ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
    "mixtral": ("mixtral", {}),
}
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "tp2 pp2 sp": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "pp2 vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp2 sp": ParallelConfig(tensor=2, sequence=True),
    "ep2": ParallelConfig(expert=2),
    "tp2 sp ep2": ParallelConfig(tensor=2, sequence=True, expert=2),
    "pp2 ep2": ParallelConfig(pipeline=2, expert=2),
}
RANKS = {name: 4 if name in ("tp2 pp2 sp", "pp2 ep2") else 2 for name in LAYOUTS} | {"1": 1}
DENSE, SPREAD = ("1", "tp2", "pp2", "tp2 pp2 sp"), ("1", "tp2 sp", "pp2", "tp2 pp2 sp")
EXPERTS = ("ep2", "tp2 sp ep2", "pp2 ep2")
CASES = [
    (name, layout)
    for name, (family, _) in MODELS.items()
    for layout in (SPREAD + EXPERTS if family in ("qwen3_moe", "mixtral") else DENSE)
] + [("qwen3 tied", "pp2 vpp2")]
SEQUENCE = 24
"""Tokens whose log-probs and entropies are compared with transformers'."""


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
        source = save_model(root / "hf" / name, family, **({"num_hidden_layers": 2} | more))
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


def one_sequence(vocab: int) -> Sample:
    """Random ids, all but the first trained on."""
    ids_T = np.random.default_rng(0).integers(0, vocab, SEQUENCE).astype(np.int32)
    zeros_T = np.zeros(SEQUENCE)
    return Sample(
        ids_T=ids_T,
        mask_T=np.arange(SEQUENCE) > 0,
        regions_T=zeros_T.astype(np.int8),
        logprobs_T=zeros_T.astype(np.float32),
        version_T=zeros_T.astype(np.int32),
        advantage=1.0,
        reward=1.0,
        group=0,
    )


def transformers_scores(path: Path) -> np.ndarray:
    """Log-probs and entropies of the sequence: [2, tokens after the first]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids_T = torch.from_numpy(one_sequence(model.config.vocab_size).ids_T.astype(np.int64))
    with torch.no_grad():
        logprobs_TV = (model(ids_T[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    logprob_R = logprobs_TV.gather(1, ids_T[1:, None])[:, 0]
    return torch.stack([logprob_R, -(logprobs_TV.exp() * logprobs_TV).sum(-1)]).numpy()


def _load(path: str, architecture: Any, parallel: ParallelConfig) -> tuple[Any, Any]:
    """Our scores of the sequence on the last stage, None elsewhere; on leads all tensors of the
    loaded model."""
    from rest_mega.sync.export import Exporter

    bench = Bench((path, architecture), **vars(parallel))
    trainer = bench.trainer()
    (batches,) = trainer.pack([one_sequence(architecture.vocab_size)])
    ((row, *_),) = trainer.score([batches])
    scores = np.stack([row.logprob_R, row.entropy_R]) if bench.place.is_last_stage else None
    stream = Exporter(trainer.modules, architecture, bench.place).stream()
    return scores, {name: tensor.numpy() for name, tensor in stream}


@pytest.fixture(scope="module")
def loaded(root: Path) -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """(model, layout) -> each rank's answer, loaded from the converted checkpoint."""
    from rest_mega.trainer.model import read_architecture

    answers: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    sizes = {name: read_architecture(str(root / "hf" / name)) for name in MODELS}
    for world in (1, 2, 4):
        mine = [case for case in CASES if RANKS[case[1]] == world]
        turns = [
            (f"{name} at {layout}", str(root / "td" / name), sizes[name], LAYOUTS[layout])
            for name, layout in mine
        ]
        ranks = run_ranks(in_turn, world, turns, _load, timeout=300)
        answers |= dict(zip(mine, zip(*ranks, strict=True), strict=True))
    return answers


@pytest.fixture(scope="module")
def wanted(root: Path) -> dict[str, np.ndarray]:
    return {name: transformers_scores(root / "hf" / name) for name in MODELS}


def assert_scores(ranks: Any, want: np.ndarray) -> None:
    """Those of the ranks of the last stage are transformers'."""
    found = [scores for scores, _ in ranks if scores is not None]
    assert found
    for scores in found:
        np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda text: str(text))
def test_a_converted_checkpoint_is_transformers_model_at_every_layout(
    name: str, layout: str, root: Path, loaded: Any, wanted: dict[str, np.ndarray]
) -> None:
    """Loaded through mcore: the same bits, and the same log-probs and entropies."""
    ranks = loaded[name, layout]
    found = {n: torch.from_numpy(array) for n, array in ranks[0][1].items()}
    assert_same(found, tensors(root / "hf" / name))
    assert_scores(ranks, wanted[name])


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
        family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]),
        experts=st.integers(2, 4),
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
        item=st.integers(400, 20_000),
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
            "num_experts": case["experts"],
            "num_local_experts": case["experts"],
            "num_experts_per_tok": 2,
            "moe_intermediate_size": case["ffn"],
            "mlp_only_layers": [0] if case["layers"] > 1 else [],
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
    assert run_ranks(_any_model, 1, str(tmp_path), 15)[0] >= 15


def _draw(count: int, folder: Path) -> list[tuple[str, Path, Any, ParallelConfig]]:
    """Random models, each with a layout of two ranks: (name, folder, architecture, layout)."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from rest_mega.trainer.model import read_architecture

    drawn: list[tuple[str, Path, Any, ParallelConfig]] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        family=st.sampled_from(sorted(FAMILIES)),
        layout=st.sampled_from(["tp2 sp", "pp2", "pp2 vpp2", "ep2", "tp2 sp ep2"]),
        kv_heads=st.sampled_from([1, 2, 4]),
        queries=st.sampled_from([2, 4, 6]),
        head_dim=st.sampled_from([4, 6, 8]),
        width=st.integers(1, 6),
        ffn=st.integers(1, 20),
        layers=st.integers(1, 2),
        vocab=st.integers(2, 300),
        eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
        tied=st.booleans(),
        experts=st.integers(1, 4),
        theta=st.sampled_from([1e2, 1e4, 1e6]),
    )
    def one(family: str, layout: str, kv_heads: int, queries: int, **case: Any) -> None:
        if len(drawn) == count:
            return
        if "experts" not in "".join(FAMILIES[family][1]):
            layout = layout.removesuffix("ep2").strip() or "tp2"
        parallel, heads, experts = LAYOUTS[layout], kv_heads * queries, case["experts"] * 2
        stages = parallel.pipeline * parallel.virtual_pipeline
        more = {
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": case["head_dim"], "hidden_size": heads * case["width"],
            "intermediate_size": 2 * case["ffn"], "num_hidden_layers": stages * case["layers"],
            "vocab_size": case["vocab"], "rms_norm_eps": case["eps"],
            "tie_word_embeddings": case["tied"], "num_experts": experts,
            "num_local_experts": experts, "moe_intermediate_size": 2 * case["ffn"],
            "mlp_only_layers": [], "pad_token_id": None,
        }  # fmt: skip
        if "rope_parameters" not in FAMILIES[family][1]:
            more["rope_parameters"] = {"rope_type": "default", "rope_theta": case["theta"]}
        source = save_model(folder / str(len(drawn)), family, **more)
        name = f"{family} at {layout}, {more}"
        drawn.append((name, source, read_architecture(str(source)), parallel))

    one()
    return drawn


def test_any_configuration_is_transformers_model_at_any_layout(tmp_path: Path) -> None:
    """Read straight from the Hugging Face files by ranges."""
    drawn = _draw(8, tmp_path)
    assert len(drawn) == 8
    turns = [(name, str(path), *more) for name, path, *more in drawn]
    ranks = run_ranks(in_turn, 2, turns, _load, timeout=300)
    for (name, path, *_), *answers in zip(drawn, *ranks, strict=True):
        try:
            assert_scores(answers, transformers_scores(path))
            found = {n: torch.from_numpy(array) for n, array in answers[0][1].items()}
            assert_same(found, tensors(path))
        except AssertionError as error:
            error.add_note(name)
            raise


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
