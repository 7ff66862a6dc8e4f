"""Runs in SGLang's own environment: what its unpickler and its buckets make of our payloads.

The first line of stdin is a JSON list of [module, name], answered with those that SGLang's list of
allowed names lacks. Each line after it is a payload, answered with [name, shape, dtype, values] of
every tensor, or the error that reading it ended in.
"""

import json
import sys

from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.common import SafeUnpickler
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket


def read(text):
    """The way of TpModelWorker.deserialize_own_rank and WeightUpdater in 0.5.23."""
    found = MultiprocessingSerializer.deserialize(text)
    bucket = FlattenedTensorBucket(
        flattened_tensor=found["flattened_tensor"], metadata=found["metadata"]
    )
    return [
        [name, list(tensor.shape), str(tensor.dtype), tensor.double().flatten().tolist()]
        for name, tensor in bucket.reconstruct_tensors()
    ]


if __name__ == "__main__":
    monkey_patch_torch_reductions()
    wanted = json.loads(sys.stdin.readline())
    refused = [pair for pair in wanted if tuple(pair) not in SafeUnpickler.ALLOWED_GLOBALS]
    sys.stdout.write(json.dumps(refused) + "\n")
    for line in sys.stdin:
        try:
            answer = read(line.strip())
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps(answer) + "\n")
