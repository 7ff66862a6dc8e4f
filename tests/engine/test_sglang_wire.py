"""SGLang's own unpickler and buckets read what we send; no server is needed."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from rest_mega.rollout.sglang_weights import Bucket
from rest_mega.rollout.sglang_wire import entries, flatten, payload
from tests.support.ipc_reader import KNOWN
from tests.support.sglang import PYTHON, ROOT, STANDINS

pytestmark = pytest.mark.engine

UUID = "GPU-00000000-1111-2222-3333-444444444444"


class Handle:
    """Pickled as a CUDA tensor of ours is, on a machine that has none."""

    def __reduce__(self) -> Any:
        handle = (b"h" * 64, 14, 0, False, b"c" * 8, 0, b"e" * 64, True)
        tensor = (torch.Tensor, torch.Size([14]), (1,), 0, torch.storage.TypedStorage, torch.uint8)
        return rebuild_cuda_tensor, (*tensor, UUID, *handle)


def answers(payloads: list[str]) -> list[Any]:
    """What SGLang's side lacks of KNOWN, and what it makes of each payload."""
    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    environment = {"PYTHONPATH": str(STANDINS), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [PYTHON, "-P", ROOT / "tests" / "support" / "sglang_reads.py"],
        input="\n".join([json.dumps(sorted(KNOWN)), *payloads]),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']


def test_sglang_reads_our_buckets_and_finds_the_gpu_of_a_handle() -> None:
    draw = torch.Generator().manual_seed(0)
    sent: list[Bucket] = [
        [("a", torch.randn((2, 3), generator=draw)), ("b", torch.randn(4, generator=draw))],
        [("c", torch.randn((7, 1), generator=draw).bfloat16())],
    ]
    texts = [payload(entries(bucket), flatten(bucket)) for bucket in sent]
    handle: Any = Handle()
    refused, *got, of_handle = answers([*texts, payload(entries(sent[1]), handle)])
    for bucket, found in zip(sent, got, strict=True):
        assert found == [
            [name, list(t.shape), str(t.dtype), t.double().flatten().tolist()] for name, t in bucket
        ]
    assert refused == []  # so tests/gpu/test_cuda_ipc.py uses no name that SGLang refuses
    # What is ours of a handle was read to the end: the GPU was looked for by its UUID.
    assert of_handle == f"Exception: Invalid device_uuid={UUID}"
