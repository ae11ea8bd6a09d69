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
srcnn_rgb)
  h5 rgb "$scale" --num-channels 3
  stage rgb rgb "$scale" --batch-size 16 --steps 21000
  last=rgb
  if [ "$scale" = 2 ]; then
    stage rgb-second rgb 2 --init "$work/rgb/x2/best.pth" --lr 0.004 --steps 8000 --bf16 0.6
    last=rgb-second
  fi
  ;;
srcnn_photo | srcnn_photo-hq | srcnn_photo-luma | srcnn_photo-luma-hq)
  case $network in *luma*) first=jpeg-luma channels=1 ;; *) first=jpeg channels=3 ;; esac
  case $network in *-hq) range="65 100" ;; *) range="15 70" ;; esac
  h5 $first "$scale" --num-channels $channels --jpeg 15 100
  stage $first $first "$scale" --batch-size 16 --steps 21000
  h5 "$network" "$scale" --num-channels $channels --jpeg $range
  stage "$network" "$network" "$scale" --batch-size 16 --steps 5000 \
    --init "$work/$first/x$scale/best.pth" --lr 0.004
  last=$network
  ;;
*) echo "$name: unknown; $usage" >&2; exit 2 ;;
esac
cp "$work/$last/x$scale/best.pth" "$work/$name.pth"
echo "$work/$name.pth"
