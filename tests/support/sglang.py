"""A real SGLang server on this machine's CPU, and the policy it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rest_mega.config import SglangConfig

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
STANDINS = Path(__file__).parent / "sglang_cpu" / "standins"


def server_config(**more: Any) -> SglangConfig:
    """One small server in the environment that `make sglang` installs."""
    settings: dict[str, Any] = {
        "python": str(PYTHON),
        "environment": {"PYTHONPATH": str(STANDINS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "bucket_mb": 1,
        "arguments": {"mem_fraction_static": 0.1, "max_total_tokens": 16384},
    }
    return SglangConfig(**(settings | more))
