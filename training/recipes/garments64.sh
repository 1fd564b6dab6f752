#!/usr/bin/env bash
# From a checkout of the public Clothing dataset to the bundled checkpoint garments-64.
#
#   training/recipes/garments64.sh CLOTHING_DATASET_CHECKOUT WORK_DIR
#
# Each step resumes where it was stopped: run the same line again. On a GPU the whole takes minutes to an hour; on two CPU
# cores several days of evenings, so stop and go on as you like (`MINUTES=60` limits each step to that long).
set -euo pipefail
checkout=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
cd "$(dirname "$0")/.."
configs=configs

common=(--train_data_dir "$work/garments" --cache_dir "$work/cache" --resume_from_checkpoint latest)
[ -n "${MINUTES:-}" ] && common+=(--max_train_minutes "$MINUTES")

python prepare_garments.py "$checkout" "$work/garments"

# Half the resolution first: four times the photos per second, and colours that hold together.
accelerate launch train_unet.py $configs/unet_garments64.yaml "${common[@]}" \
  --resolution 32 --train_batch_size 32 --max_train_steps 4000 --output_dir "$work/unet-32"
accelerate launch train_unet.py $configs/unet_garments64.yaml "${common[@]}" \
  --pretrained_model_name_or_path "$work/unet-32/pipeline" --output_dir "$work/unet-64"
accelerate launch train_classifier.py $configs/classifier_garments64.yaml "${common[@]}" \
  --unet_name_or_path "$work/unet-64/pipeline" --scheduler_name_or_path "$work/unet-64/pipeline" --output_dir "$work/classifier"
for encoder in sketch_encoder image_encoder evaluation; do
  accelerate launch train_encoders.py $configs/${encoder}_garments64.yaml "${common[@]}" --output_dir "$work/$encoder"
done
accelerate launch train_sketcher.py $configs/sketcher_garments64.yaml "${common[@]}" --output_dir "$work/sketcher"

python assemble.py --unet "$work/unet-64/pipeline" --classifier "$work/classifier/classifier" \
  --sketcher "$work/sketcher/sketcher" --sketch_encoder "$work/sketch_encoder/sketch_encoder" \
  --image_encoder "$work/image_encoder/image_encoder" --sketch_guidance_scale 2.0 --classifier_guidance_scale 6.0 --eta 1.0 \
  --output_dir "$work/garments-64"
