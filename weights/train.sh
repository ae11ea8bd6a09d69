#!/usr/bin/env bash
# Train one of the weights in this folder: bash weights/train.sh srcnn_x3 [folder]
# Writes FOLDER/NAME.pth (default: weights/work). Stages of other files that a file starts from are
# trained first; stopped runs are resumed. Needs data/T91 (python prepare.py --download data).
set -euo pipefail
cd "$(dirname "$0")/.."
usage="name a file: srcnn_x2, srcnn_9-1-5_x3, srcnn_rgb_x4, srcnn_photo_x2, srcnn_photo-luma-hq_x3, ..."
name=${1:-}
work=${2:-weights/work}
scale=${name##*_x}
network=${name%_x*}
case $scale in 2 | 3 | 4) ;; *) echo "$usage; it ends in _x2, _x3 or _x4" >&2; exit 2 ;; esac
mkdir -p "$work"

h5() { # h5 NAME SCALE FLAGS...: the patches of T91
  local file="$work/$1_x$2.h5"
  [ -e "$file" ] || python prepare.py --images-dir data/T91 --output-path "$file" --scale "$2" \
    --patch-size 64 --stride 24 --shrink 0.9 0.8 0.7 0.6 "${@:3}"
}
stage() { # stage RUN H5 SCALE FLAGS...: $work/RUN/xSCALE/best.pth
  echo "== $1 x$3"
  python train.py --recipe fast --train-file "$work/$2_x$3.h5" --scale "$3" \
    --outputs-dir "$work/$1" --auto-resume --batch-size 8 "${@:4}"
}

case $network in
srcnn)
  h5 luma 3
  stage first luma 3 --num-epochs 16
  init="--init $work/first/x3/best.pth"
  h5 luma "$scale"
  case $scale in
  2)
    stage second luma 2 $init --steps 20000 --bf16 0.8
    stage third luma 2 --init "$work/second/x2/best.pth" --lr 0.004 --steps 7000 --bf16 0.3
    last=third
    ;;
  3) stage second luma 3 $init --lr 0.004 --steps 16000 --bf16 0.6; last=second ;;
  4) stage second luma 4 $init --steps 20000 --bf16 0.85; last=second ;;
  esac
  ;;
srcnn_9-1-5)
  small="--kernel-sizes 9 1 5"
  h5 luma 3
  stage small luma 3 $small --steps 40000
  last=small
  if [ "$scale" != 3 ]; then
    h5 luma "$scale"
    stage small luma "$scale" $small --init "$work/small/x3/best.pth" --steps 16000
  fi
  ;;
srcnn_rgb | srcnn_photo | srcnn_photo-hq | srcnn_photo-luma | srcnn_photo-luma-hq)
  flags=()
  case $network in *luma*) ;; *) flags+=(--num-channels 3) ;; esac
  last=${network%-hq}
  case $network in srcnn_rgb) jpeg=() ;; *) jpeg=(--jpeg 15 100) ;; esac
  h5 "$last" "$scale" "${flags[@]}" "${jpeg[@]}"
  stage "$last" "$last" "$scale" --batch-size 16 --steps 21000
  lower=(--init "$work/$last/x$scale/best.pth" --lr 0.004) # half the learning rate
  case $name in
  srcnn_rgb_x2)
    stage rgb-second srcnn_rgb 2 "${lower[@]}" --steps 8000 --bf16 0.6
    last=rgb-second
    ;;
  *-hq_*)
    h5 "$network" "$scale" "${flags[@]}" --jpeg 65 100
    stage "$network" "$network" "$scale" --batch-size 16 "${lower[@]}" --steps 5000
    last=$network
    ;;
  esac
  ;;
*) echo "$name: unknown; $usage" >&2; exit 2 ;;
esac
cp "$work/$last/x$scale/best.pth" "$work/$name.pth"
echo "$work/$name.pth"
