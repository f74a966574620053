#!/usr/bin/env bash
# CCExpert-0.5b in its three stages.
#   DATA_ROOT: folder that scripts/data/ has filled (default: data)    NPROC: GPUs of this machine to use (default: all)
# Arguments are settings, key=value, or --dry-run; stages, machines and the rest: scripts/train/run.sh --help
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$(dirname "${BASH_SOURCE[0]}")/../configs/ccexpert_0.5b.yaml" "$@"
