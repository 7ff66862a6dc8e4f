"""torchrun's variables: who this process is. The sole reader of os.environ in the package."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence

_RANKS = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
"""What torchrun tells a rank of itself."""


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def machine() -> str:
    """The name of this machine, the same for all ranks on it."""
    return socket.gethostname()


def rendezvous() -> str:
    """torch.distributed's init_method: torchrun's, the one given in REST_MEGA_INIT_METHOD, or a
    loopback port."""
    if given := os.environ.get("REST_MEGA_INIT_METHOD"):
        return given
    return "env://" if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{free_port()}"


def store_outlives_ranks() -> bool:
    """Whether torchrun would start ranks anew beside the store of those that failed: it keeps one
    for all attempts unless told otherwise (torch/distributed/elastic/rendezvous,
    dynamic_rendezvous.py)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variable(name: str) -> str | None:
    """Value of the environment variable that a config names (a secret does not stand in it)."""
    return os.environ.get(name)


@contextlib.contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """The variable has `value` inside, for libraries that take a setting in no other way."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def visible_gpus(gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a child that is to see these of the GPUs that we see, in this
    order."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else []
    return ",".join(names[gpu].strip() if names else str(gpu) for gpu in gpus)


def many_machines() -> bool:
    """Whether this run has ranks on other machines."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) != world_size()


def hide_gpus() -> None:
    """For what needs none: torch, not yet loaded, sees no GPU in this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def keep_gloo_on_loopback() -> None:
    """Where all ranks are on this machine, gloo listens on loopback and needs no host name."""
    if not many_machines():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process that is no rank of this run: ours without torchrun's
    variables, and `more`."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANKS and not name.startswith("TORCHELASTIC_")
    }
    return ours | dict(more)


def allow_mlflow_files() -> None:
    """MLflow keeps runs in a folder only where this variable says so."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
