#!/usr/bin/env bash
# What each constraint of the paper (eqs. 5-7) adds to garments-64, and how many photos it takes. See finetune_garments64.md.
#
#   training/recipes/finetune_garments64.sh PIPELINE GARMENTS DRAWINGS WORK_DIR [options of finetune_diffsketching.py]
#
# PIPELINE has all components, image_encoder included; GARMENTS is what prepare_garments.py wrote; DRAWINGS are drawings by
# people, `<class>/<name>.png`. Run the same line again after a stop: training and evaluation go on where they were.
# `JOBS=2` runs two at a time; `SPLIT` chooses the half of the drawings, `DTYPE` and `STEPS` how their photos are sampled.
set -euo pipefail
pipeline=$(realpath "$1") garments=$(realpath "$2") drawings=$(realpath "$3")
mkdir -p "$4"
work=$(realpath "$4")
options=("${@:5}")
cd "$(dirname "$0")/.."

wait_for() { # until fewer than this many run; one that fails ends the script
  while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do wait -n; done
}

in_parallel() {
  wait_for "${JOBS:-1}"
  "$@" &
}

finetune() { # name, what sets it apart
  [ -d "$work/$1/pipeline" ] || python finetune_diffsketching.py configs/finetune_garments64.yaml \
    --pretrained_model_name_or_path "$pipeline" --train_data_dir "$garments" --cache_dir "$work/cache" \
    --resume_from_checkpoint latest --output_dir "$work/$1" "${@:2}" "${options[@]}" > "$work/$1.log" 2>&1
}

score() { # name of the result, pipeline, what sets it apart
  [ -f "$work/evaluation/$1/metrics.json" ] || python evaluate.py --model "$2" --sketches "$drawings" \
    --reference "$garments/validation" --train "$garments/train" --evaluator evaluators/garments-64 \
    --cache_dir "$work/cache" --split "${SPLIT:-report}" --num_images_per_sketch 1 --dtype "${DTYPE:-float32}" \
    --num_inference_steps "${STEPS:-25}" --perceptual_sketch_distance true --output_dir "$work/evaluation/$1" "${@:3}" > "$work/evaluation-$1.log" 2>&1
}

# The first run inverts the photos that all of them see.
finetune both
in_parallel finetune perceptual --identity_weight 0
in_parallel finetune identity --identity_weight 1
for photos in 16 64 256; do
  in_parallel finetune "photos-$photos" --max_train_samples "$photos"
done
wait_for 1

for name in pretrained perceptual identity both photos-16 photos-64 photos-256; do
  model=$work/$name/pipeline
  [ "$name" = pretrained ] && model=$pipeline
  in_parallel score "$name" "$model" --classifier_guidance_scale 0
  [[ $name == photos-* ]] || in_parallel score "$name-classifier" "$model"
  [[ $name == photos-* || $name == perceptual || $name == identity ]] ||
    in_parallel score "$name-free-hand" "$model" --free_hand_strength 1
done
wait_for 1
