"""examples/extending/family.py: a family from outside the package trains and converts as ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_mega.cli import main
from rest_mega.config import ConfigError
from rest_mega.environments import load_modules
from rest_mega.trainer.families import FAMILIES, Family, add_family
from rest_mega.trainer.model import read_architecture
from tests.distributed.test_convert import assert_same, run_words, tensors
from tests.distributed.test_layouts import layout, reference, two_steps
from tests.support.models import save_random
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

FAMILY = Path(__file__).parents[2] / "examples" / "extending" / "family.py"
SEED_OSS_36B = {
    "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "hidden_size": 5120,
    "num_hidden_layers": 64, "intermediate_size": 27648, "num_attention_heads": 80,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 155136,
    "rope_theta": 1e7, "max_position_embeddings": 524288, "tie_word_embeddings": False,
    "attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "hidden_act": "silu",
}  # fmt: skip
"""As public copies of its config.json have it."""


@pytest.fixture
def known() -> Iterator[None]:
    """The example, registered for one test."""
    (module,) = load_modules([str(FAMILY)])
    yield
    del FAMILIES["seed_oss"], sys.modules[module.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a padding token: transformers would keep its embedding's row from learning."""
    settings = {"num_hidden_layers": 2, "head_dim": 16, "pad_token_id": None}
    return save_random(tmp_path_factory.mktemp("seed_oss") / "hf", "SeedOss", **settings)


def write_config(folder: Path, **more: Any) -> str:
    (folder / "config.json").write_text(json.dumps(SEED_OSS_36B | more))
    return str(folder)


def test_two_steps_at_tp2_pp2_are_transformers(known: None, folder: Path) -> None:
    """Log-probs, entropies, losses, every gradient and every parameter."""
    architecture = read_architecture(str(folder))
    one = layout(4, tensor=2, pipeline=2, sequence=True)
    cases = [("seed_oss", str(folder), architecture, one)]
    answers = run_ranks(in_turn, 4, cases, two_steps)
    ((want,),) = run_ranks(in_turn, 1, [("seed_oss", str(folder))], reference)
    assert "model.layers.0.self_attn.k_proj.bias" in want["gradients"]
    for (answer,), rank in zip(answers, range(4), strict=True):
        np.testing.assert_allclose(answer["steps"], want["steps"], rtol=1e-5, atol=1e-6)
        for kind in ("parameters", "gradients"):
            assert rank or set(answer[kind]) == set(want[kind])
            for name, value in answer[kind].items():
                bound = 1e-5 * np.abs(want[kind][name]).max()
                np.testing.assert_allclose(
                    value, want[kind][name], atol=bound, rtol=0, err_msg=f"{kind} of {name}"
                )


def test_it_converts_both_ways_and_its_logits_are_transformers(folder: Path) -> None:
    """fp32 logits within 1e-5 of the largest; the same bits back."""
    there, back = folder.parent / "td", folder.parent / "back"
    module = ["--module", FAMILY]
    (refused, *made) = run_words(
        [folder, there],
        [folder, there, "--logits", *module],
        [there, back, *module],
    )
    assert refused[0] == 2
    assert "family 'seed_oss'; known: llama" in refused[1]
    assert "environment.modules may add one" in refused[1]
    assert [code for code, _ in made] == [0, 0], made
    gap = float(made[0][1].split("transformers to ")[1].split()[0])
    assert gap < 1e-5
    assert_same(tensors(back), tensors(folder))


def test_plan_and_dry_run_know_it(
    known: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path)
    words = [f"model.path={model}", f"environment.modules=[{FAMILY}]", "parallel.tensor=8",
             "model.dtype=bf16", "model.recompute=full"]  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(
        "rollout: {max_tokens: 2048, engine: sglang, sglang: {colocate: true, tp_size: 8}}\n"
    )
    assert main(["plan", str(config), *words, "parallel.pipeline=4", "--ranks", "64"]) == 0
    assert "36.15 B parameters on 64 x" in capsys.readouterr().out  # "36B"
    assert main(["train", str(config), *words, "--dry-run", "--ranks", "8"]) == 0


def test_what_its_family_does_not_promise_is_refused(known: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['attention_out_bias'\] not supported"):
        read_architecture(write_config(tmp_path, attention_out_bias=True))
    with pytest.raises(ConfigError, match=r"\['attention_bias=False'\] not supported"):
        read_architecture(write_config(tmp_path, attention_bias=False))
    with pytest.raises(ConfigError, match="'qwen3' is there already"):
        add_family("qwen3", Family())
