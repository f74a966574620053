#!/usr/bin/env bash
# The small model as it ships: fine-tune the base by `llava quickstart`, then write it in half precision.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-runs/quickstart}
.venv/bin/llava quickstart --out "$out" "$@"
.venv/bin/llava export "$out/model" "$out/tiny" --dtype bfloat16
