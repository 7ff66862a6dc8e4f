#!/usr/bin/env bash
# A real pretrained checkpoint through the whole trainer on two CPU processes (PP 2): makes the
# model's folder and the prompts, trains three steps, exports, and compares the export with
# transformers. Installs nothing. Words given are laid over the config: run.sh run.seed=1
# PROMPTS=FILE takes another file in ToolRL's format (.jsonl, .json or .parquet).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
here=examples/smollm2_135m
prompts="${PROMPTS:-examples/data/toolrl_made_up.jsonl}"
train="runs/smollm2_135m/$(basename "${prompts%.*}").jsonl"
launch=(torchrun --standalone --nproc-per-node "${PROCESSES:-2}")

python $here/get_model.py
python $here/add_examples.py "$prompts" "$train"
"${launch[@]}" -m rest_mega train $here/config.yaml "data.train=$train" "$@"
"${launch[@]}" $here/check.py $here/config.yaml "data.train=$train" "$@"
