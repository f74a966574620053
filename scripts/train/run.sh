#!/usr/bin/env bash
# Train as a config says, its stages one after the other: on one GPU, on all of a machine, or on several machines.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/train/run.sh CONFIG [key=value ...] [--dry-run]

  DATA_ROOT=data scripts/train/run.sh scripts/configs/ccexpert_0.5b.yaml
  NPROC=4 STAGES="pretraining sft" scripts/train/run.sh scripts/configs/ccexpert_7b.yaml report_to=[tensorboard]
  scripts/train/run.sh scripts/configs/ccexpert_7b.yaml --dry-run                 what would be done, and what it needs
  NNODES=2 RDZV_ENDPOINT=first-node:29500 scripts/train/run.sh CONFIG             the same on both machines

A stage that has ended before is passed over; one that was broken off goes on. SIGTERM and Ctrl-C save a checkpoint first.
Settings hold for all stages; stages.NAME.key=value is for one; model, fusion and vision_layers are for the first, from
which the later ones go on. CONFIG and the folders and files of the environment count from where the command is given,
paths in settings from the project's folder.

environment:
  DATA_ROOT       folder of the data (default: data in this project)
  OUT             folder of the run (default: as in CONFIG)
  MIXTURE         another mixture, where CONFIG asks for one
  NPROC           processes on each machine (default: the visible GPUs, or 1)
  STAGES          which stages, in this order (default: all of CONFIG)
  NNODES          machines (default: 1); they share OUT. With more than one, either
  RDZV_ENDPOINT   name:port of one of them, the same on all; RDZV_ID tells runs apart; or
  MASTER_ADDR     name of the first one, with NODE_RANK=0, 1, ... on each (MASTER_PORT: 29500)

In a container, batches reach the training through /dev/shm: a GB of it for each process (docker run --shm-size, --ipc=host).

exit status: 0 all done, 143 / 130 saved and left after SIGTERM / Ctrl-C, else that of the stage that failed
USAGE
}

fail() {
  echo "run.sh: $*" >&2
  exit 2
}

from_here() { # a path as it is seen from the project's folder
  if [[ $1 == /* || $(pwd -P) == "$root" ]]; then echo "$1"; else echo "$(pwd -P)/$1"; fi
}

# shellcheck disable=SC2329 # the traps call it
leave() { # signal, status
  left=$2
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

stage() {
  local status=0
  ((left == 0)) || exit "$left" # told to leave while nothing ran that could have been told
  set -m # a process group of its own: a signal of the terminal comes to it once, from here
  "${launch[@]}" "$@" </dev/null &
  child=$!
  set +m
  ((left == 0)) || kill -s TERM "$child" 2>/dev/null || true # it came before there was a child
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    status=0
    wait "$child" || status=$?
  done
  child=""
  ((left == 0)) || exit "$left"
  ((status == 0)) || exit "$status"
}

main() { # read whole before it begins: the file may change while a training runs
  if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    usage
    (($#)) && exit 0
    exit 2
  fi
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
  config=$(from_here "$1")
  shift
  [[ -f $config ]] || fail "there is no config $config"
  if [[ -n ${DATA_ROOT:-} ]]; then export DATA_ROOT && DATA_ROOT=$(from_here "$DATA_ROOT"); fi
  if [[ -n ${OUT:-} ]]; then export OUT && OUT=$(from_here "$OUT"); fi
  if [[ -n ${MIXTURE:-} ]]; then export MIXTURE && MIXTURE=$(from_here "$MIXTURE"); fi
  cd "$root" # configs name scripts/... from here

  dry=no
  for word in "$@"; do
    case $word in
      --dry-run) dry=yes ;;
      --stage | --stage=*) fail "say STAGES=\"...\" in place of --stage" ;;
    esac
  done

  python=$root/.venv/bin/python
  [[ -x $python ]] || python=python # installed elsewhere, such as in an active environment
  nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
  nnodes=${NNODES:-1}

  launch=("$python")
  if [[ $dry == no ]]; then
    launch+=(-m torch.distributed.run --nproc_per_node "$nproc")
    if ((nnodes == 1)); then
      launch+=(--standalone)
    elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
      launch+=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-llava}")
    else
      [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] || fail "NNODES=$nnodes needs RDZV_ENDPOINT, or MASTER_ADDR and NODE_RANK"
      launch+=(--nnodes "$nnodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
  fi
  launch+=(-m llava.train --config "$config")
  [[ $dry == yes ]] && launch+=(--processes "$((nproc * nnodes))")
  # how long torchrun lets a process save after SIGTERM before it kills it (its default is 30 seconds)
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
  # DeepSpeed calls torch by names that torch warns of, under ZeRO-3 in every layer of every step
  export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}

  child="" left=0
  trap 'leave TERM 143' TERM
  trap 'leave INT 130' INT
  trap 'leave TERM 129' HUP

  stages=${STAGES:-$("$python" -m llava.train --config "$config" --list-stages)}
  if [[ -z $stages ]]; then
    stage "$@"
  fi
  chained=()
  for name in $stages; do
    echo "run.sh: stage $name of $config, $nproc processes on each of $nnodes machines" >&2
    stage --stage "$name" "${chained[@]}" "$@"
    chained=(--chained)
  done
}

main "$@"
exit
