#!/usr/bin/env bash
# Makes warm_start/ anew: the model that the quick-start begins with, trained from random weights on
# generated dialogues. A few minutes on two cores; words given are laid over warm_start.yaml.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
data=runs/quickstart/data
python examples/quickstart/make_data.py --out "$data" --dialogues 12800  # 32 a step
torchrun --standalone --nproc-per-node "${PROCESSES:-2}" \
  -m rest_mega sft examples/quickstart/warm_start.yaml run.fresh=true "$@"
python - <<'PYTHON'
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

source, target = Path("runs/quickstart/warm_start/hf"), Path("examples/quickstart/warm_start")
target.mkdir(exist_ok=True)
tensors = load_file(source / "model.safetensors")
save_file(
    {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},  # half the size to ship
    target / "model.safetensors",
    metadata={"format": "pt"},
)
for file in source.glob("*.json"):
    shutil.copy(file, target)
print(f"wrote {target}")
PYTHON
