"""The checksum of CUDA servers as SGLang's own kernels compute it, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from rest_mega.rollout.sglang_hashes import cuda_checksum
from tests.support.sglang import PYTHON, ROOT

pytestmark = pytest.mark.engine


def test_our_checksum_is_that_of_sglangs_kernels() -> None:
    """One word, one that is padded, two tiles."""
    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    (site,) = (PYTHON.parents[1] / "lib").glob("python*/site-packages")
    draw = torch.Generator().manual_seed(0)
    cases = [
        torch.randint(0, 256, (length,), generator=draw, dtype=torch.uint8)
        for length in (4, 4095, 32772)
    ]
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "tests" / "support" / "sglang_cuda_hash.py", site],
        input="\n".join(json.dumps(case.tolist()) for case in cases),
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(
        map(cuda_checksum, cases)
    )
