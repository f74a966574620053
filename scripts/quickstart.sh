#!/usr/bin/env bash
# From a fresh clone to a trained small model and its first captions. Arguments: see llava quickstart --help
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/env_prepare.sh"
exec "$root/.venv/bin/llava" quickstart "$@"
