"""Every adaptation of megatron-core to a CPU is still needed, and leaves torch as it was.

One process imports megatron-core as it is and tries what the adaptations are for; where a try
succeeds, upstream no longer needs that adaptation and it can go.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from rest_mega.config import ConfigError
from rest_mega.trainer import device
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the adaptations are for CPUs alone"),
]

VERSION = tuple(int(x) for x in importlib.metadata.version("megatron-core").split(".")[:2])

AS_IT_IS = textwrap.dedent(
    """
    import inspect, json, sys
    import torch

    def error(attempt):
        try:
            attempt()
        except Exception as e:
            return type(e).__name__
        return None

    answer = {"import": error(lambda: __import__("megatron.core.optimizer"))}
    if not answer["import"]:
        import megatron.core.optimizer as optimizer
        from megatron.core.optimizer import clip_grads, distrib_optimizer
        from megatron.core.optimizer import optimizer as plain
        from megatron.core.jit import jit_fuser
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
        from megatron.core.dist_checkpointing.strategies import filesystem_async as writer

        rope = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
        moved = token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True)
        queue = getattr(writer, "get_write_results_queue", None) or writer._get_write_results_queue
        answer |= {
            "rope": error(lambda: rope(4)),
            "random": error(lambda: random.CudaRNGStatesTracker().add("stream", 1)),
            "cuda": error(lambda: torch.ones(1).cuda()),
            "compiled": jit_fuser is torch.compile and "torch._dynamo" in sys.modules,
            "torch_adam": optimizer.USING_PYTORCH_OPTIMIZER,
            "types": [
                "torch.cuda." in inspect.getsource(f)
                for f in (distrib_optimizer.DistributedOptimizer, clip_grads,
                          plain.Float16OptimizerWithFloat16Params)
            ],
            "split_sizes": isinstance(moved, torch.Tensor),
            "moe_names": [
                n for n in ("te_general_gemm", "fused_compute_score_for_moe_aux_loss",
                            "fused_moe_aux_loss")
                if not hasattr(moe_utils, n)
            ],
            "spawn": "spawn" in inspect.getsource(queue),
        }
    print(json.dumps(answer))
    """
)


@pytest.fixture(scope="module")
def as_it_is() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_IT_IS],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return dict(json.loads(run.stdout.splitlines()[-1]))


def _adapted() -> dict[str, Any]:
    """What the same tries give in a rank, where the adaptations are in place."""
    import importlib
    import warnings

    from rest_mega.trainer.adam import GroupStepAdam

    random = importlib.import_module("megatron.core.tensor_parallel.random")
    optimizer = importlib.import_module("megatron.core.optimizer")
    moe = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    jit = importlib.import_module("megatron.core.jit")
    rotary = importlib.import_module(
        "megatron.core.models.common.embeddings.rotary_pos_embedding"
    ).RotaryEmbedding
    tracker, seen = random.get_cuda_rng_tracker(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.add("a stream", 7)
        torch.manual_seed(7)
        want = torch.rand(4)
        torch.manual_seed(3)
        outside = torch.get_rng_state()
        for _ in range(2):
            with tracker.fork("a stream"):
                seen.append(torch.rand(2))
    assert torch.equal(torch.cat(seen), want)
    assert torch.equal(torch.get_rng_state(), outside)
    frequencies = rotary(8, 1.0, use_cpu_initialization=True)(4)
    moved = moe.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert moved.tolist() == [2, 3]
    assert not isinstance(moved, torch.Tensor)
    assert jit.jit_fuser(len) is len
    assert optimizer.Adam is GroupStepAdam
    return {"rope": list(frequencies.shape), "cuda": torch.ones(1).cuda().device.type}


def test_what_needs_an_adaptation_fails_as_it_is_and_works_adapted(
    as_it_is: dict[str, Any],
) -> None:
    assert as_it_is["import"] == (
        "ModuleNotFoundError" if VERSION >= (0, 18) and not _has("triton") else None
    )
    if as_it_is["import"] is None:
        assert as_it_is["rope"]
        assert as_it_is["random"]
        assert as_it_is["cuda"]
        assert as_it_is["compiled"]
        assert as_it_is["types"] == [True, True, True]
        assert as_it_is["split_sizes"]
        assert bool(as_it_is["moe_names"]) == (VERSION < (0, 17))
        assert as_it_is["spawn"]
        assert as_it_is["torch_adam"] != (_has("transformer_engine") or _has("apex"))
    (adapted,) = run_ranks(_adapted, 1)
    assert adapted == {"rope": [4, 1, 1, 8], "cuda": "cpu"}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _torch_itself() -> dict[str, Any]:
    import importlib

    view = importlib.import_module("megatron.core.parallel_state").torch
    made = {
        "zeros": view.zeros(2, device="cuda"),
        "arange": view.arange(3, device=view.cuda.current_device()),
        "tensor": view.tensor([1.0], device="cuda:0"),
        "empty_like": view.empty_like(torch.ones(1), device=0, pin_memory=True),
        "full": view.full((1,), 2.0, device=None),
    }
    assert {t.device.type for t in made.values()} == {"cpu"}
    assert view is not torch
    assert view.cuda is not torch.cuda
    assert view.float32 is torch.float32
    assert view.nn is torch.nn
    assert view.add is torch.add
    assert not view.cuda.is_available()
    with view.cuda.stream(view.cuda.current_stream()):
        view.cuda.synchronize()
    failures = []
    for attempt in (
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.cuda.current_device(),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.get_rng_state(),
    ):
        try:
            attempt()
        except (RuntimeError, AssertionError) as error:
            failures.append(type(error).__name__)
    return {
        "failures": len(failures),
        "compile": torch.compile.__module__,
        "type": torch.ones(1).type(),
        "stub": "triton" in sys.modules and not hasattr(sys.modules["triton"], "__file__"),
    }


def test_torch_itself_is_left_as_it_was() -> None:
    (answer,) = run_ranks(_torch_itself, 1)
    assert answer == {"failures": 4, "compile": "torch", "type": "torch.FloatTensor", "stub": False}


def test_types_are_renamed_inside_the_wrapped_function_alone() -> None:
    rename = device._as_cuda_types(lambda t, *kind: t.type(*kind))
    assert rename(torch.ones(1)) == "torch.cuda.FloatTensor"
    assert rename(torch.ones(1).bfloat16()) == "torch.cuda.BFloat16Tensor"
    assert rename(torch.ones(1).long()) == "torch.LongTensor"
    assert rename(torch.ones(1), torch.float64).dtype == torch.float64
    with pytest.raises(ZeroDivisionError):
        device._as_cuda_types(lambda: 1 / 0)()
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_the_device_is_resolved_or_refused_with_the_remedy() -> None:
    assert device.resolve("auto") == device.resolve("cpu") == torch.device("cpu")
    assert device.backend(torch.device("cpu")) == "gloo"
    with pytest.raises(ConfigError, match=r"run\.device=cuda, but torch sees no CUDA.*auto"):
        device.resolve("cuda")


def _growth() -> int:
    before = device.peak_memory_bytes()
    held = bytearray(64 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    return device.peak_memory_bytes() - before


def test_peak_memory_grows_by_what_is_held() -> None:
    (growth,) = run_ranks(_growth, 1)
    assert 0.8 * 64 * 2**20 <= growth <= 2 * 64 * 2**20
