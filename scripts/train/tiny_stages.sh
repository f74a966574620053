#!/usr/bin/env bash
# Three stages of the tiny model on pairs drawn for it, by DeepSpeed's ZeRO-2 on two processes; no GPU is needed.
#   OUT: where pairs and models go (default: runs/tiny_stages)    PAIRS: to learn from (default: 64)    NPROC: processes
# Arguments are settings, key=value: deepspeed=null trains without DeepSpeed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-runs/tiny_stages} NPROC=${NPROC:-2}
export DATA_ROOT=$OUT/data
llava=.venv/bin/llava
[[ -x $llava ]] || llava=llava
"$llava" synth "$DATA_ROOT" --train "${PAIRS:-64}" --val 16
exec scripts/train/run.sh scripts/configs/tiny_stages.yaml "$@"
