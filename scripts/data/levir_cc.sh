#!/usr/bin/env bash
# LEVIR-CC to records: DATA_ROOT/levir_cc/{train,val,test}.jsonl, what every config learns from and is scored on.
#   RAW: folder that holds LEVIR-CC as published (default: DATA_ROOT)    DATA_ROOT: where lists go (default: data)
# RAW/LEVIR-CC needs images/{train,val,test}/{A,B} and LevirCCcaptions.json: hub data set lcybuaa/LEVIR-CC, or GitHub
# Chen-Yang-Liu/LEVIR-CC-Dataset. Images are neither copied nor moved. Lists that are there are kept.
set -euo pipefail

data=${DATA_ROOT:-data} raw=${RAW:-${DATA_ROOT:-data}}
llava=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)/.venv/bin/llava
[[ -x $llava ]] || llava=llava # installed elsewhere, such as in an active environment

if [[ ! -f $data/levir_cc/train.jsonl ]]; then
  [[ -d $raw/LEVIR-CC ]] || { echo "levir_cc.sh: there is no $raw/LEVIR-CC; see the head of this script" >&2 && exit 1; }
  mkdir -p "$data"
  base=$(cd "$data" && pwd) images=$(cd "$raw/LEVIR-CC" && pwd) # records name images from DATA_ROOT on, if they lie there
  "$llava" data convert levir-cc "$raw/LEVIR-CC" --out "$data/levir_cc/{split}.jsonl" --images "${images#"$base"/}"
fi
exec "$llava" data check "$data/levir_cc/train.jsonl" "$data/levir_cc/val.jsonl" --test "$data/levir_cc/test.jsonl" \
  --root "$data" "$@"
