"""CUDA or CPU: the device of this process, and all that megatron-core needs to run on a CPU.

`adapt_mcore()` must run before anything else imports `megatron.core` (`parallel.start` sees to it).
Where CUDA is present it stands in for a missing FusedAdam and takes over the checkpoint writer's
queue, no more. On a CPU it changes no file and leaves `torch` as it is:

- mcore's modules get a *view* of torch as their global `torch`: the same functions, but its `cuda`
  answers for the CPU and factories accept `device="cuda"`; no cost per operation.
- `torch.compile` is the identity while mcore is imported (mcore fuses with it at import; it would
  load the compiler into every process and need a C++ compiler at run time).
- five private places of mcore that cannot work on a CPU are replaced, each named below with its
  reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import queue
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from rest_mega.config import ConfigError

_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "empty_like",
    "eye",
)
_CUDA_TYPE = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
_MCORE_MODULES = (
    "parallel_state",
    "tensor_parallel",
    "pipeline_parallel",
    "distributed",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "transformer.moe.token_dispatcher",
    "transformer.moe.moe_utils",
    "dist_checkpointing",
    "dist_checkpointing.serialization",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "optimizer_param_scheduler",
)


def check(name: str) -> None:
    """ConfigError where `name` (auto, cpu or cuda) does not fit this machine; takes no device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "run.device=cuda, but torch sees no CUDA device; use run.device=auto or install a "
            "CUDA torch"
        )
    if name == "cpu" and available:
        raise ConfigError(
            "run.device=cpu on a machine with GPUs: hide them with CUDA_VISIBLE_DEVICES='' or "
            "use auto"
        )


