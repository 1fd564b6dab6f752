#!/usr/bin/env bash
# What should the UNet of 256 pixels denoise, and how should it learn? Candidates of equal time, judged on the tune half.
#
#   training/recipes/bake_off_256.sh GARMENTS288 DRAWINGS WORK_DIR
#
# GARMENTS288 is made by prepare_garments.py with `--short_side 288`. Each UNet trains for MINUTES (20); the time of the
# autoencoders is not counted, nor that of encoding. Each step resumes where it was stopped: run the same line again. CROPS (1)
# says how many crops of each photo are encoded. The table is in WORK_DIR/table/metrics.md.
set -euo pipefail
photos=$(realpath "$1")
drawings=$(realpath "$2")
mkdir -p "$3"
work=$(realpath "$3")
cd "$(dirname "$0")/.."
configs=configs

common=(--train_data_dir "$photos" --resume_from_checkpoint latest)
perceptual=(--perceptual_network "${PERCEPTUAL:-none}")
unet=(--cache_dir "$work/cache" --crops_per_photo "${CROPS:-1}" --max_train_minutes "${MINUTES:-20}" --validation_steps 0)

# 1. What stands in the place of the committed autoencoder: one of 4 channels, trained as that of 8 was, and none.
accelerate launch train_autoencoder.py $configs/autoencoder_garments256.yaml "${common[@]}" "${perceptual[@]}" \
  --latent_channels 4 --max_train_steps 1000 --output_dir "$work/autoencoder4-start"
accelerate launch train_autoencoder.py $configs/autoencoder_garments256.yaml "${common[@]}" "${perceptual[@]}" \
  --latent_channels 4 --pretrained_model_name_or_path "$work/autoencoder4-start/vae" --gan_weight 0.05 \
  --max_train_steps 1400 --lr_decay_steps 1050 --output_dir "$work/autoencoder4"
python - "$work/folded" <<'PY'
import sys

from diffsketching_pipeline import FoldedPixels

FoldedPixels(scaling_factor=0.5).save_pretrained(sys.argv[1])
PY

# 2. The candidates. The first two differ in the seed alone: a difference no larger than theirs is a tie.
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${unet[@]}" \
  --pretrained_vae_model_name_or_path checkpoints/garments-256/vae --output_dir "$work/latents8"
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${unet[@]}" --seed 1 \
  --pretrained_vae_model_name_or_path checkpoints/garments-256/vae --output_dir "$work/latents8-seed1"
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${unet[@]}" \
  --optimizer adamw --learning_rate 6e-4 \
  --pretrained_vae_model_name_or_path checkpoints/garments-256/vae --output_dir "$work/latents8-adamw"
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${unet[@]}" \
  --pretrained_vae_model_name_or_path "$work/autoencoder4/vae" --output_dir "$work/latents4"
# What is predicted is the photo: its error says more than that of the noise of 192 channels.
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${unet[@]}" \
  --prediction_type sample --snr_gamma 5 \
  --pretrained_vae_model_name_or_path "$work/folded" --output_dir "$work/folded-pixels"

# 3. Photos of the drawings of the tune half, the class given, and one table of all of them.
judged=(--sketches "$drawings" --reference "$photos/validation" --train "$photos/train" --split tune --resolution 256)
judged+=(--evaluator ${EVALUATORS:-evaluators/garments-64})
images=()
for run in latents8 latents8-seed1 latents8-adamw latents4 folded-pixels; do
  python evaluate.py "${judged[@]}" --model "$work/$run/pipeline" --class_labels folder --sketch_guidance_scale 2 --eta 1 \
    --num_bootstrap_samples 10 --output_dir "$work/evaluation/$run"
  images+=("$run=$work/evaluation/$run/images/generated")
done
python evaluate.py "${judged[@]}" --images "${images[@]}" --output_dir "$work/table"
