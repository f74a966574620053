#!/usr/bin/env bash
# The baseline without fusion: LLaVA-OneVision-7b fine-tuned on LEVIR-CC.
#   DATA_ROOT: folder that scripts/data/ has filled (default: data)    NPROC: GPUs of this machine to use (default: all)
# Arguments are settings, key=value, or --dry-run; stages, machines and the rest: scripts/train/run.sh --help
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$(dirname "${BASH_SOURCE[0]}")/../configs/baseline_7b.yaml" "$@"
