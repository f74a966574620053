#!/usr/bin/env bash
# CC-Foundation, the mixture of CCExpert's first two stages: every part found below RAW to records below DATA_ROOT.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/data/cc_foundation.sh [options of llava data check]

  RAW=downloads DATA_ROOT=data scripts/data/cc_foundation.sh --json report.json

environment:
  DATA_ROOT   where the lists go: DATA_ROOT/PART/SPLIT.jsonl, as in scripts/configs/data/cc_foundation.yaml (default: data)
  RAW         what was downloaded, in folders of these names (default: DATA_ROOT):

  CC-Foundation          the release's own lists (..._universal.json) and images, linked from GitHub Meize0729/CCExpert,
                         which publishes a part of them. A list that is here goes before those below
  LEVIR-CC               see scripts/data/levir_cc.sh
  SYSU-CD                {train,val}/{A,B,label} of GitHub liumency/SYSU-CD; sysu_{train,val}_captions.json of techmn/cdchat
  SECOND-CC              GitHub ChangeCapsInRS/SecondCC: sentences by others on the images of SECOND
  Spot-the-diff          GitHub harsh19/spot-the-diff: annotations/ and resized_images/
  CLEVR-Change           GitHub Seth-Park/RobustChangeCaptioning: images/, sc_images/, nsc_images/ and three JSON files
  Image-Editing-Request  GitHub airsplay/VisualRelationships: {train,valid}.json and images/
  STVchrono              GitHub AuderySun/STVchrono: its JSON of image pairs and images/
  (ChangeSim, VisMin)    their captions are published with CC-Foundation alone

Images are neither copied nor moved. Lists that are there are kept. Where parts are missing, DATA_ROOT/cc_foundation.yaml is
the mixture without them: MIXTURE=DATA_ROOT/cc_foundation.yaml scripts/train/ccexpert_0.5b.sh

exit status: that of llava data check on the mixture; 1 without LEVIR-CC
USAGE
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
data=${DATA_ROOT:-data} raw=${RAW:-${DATA_ROOT:-data}}
llava=$root/.venv/bin/llava
[[ -x $llava ]] || llava=llava # installed elsewhere, such as in an active environment
say() { echo "cc_foundation.sh: $*" >&2; }

mkdir -p "$data"
images() { # FOLDER below RAW: as records name it, from DATA_ROOT on, or by its full path where it lies elsewhere
  local there base
  there=$(cd "$raw/$1" && pwd) || return
  base=$(cd "$data" && pwd)
  echo "${there#"$base"/}"
}

convert() { # NAME SOURCE FOLDER LIST [options]: one list, unless it is there
  local name=$1 source=$2 folder=$3 list=$data/$4 prefix
  shift 4
  [[ -f $list || ! -e $raw/$source ]] && return
  prefix=$(images "$folder") # without it the list would name no folder, and be kept
  "$llava" data convert "$name" "$raw/$source" --out "$list" --images "$prefix" --skip-faults "$@"
}

release() { # LIST NAME...: one list of CC-Foundation's own files, if they are all there
  local list=$data/$1 name found parts=()
  shift
  [[ ! -f $list && -d $raw/CC-Foundation ]] || return 0
  for name in "$@"; do
    # the release's script writes a second copy with absolute paths: the first is as good, and can be moved
    found=$(find "$raw/CC-Foundation" -name "$name" -not -path '*absolute_path*' -print -quit)
    [[ -n $found ]] || found=$(find "$raw/CC-Foundation" -name "$name" -print -quit)
    [[ -n $found ]] || return 0
    parts+=("$list.${name%.json}.jsonl")
    "$llava" data convert cc-foundation "$found" --out "${parts[-1]}" --images "$(images CC-Foundation)" --overwrite
  done
  cat "${parts[@]}" >"$list.part"
  mv "$list.part" "$list"
  rm "${parts[@]}"
}

for split in train val; do
  release "sysu_cd/$split.jsonl" "sysucd_${split}_universal.json"
  release "spot_the_diff/$split.jsonl" "spotthediff_${split}_universal.json"
  release "image_editing_request/$split.jsonl" "image_edit_request_${split}_universal.json"
  release "clevr_change/$split.jsonl" "CLEVIR_Change_${split}_"{change,nochange}_universal_random3.json
done
for split in train test; do
  release "changesim/$split.jsonl" "changesim_${split}_universal.json"
  release "stvchrono/$split.jsonl" "stvchrono_${split}_universal.json"
done
release second/train.jsonl second_allinone_multi_express_universal_format.json second_multi_view_universal_format.json
release vismin/train.jsonl Vismin_train_universal.json

if [[ -d $raw/LEVIR-CC && ! -f $data/levir_cc/train.jsonl ]]; then
  "$llava" data convert levir-cc "$raw/LEVIR-CC" --out "$data/levir_cc/{split}.jsonl" --images "$(images LEVIR-CC)"
fi
convert second-cc SECOND-CC SECOND-CC second/train.jsonl --split train
for split in train val; do
  convert sysu-cd "SYSU-CD/sysu_${split}_captions.json" SYSU-CD "sysu_cd/$split.jsonl"
  convert spot-the-diff "Spot-the-diff/annotations/$split.json" Spot-the-diff "spot_the_diff/$split.jsonl"
  convert clevr-change CLEVR-Change CLEVR-Change "clevr_change/$split.jsonl" --split "$split" --max-captions 3
  convert image-editing-request "Image-Editing-Request/${split/val/valid}.json" Image-Editing-Request/images \
    "image_editing_request/$split.jsonl"
done
for split in train test; do
  convert stvchrono STVchrono STVchrono/images "stvchrono/$split.jsonl" --split "$split"
done

# the mixture as it is shipped, and without the lines whose list is not there
mixture=$root/scripts/configs/data/cc_foundation.yaml
missing=()
while read -r list; do
  [[ -f $data/$list ]] || missing+=("$list")
done < <(grep -o '[a-z_]*/[a-z]*\.jsonl' "$mixture")
if ((${#missing[@]})); then
  say "not found below $raw (--help says where each comes from): ${missing[*]}"
  grep -vF "$(printf '%s\n' "${missing[@]}")" "$mixture" >"$data/cc_foundation.yaml.part"
  mv "$data/cc_foundation.yaml.part" "$data/cc_foundation.yaml"
  mixture=$data/cc_foundation.yaml
  say "the mixture of what there is: MIXTURE=$mixture"
fi
if [[ ! -f $data/levir_cc/test.jsonl ]]; then
  say "LEVIR-CC is missing, which every stage needs; see scripts/data/levir_cc.sh"
  exit 1
fi
exec "$llava" data check "$mixture" --test "$data"/levir_cc/{val,test}.jsonl --root "$data" "$@"
