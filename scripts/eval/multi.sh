#!/usr/bin/env bash
# The same on several cards of one machine, or of several machines that share the folder OUT: the same predictions,
# the same scores.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/eval/multi.sh DATA OUT [options of llava eval]

  GPUS=8 MODEL=runs/mine scripts/eval/multi.sh mixture.yaml runs/mine/eval --root data --dtype bfloat16
  GPUS=2 scripts/eval/multi.sh data/test.jsonl runs/tiny --device cpu                two processes without any card
  NODES=2 HEAD=first-node:29500 GPUS=8 scripts/eval/multi.sh test.jsonl shared/eval    the same on each of two machines

environment:
  GPUS    processes on this machine (default: the visible cards, or 1)
  MODEL   a folder, a hub id or a name of llava download --list (default: the model of the package)
  NODES   machines (default: 1)
  HEAD    name and port of the first machine, needed with NODES
USAGE
}

if (($# < 2)) || [[ $1 == -h || $1 == --help ]]; then
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0
  exit 2
fi
data=$1 out=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python # installed elsewhere, such as in an active environment

if [[ -z ${GPUS:-} ]]; then
  GPUS=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
launch=(--nproc_per_node "$GPUS")
if ((${NODES:-1} > 1)); then
  launch+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "${HEAD:?with NODES, HEAD=first-machine:port}")
else
  launch+=(--standalone)
fi

exec "$python" -m torch.distributed.run "${launch[@]}" \
  -m llava.eval --data "$data" --out "$out" ${MODEL:+--model "$MODEL"} "$@"
