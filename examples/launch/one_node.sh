#!/usr/bin/env bash
# All ranks on this machine:  one_node.sh CONFIG.yaml [section.key=value ...]
#
#   VERB       what rest-mega does (train); doctor looks at the machine and its links
#   PROCESSES  ranks; default: one for each GPU, without GPUs two
#   SAVE_S     seconds that ranks have, after Ctrl-C or SIGTERM, to end their step and save (600)
#
# Everything listens on loopback: --standalone takes a free port there.
set -euo pipefail
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun kills ranks that are still there so long after it passed a signal on; its default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_S:-600}
exec torchrun --standalone --nproc-per-node "$PROCESSES" -m rest_mega "${VERB:-train}" "$@"
