"""GPUs by their makers' data sheets, and the share of each figure that is assumed reached."""

from __future__ import annotations

from dataclasses import dataclass

MATMUL_SHARE = 0.6
"""Of the peak that layers reach inside one rank, communication and bubble apart. An assumption:
Megatron's end-to-end figure is 0.44-0.52 on A100 (Narayanan et al. 2021, table 1)."""
BANDWIDTH_SHARE = 0.7
"""Of memory's and links' peak bandwidth. An assumption."""
MEMORY_SHARE = 0.92
"""Of a GPU's memory that a plan may fill; the rest is CUDA's context, NCCL and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links; bytes and seconds, one direction."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bf16 FLOP/s (no sparsity)."""
    bandwidth: float
    """Memory, bytes/s."""
    link: float
    """To another GPU of the node, bytes/s."""
    network: float
    """To another node, bytes/s per GPU: an assumption about the cluster."""
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 data sheet (SXM 80 GB): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways.
        Gpu("a100-80g", 80e9, 312e12, 2.039e12, 300e9, 25e9),
        # NVIDIA H100 data sheet (SXM): 989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways.
        Gpu("h100-80g", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        # NVIDIA H200 data sheet: H100's compute, 141 GB at 4.8 TB/s.
        Gpu("h200-141g", 141e9, 989e12, 4.8e12, 450e9, 50e9),
        # NVIDIA DGX B200 data sheet: 2.25 PFLOP/s dense, 180 GB at 8 TB/s, NVLink 1.8 TB/s both.
        Gpu("b200-180g", 180e9, 2250e12, 8e12, 900e9, 50e9),
        # NVIDIA L40S data sheet: 362 TFLOP/s dense, 48 GB at 864 GB/s, PCIe 4.0 x16.
        Gpu("l40s-48g", 48e9, 362e12, 0.864e12, 32e9, 25e9),
    )
}
