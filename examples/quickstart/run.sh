#!/usr/bin/env bash
# The quick-start: makes the prompts if they are not there, then trains on two processes (PP 2).
# Words given are laid over the config: run.sh run.seed=1 run.dir=runs/quickstart/seed_1
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
data=runs/quickstart/data
[ -f "$data/held_out.jsonl" ] || python examples/quickstart/make_data.py --out "$data"
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" \
  -m rest_mega train examples/quickstart/config.yaml "$@"
