#!/usr/bin/env bash
# DeltaVLM, instruction-tuned on ChangeChat-105k as its released code does it.
#   DATA_ROOT: folder that scripts/data/ has filled (default: data)    NPROC: GPUs of this machine to use (default: all)
# Arguments are settings, key=value, or --dry-run; machines and the rest: scripts/train/run.sh --help
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$(dirname "${BASH_SOURCE[0]}")/../configs/deltavlm_release.yaml" "$@"
