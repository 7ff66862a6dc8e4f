"""SGLang's checksum of CUDA tensors by its own kernels, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/support/sglang_cuda_hash.py SITE_PACKAGES

Reads lists of bytes from stdin, one a line as JSON; answers each with the checksum.
"""

import importlib.util
import json
import sys

import torch


def checksum(hashing, values):
    """gpu_tensor_hash without its demand for a CUDA tensor."""
    words = torch.tensor(values + [0] * (-len(values) % 4), dtype=torch.uint8).view(torch.uint32)
    tiles = -(-len(words) // 8192)
    found = torch.empty(tiles, dtype=torch.uint64)
    seed = 0x243F6A88
    hashing.hash_tiles32_kernel_blocked[(tiles,)](
        words, found, len(words), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=hashing.FMIX32_C1, FM_C2=hashing.FMIX32_C2, POS_A=hashing.POS_C1,
        POS_B=hashing.POS_C2, TILE=8192, BLOCK=256, USE_CG=False,
    )  # fmt: skip
    if tiles > 1:
        whole = torch.empty(1, dtype=torch.uint64)
        hashing.add_tree_reduce_u64_kernel[(1,)](found, whole, tiles, CHUNK=1024)
        found = whole
    return f"{hashing._final_splitmix64(int(found.item())):016x}"


if __name__ == "__main__":
    path = f"{sys.argv[1]}/sglang/kernels/ops/memory/gpu_tensor_hash.py"
    spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(checksum(module, json.loads(line))) + "\n")
