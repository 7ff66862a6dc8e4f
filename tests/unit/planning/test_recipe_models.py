"""The recipes' config.json files against public model definitions, looked up on 2026-12-01.

pytorch/torchtune, torchtune/models: qwen3/_model_builders.py at 010412e (`*_instruct`),
llama3_2/_model_builders.py at 2cb2470, llama3_1/_model_builders.py at 1934adb (llama3_3 calls it
"identical apart from the checkpoints"), scalings in llama3_1/_position_embeddings.py at 1934adb.
NVIDIA/Megatron-LM, examples/rl/model_configs/qwen3_30b_a3b_moe.sh at 0ab47fa (sizes and experts of
Qwen3-30B-A3B; its positions are shortened there, 40,960 is from a copy of the config.json).
The 4B model is ResT's Qwen3-4B-2507: its rope base and positions are those of its GGUF's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[3] / "examples" / "recipes" / "models"
FIELDS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
    "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip
PUBLISHED = {
    "qwen3_1.7b": (28, 16, 8, 2048, 6144, 151936, 1e-6, 1e6, 40960, True),
    "qwen3_4b": (36, 32, 8, 2560, 9728, 151936, 1e-6, 5e6, 262144, True),
    "qwen3_8b": (36, 32, 8, 4096, 12288, 151936, 1e-6, 1e6, 40960, False),
    "qwen3_14b": (40, 40, 8, 5120, 17408, 151936, 1e-6, 1e6, 40960, False),
    "qwen3_30b_a3b": (48, 32, 4, 2048, 6144, 151936, 1e-6, 1e6, 40960, False),
    "llama3.2_3b": (28, 24, 8, 3072, 8192, 128256, 1e-5, 5e5, 131072, True),
    "llama3.3_70b": (80, 64, 8, 8192, 28672, 128256, 1e-5, 5e5, 131072, False),
}
SCALING = {"llama3.2_3b": 32.0, "llama3.3_70b": 8.0}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def test_every_model_is_looked_up() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text("utf-8"))
    assert tuple(config[field] for field in FIELDS) == PUBLISHED[name]
    assert config["head_dim"] == 128
    scaling = config.get("rope_scaling") or {}
    assert scaling.get("factor") == SCALING.get(name)
    if scaling:
        assert (scaling["low_freq_factor"], scaling["high_freq_factor"]) == (1.0, 4.0)
        assert scaling["original_max_position_embeddings"] == 8192
    if "a3b" in name:
        assert {key: config[key] for key in EXPERTS} == EXPERTS
