"""What the doctor sees of a real GPU, and NCCL's links of one rank."""

from __future__ import annotations

import pytest
import torch

from rest_mega.config import ParallelConfig, RunConfig
from rest_mega.diagnosis import ERROR, OK, machine
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_the_gpu_is_told_with_its_memory_and_nccl() -> None:
    found = [f for f in machine.look(RunConfig()) if f.check == machine.GPU]
    assert [f.level for f in found] == [OK]
    assert torch.cuda.get_device_name() in found[0].text
    assert "NCCL" in found[0].text


def links() -> list[tuple[str, str]]:
    from rest_mega.diagnosis.links import look
    from rest_mega.trainer import parallel

    place = parallel.start(ParallelConfig(), "cuda")
    found = look(place, 0.5)
    parallel.stop()
    return [(f.level, f.text) for f in found]


def test_nccl_hands_on_the_right_numbers() -> None:
    (found,) = run_ranks(links, 1)
    assert not [text for level, text in found if level == ERROR]
    assert any(text.startswith("all-reduce, all ranks of 1: exact; 256 MiB") for _, text in found)
