#!/usr/bin/env bash
# CCExpert-7b with low-rank updates of its language model, on one large card or more.
#   DATA_ROOT: folder that scripts/data/ has filled (default: data)    NPROC: GPUs of this machine to use (default: all)
# Arguments are settings, key=value, or --dry-run; stages, machines and the rest: scripts/train/run.sh --help
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$(dirname "${BASH_SOURCE[0]}")/../configs/lora_7b.yaml" "$@"
