#!/usr/bin/env bash
# The ranks of one machine of many. Start it on every one, with the same words and variables:
#
#   HEAD=10.0.0.1 NODES=4 multi_node.sh CONFIG.yaml [section.key=value ...]
#
#   HEAD       name or address of the machine where all meet, one of the NODES (needed)
#   NODES      number of machines (needed)
#   PORT       of HEAD, open to the others (29400)
#   JOB        name of the meeting, another for each launch that shares HEAD and PORT (rest-mega)
#   ADDRESS    this machine's address for the others; default: the one it reaches HEAD from
#   INTERFACE  the network interface with that address, for gloo's and NCCL's sockets
#   PROCESSES  ranks on this machine; default: one for each GPU, without GPUs two
#   RESTARTS   so often torchrun starts all ranks anew when one fails (0); they resume
#   SAVE_S     seconds that ranks have, after Ctrl-C or SIGTERM, to end their step and save (600)
#   LINGER_S   seconds that torchrun may stay when its ranks have ended; with RESTARTS above 0 they
#              cover the meeting of all machines before the next start (60; with RESTARTS 900)
#   VERB       what rest-mega does (train); doctor looks at the machines and their links
#
# run.dir must be on a file system that all machines share. PORT and the ports that gloo and NCCL
# choose are open to the network of ADDRESS without a password: use a private one.
set -euo pipefail
: "${HEAD:?name or address of the machine where all meet}" "${NODES:?number of machines}"
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 2))}

head_address=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 { print $1 }') || true
: "${head_address:?HEAD=$HEAD cannot be resolved: write its address}"
if [ -z "${ADDRESS:-}" ]; then
  ADDRESS=$(ip -oneline route get "$head_address" | sed -n 's/.* src \([^ ]*\).*/\1/p')
fi
: "${ADDRESS:?no route to HEAD=$HEAD: set ADDRESS to the address of this machine}"
if [ -z "${INTERFACE:-}" ]; then
  INTERFACE=$(ip -oneline -4 address show \
    | awk -v a="$ADDRESS" '{ split($4, part, "/"); if (part[1] == a) { print $2; exit } }')
fi
: "${INTERFACE:?no interface has ADDRESS=$ADDRESS: set INTERFACE}"

is_host=false
[ "$ADDRESS" = "$head_address" ] && is_host=true
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun kills ranks that are still there so long after it passed a signal on; its default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_S:-600}
# Ranks that are started anew must not meet in the store of those before.
((${RESTARTS:-0} == 0)) || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "multi_node.sh: $ADDRESS on $INTERFACE, $PROCESSES ranks; $NODES machines meet at" \
  "$head_address:${PORT:-29400}" >&2

# Whoever starts this learns by the exit code that ranks were asked to save and leave: 143 (SIGTERM)
# or 130 (Ctrl-C, which a terminal sends to torchrun too); torchrun's own is 1.
asked=0
torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "$head_address:${PORT:-29400}" \
  --rdzv-id "${JOB:-rest-mega}" --rdzv-conf "is_host=$is_host" --local-addr "$ADDRESS" \
  -m rest_mega "${VERB:-train}" "$@" &
launcher=$!
trap 'asked=143; kill -TERM "$launcher" 2>/dev/null || true' TERM
trap 'asked=130' INT

# On a machine that is cut off ranks end by themselves, and torchrun asks the store of the meeting for
# ever, deaf to signals.
ranks_live() {
  local child
  for child in $(cat /proc/"$launcher"/task/*/children 2>/dev/null); do
    # A rank that torchrun has not asked for yet is a zombie.
    [[ $(sed 's/.*) //' /proc/"$child"/stat 2>/dev/null) == [!Z]* ]] && return
  done
  return 1
}
linger() {
  local seen=0 gone=0 limit=${LINGER_S:-$((${RESTARTS:-0} > 0 ? 900 : 60))}
  while sleep 1 && kill -0 "$launcher" 2>/dev/null; do
    if ranks_live; then
      seen=1 gone=0
    elif ((seen && ++gone > limit)); then
      # Ranks that are started anew must not meet in the store of those before.
((${RESTARTS:-0} == 0)) || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "multi_node.sh: ended torchrun, which stayed $limit s after its ranks (LINGER_S)" >&2
      kill -KILL "$launcher"
    fi
  done
}
linger &

code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal has ended `wait`, not torchrun
  code=0
  wait "$launcher" || code=$?
done
exit $((code != 0 && asked != 0 ? asked : code))
