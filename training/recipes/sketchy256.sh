#!/usr/bin/env bash
# The paper's setting: ImageNet's class-conditional ADM at 256x256, fine-tuned on Sketchy. See sketchy256.md.
#
#   training/recipes/sketchy256.sh WEIGHTS_DIR SKETCHY_DIR WORK_DIR [options of accelerate launch]
#
# WEIGHTS_DIR has 256x256_diffusion.pt and 256x256_classifier.pt of openai/guided-diffusion and latest_net_G.pth of
# mtli/PhotoSketch; SKETCHY_DIR is the folder `256x256` of Sketchy. Each step that is done is left out when the same line is
# run again, and training goes on from its last checkpoint.
set -euo pipefail
weights=$(realpath "$1")
sketchy=$(realpath "$2")
mkdir -p "$3"
work=$(realpath "$3")
launch=("${@:4}")
training=$(realpath "$(dirname "$0")/..")
# Which of Sketchy's renderings: drawings have to lie on their photo as they were drawn on it.
photos=${PHOTOS:-$sketchy/photo/tx_000000000000}
drawings=${DRAWINGS:-$sketchy/sketch/tx_000000000000}

[ -d "$work/adm-256" ] || diffsketching convert-guided-diffusion --preset 256 --sketch-channel \
  --unet-checkpoint "$weights/256x256_diffusion.pt" --classifier-checkpoint "$weights/256x256_classifier.pt" \
  --output-dir "$work/adm-256"
[ -d "$work/photosketch" ] || diffsketching convert-photosketch "$weights/latest_net_G.pth" --output-dir "$work/photosketch"
[ -d "$work/pretrained" ] || python "$training/assemble.py" --unet "$work/adm-256" --classifier "$work/adm-256/classifier" \
  --sketcher "$work/photosketch" --save_dtype float32 --output_dir "$work/pretrained"
[ -d "$work/pairs" ] || python "$training/prepare_sketchy.py" --photo_dir "$photos" --sketch_dir "$drawings" --output_dir "$work/pairs"

accelerate launch "${launch[@]}" "$training/finetune_diffsketching.py" \
  "$training/configs/finetune_sketchy256.yaml" \
  --pretrained_model_name_or_path "$work/pretrained" --train_data_dir "$work/pairs" --cache_dir "$work/cache" \
  --resume_from_checkpoint latest --output_dir "$work/finetuned"
