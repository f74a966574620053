#!/usr/bin/env bash
# Pretrain the tiny base (tower and language model) on single synthetic images and text: what ships as "tiny-base".
# TEXTS: captions for wording, JSON Lines with a "captions" list (LEVIR-CC's, for the shipped base); optional.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
options=(--out "${OUT:-runs/tiny_base}")
[[ -n ${TEXTS:-} ]] && options+=(--texts "$TEXTS")
exec .venv/bin/python -m llava.train.tiny "${options[@]}" "$@"
