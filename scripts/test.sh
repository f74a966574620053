#!/usr/bin/env bash
# Everything a change must pass: ruff, mypy, pytest. Arguments go to pytest: scripts/test.sh tests/data -k caption
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
./env_prepare.sh || exit

# An environment that is active in the calling shell must not reach the checks.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV
export PATH="$PWD/.venv/bin:$PATH"

failed=""
ruff check . || failed+=" ruff"
mypy || failed+=" mypy"
pytest "$@"
status=$?
if [[ -n $failed ]]; then # said last: pytest's own closing line may well be green
  echo "failed besides the tests:$failed" >&2
  ((status)) || status=1
fi
exit "$status"
