"""The highest memory of this process since a moment: of the GPU, or resident on a CPU (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from rest_mega.trainer.device import peak_memory_bytes


def forget() -> int:
    """Resident bytes now; the peak counts anew from here (proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak(on_gpu: bool) -> int:
    """Bytes at the peak: allocated on the GPU, resident on a CPU."""
    if on_gpu:
        return peak_memory_bytes()
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(size)