def resolve(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this process; errors as in `check`."""
    check(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def count(device: torch.device) -> int:
    """GPUs that this process sees; 0 for a run on a CPU."""
    return 0 if device.type == "cpu" else torch.cuda.device_count()


def give_back(device: torch.device) -> None:
    """GPU memory that torch holds and does not use, for other processes on the same GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def backend(device: torch.device) -> str:
    """The torch.distributed backend: gloo for CPU tensors, NCCL for CUDA tensors."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: allocated on the GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def adapt_mcore() -> None:
    """Make megatron-core importable and runnable here; once per process."""
    for message in ("`torch.distributed.* is deprecated", "Please use DTensor instead"):
        warnings.filterwarnings("ignore", message=message)  # what mcore calls is mcore's to mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core")
    if torch.cuda.is_available():
        _use_group_step_adam()
        _adapt_checkpointing()
        return
    # Its fallbacks for missing GPU packages are what a CPU run wants.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    with _identity_compile(), _triton_stub():
        loaded = [
            importlib.import_module(f"megatron.core.{name}")
            for name in _MCORE_MODULES
            if _exists(name)
        ]
    assert loaded
    _give_view()
    torch.Tensor.cuda = _as_is  # type: ignore[method-assign, assignment]  # on a CPU it could only raise
    _adapt_random()
    _use_group_step_adam()
    _adapt_optimizer()
    _adapt_moe()
    _adapt_checkpointing()


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"megatron.core.{name}") is not None
    except ModuleNotFoundError:
        return False


def _as_is(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


# ------------------------------------------------------------------ imports


@contextlib.contextmanager
def _identity_compile() -> Iterator[None]:
    def identity(model: Any = None, **_: object) -> Any:
        return model if model is not None else (lambda function: function)

    # Load the compiler's front end first: optimizers import it later and it must see the true
    # torch.
    importlib.import_module("torch._dynamo")
    compile_, torch.compile = torch.compile, identity
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _triton_stub() -> Iterator[None]:
    """mcore 0.18 and 0.19 import triton unconditionally; no kernel of it runs on a CPU."""
    version = importlib.metadata.version("megatron-core").split(".")
    if importlib.util.find_spec("triton") is not None or (int(version[0]), int(version[1])) < (
        0,
        18,
    ):
        yield
        return
    stubs = {name: _TritonStub(name) for name in ("triton", "triton.language")}
    stubs["triton"].__dict__["language"] = stubs["triton.language"]
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


class _Anything:
    """A decorator, type or constant of triton: kernels are defined here, never run."""

    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        return self


class _TritonStub(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__version__ = "3.0.0"
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


# ------------------------------------------------------------------ the view of torch


def _on_cpu(device: Any) -> Any:
    """CUDA's devices stand for torch's default one: the CPU, or meta in a dry run."""
    cuda = isinstance(device, int) or str(device).startswith("cuda")
    return torch.get_default_device() if device is not None and cuda else device


def _factory(function: Any) -> Any:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return make


class _Idle:
    """A CUDA stream or event where there is none: every method does nothing, and returns it for the
    events that streams record."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _cuda_view() -> types.ModuleType:
    view = types.ModuleType("torch.cuda")
    view.__dict__.update(torch.cuda.__dict__)
    changes: dict[str, Any] = {
        "is_available": lambda: False,
        "current_device": torch.get_default_device,
        "device_count": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": _Idle,
        "default_stream": _Idle,
        "stream": _Idle,
        "Stream": _Idle,
        "Event": _Idle,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    view.__dict__.update(changes)
    return view


@functools.cache
def _torch_view() -> types.ModuleType:
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    view.__dict__.update({name: _factory(getattr(torch, name)) for name in _FACTORIES})
    view.__dict__["cuda"] = _cuda_view()
    view.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    return view


def _give_view() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _torch_view()  # type: ignore[attr-defined]


# ------------------------------------------------------------------ the replaced places


def _adapt_random() -> None:
    """Random states come from the CPU generator; mcore's tracker would warn that the CPU state
    changed."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    class CpuRngTracker(random.CudaRNGStatesTracker):  # type: ignore[misc]
        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _use_group_step_adam() -> None:
    """Without the FusedAdam of Transformer Engine or apex (on a GPU too) mcore falls back to
    torch's AdamW, whose step counts do not survive a checkpoint of the DistributedOptimizer."""
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    from rest_mega.trainer.adam import GroupStepAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed.Adam = GroupStepAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


def _adapt_optimizer() -> None:
    """mcore tells parameters apart by `tensor.type()`."""
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    plain = importlib.import_module("megatron.core.optimizer.optimizer")
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    cls = distributed.DistributedOptimizer
    cls.__init__ = _as_cuda_types(cls.__init__)
    mixed = plain.Float16OptimizerWithFloat16Params
    mixed.__init__ = _as_cuda_types(mixed.__init__)
    scaled = _as_cuda_types(clip.clip_grad_by_total_norm_fp32)
    for module in (clip, plain):
        module.clip_grad_by_total_norm_fp32 = scaled  # type: ignore[attr-defined]


def _as_cuda_types(function: Any) -> Any:
    """Inside `function`, `tensor.type()` of a CPU tensor answers with the CUDA name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        true_type = torch.Tensor.type

        def named(tensor: torch.Tensor, *a: Any, **k: Any) -> Any:
            known = _CUDA_TYPE.get(tensor.dtype)
            return known if known and not a and not k else true_type(tensor, *a, **k)

        torch.Tensor.type = named  # type: ignore[method-assign, assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = true_type  # type: ignore[method-assign]

    return call


def _adapt_moe() -> None:
    """Split sizes must be Python integers for gloo; names that only Transformer Engine defines are
    None."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    for name in ("te_general_gemm", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"):
        if not hasattr(utils, name):
            setattr(utils, name, None)
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def to_host(tensor: Any, *_: object, as_numpy: bool = False, **__: object) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    if hasattr(dispatcher, "maybe_move_tensor_to_cpu"):
        dispatcher.maybe_move_tensor_to_cpu = to_host  # type: ignore[attr-defined]


def _adapt_checkpointing() -> None:
    """The writer's result queue is made by a spawned manager (10 s of imports per rank, and it
    outlives a rank that is killed); trainer.checkpoint carries the result to the parent itself."""
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(writer, name):
            setattr(writer, name, results_queue)


_RESULTS: queue.Queue[Any] = queue.Queue()


def results_queue(*_: object) -> queue.Queue[Any]:
    """Where mcore's checkpoint writer leaves its result, in the process that wrote."""
    return _RESULTS
