"""This machine: its GPUs, limits, name, network interfaces and ports."""

from __future__ import annotations

import resource
import shutil
import socket

import torch

from rest_mega import launch
from rest_mega.config import ConfigError, RunConfig
from rest_mega.diagnosis.findings import ERROR, OK, WARNING, Finding
from rest_mega.trainer import device

GPU = "GPU"
UNLIKE = Finding(
    WARNING,
    GPU,
    "ranks have different ones: see above",
    "the slowest and the smallest sets the pace: use nodes of one kind, with one driver",
)
"""What it means where ranks see different ones."""
FREE_SHARE = 0.9
"""Of a GPU's memory, below which others are taken to use it."""
OPEN_FILES = 4096
"""Soft limit below which a warning is given: a player holds a connection per episode in flight, and
a checkpoint many files."""
SHARED_MEMORY = 2**30
"""Bytes of /dev/shm below which a warning is given: NCCL and SGLang put their queues there."""


def look(config: RunConfig) -> list[Finding]:
    """Everything that one machine alone can tell; nothing is raised."""
    return [
        *_device(config.run.device),
        _open_files(),
        *_shared_memory(),
        *_name(),
        *_interfaces(),
        *_ports(config),
    ]


def _device(wanted: str) -> list[Finding]:
    try:
        device.check(wanted)
    except ConfigError as error:
        return [Finding(ERROR, GPU, str(error), "see run.device in docs/configuration.md")]
    if torch.cuda.is_available():
        return _gpus()
    if shutil.which("nvidia-smi") is None:
        return [Finding(OK, GPU, "none: runs on the CPU, with gloo")]
    text = f"nvidia-smi is here, and torch {torch.__version__} sees no GPU"
    remedy = "install a CUDA build of torch for this driver; in a container pass --gpus all"
    return [Finding(WARNING, GPU, text, remedy)]


def _gpus() -> list[Finding]:
    mine, there = launch.local_rank(), torch.cuda.device_count()
    if mine >= there:
        text = f"local rank {mine} has none: torch sees {there}"
        remedy = "give torchrun --nproc-per-node no more than that; see CUDA_VISIBLE_DEVICES"
        return [Finding(ERROR, GPU, text, remedy)]
    torch.cuda.set_device(mine)
    about = torch.cuda.get_device_properties(mine)
    free, total = torch.cuda.mem_get_info(mine)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    text = f"{about.name}, {total / 1e9:.0f} GB, CUDA {torch.version.cuda}, NCCL {nccl}"
    found = [Finding(OK, GPU, text)]
    if about.major < 8:
        text = f"compute capability {about.major}.{about.minor} has no bf16"
        found.append(Finding(ERROR, "precision", text, "model.dtype=fp32, or an A100 or newer"))
    if free < FREE_SHARE * total:
        text = f"{(total - free) / 1e9:.0f} of {total / 1e9:.0f} GB are in use already"
        remedy = "nvidia-smi shows by whom: end what is left of an earlier run"
        found.append(Finding(WARNING, "GPU memory", text, remedy))
    return found


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} at most, could be raised to {hard:,}"
    if soft >= OPEN_FILES:
        return Finding(OK, "open files", text)
    return Finding(WARNING, "open files", text, f"ulimit -n {min(hard, 65_536)} before torchrun")


def _shared_memory() -> list[Finding]:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return []  # not a Linux machine
    if free >= SHARED_MEMORY:
        return [Finding(OK, "/dev/shm", "1 GB or more is free")]
    remedy = "in a container: --shm-size=16g, or --ipc=host"
    text = f"{free / 1e6:,.0f} MB are free; NCCL and SGLang want 1 GB"
    return [Finding(WARNING, "/dev/shm", text, remedy)]


def _name() -> list[Finding]:
    """gloo listens where the host's name points to, unless it is told an interface."""
    if not launch.many_machines() or launch.variable("GLOO_SOCKET_IFNAME"):
        return []
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        text = "this machine's own name cannot be resolved, and gloo asks for it"
        remedy = "GLOO_SOCKET_IFNAME=<interface>, or a line in /etc/hosts"
        return [Finding(ERROR, "host name", text, remedy)]
    if address.startswith("127."):
        text = f"this machine's own name is {address}, where others cannot reach gloo"
        return [Finding(ERROR, "host name", text, "GLOO_SOCKET_IFNAME=<interface>")]
    return [Finding(OK, "host name", "is an address that others may reach")]


def _interfaces() -> list[Finding]:
    """The interfaces that variables name are there. NCCL takes prefixes, `=` for an exact name and
    `^` for all but these."""
    there, found = [name for _, name in socket.if_nameindex()], []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = launch.variable(variable) or ""
        if not value or value.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        for name in value.removeprefix("=").split(","):
            if not any(one == name if exact else one.startswith(name) for one in there):
                text = f"{variable}={value}, and there is no interface {name}"
                remedy = f"name one of {', '.join(there)}"
                found.append(Finding(ERROR, "interface", text, remedy))
    return found


def _ports(config: RunConfig) -> list[Finding]:
    """Ports of loopback that the config names are free; others are chosen when they are needed."""
    if launch.local_rank():
        return []
    port = config.rollout.sglang.arguments.get("port")
    if port is None:
        return [Finding(OK, "ports", f"chosen when they are needed, such as {launch.free_port()}")]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(str(port))))
        except OSError as error:
            text = f"rollout.sglang.port={port} cannot be had: {error.strerror}"
            remedy = "leave rollout.sglang.port out, and a free one is chosen"
            return [Finding(ERROR, "ports", text, remedy)]
    return [Finding(OK, "ports", f"rollout.sglang.port={port} is free")]
