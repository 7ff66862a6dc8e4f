"""The plan's bytes of a token's cache are those of a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rest_mega.planning.engine import cache_bytes
from rest_mega.rollout.sglang_engine import SglangEngine
from rest_mega.trainer.model import read_architecture
from tests.support.sglang import PYTHON, ROOT, server_config

pytestmark = pytest.mark.engine

MODEL = str(ROOT / "examples" / "quickstart" / "warm_start")
TOKENS = 500_000


def test_a_token_takes_the_planned_bytes_of_a_servers_cache(tmp_path: Path) -> None:
    """SGLang tells the sizes of its pool to a hundredth of a GiB."""
    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    config = server_config(arguments={"mem_fraction_static": 0.9, "max_total_tokens": TOKENS})
    engine = SglangEngine(
        config, model_path=MODEL, dtype="fp32", end_of_turn_ids=(3,), device="cpu", folder=tmp_path
    )
    engine.close()
    log = (tmp_path / "server_0.log").read_text()
    told = re.search(r"#tokens: (\d+), K size: ([\d.]+) GB, V size: ([\d.]+) GB", log)
    assert told is not None, log
    tokens, size = int(told[1]), (float(told[2]) + float(told[3])) * 2**30
    assert tokens == TOKENS
    assert size == pytest.approx(tokens * cache_bytes(read_architecture(MODEL), 1, 1, 4), rel=0.02)
