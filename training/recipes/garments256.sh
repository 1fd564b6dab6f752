#!/usr/bin/env bash
# From a checkout of the public Clothing dataset to a pipeline of 256 pixels that works on latents.
#
#   training/recipes/garments256.sh CLOTHING_DATASET_CHECKOUT WORK_DIR
#
# Each step resumes where it was stopped: run the same line again (`MINUTES=60` limits each step to that long). Without
# AVX-512 or a GPU the autoencoder takes an hour and the UNet days: 5 samples a second on one thread, a million in all.
# PERCEPTUAL names the network of the autoencoder's perceptual loss (see diffsketching_pipeline/training/perceptual_networks.py); `none` works, but blurs.
set -euo pipefail
checkout=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
cd "$(dirname "$0")/.."
configs=configs

common=(--train_data_dir "$work/garments288" --resume_from_checkpoint latest)
[ -n "${MINUTES:-}" ] && common+=(--max_train_minutes "$MINUTES")
perceptual=(--perceptual_network "${PERCEPTUAL:-none}")
cached=(--cache_dir "$work/cache" --pretrained_vae_model_name_or_path "$work/decoder/vae")

python prepare_garments.py "$checkout" "$work/garments288" --short_side 288

# 1. The autoencoder: encoder and decoder, then with a discriminator, then the decoder alone. From then on the encoder stays.
accelerate launch train_autoencoder.py $configs/autoencoder_garments256.yaml "${common[@]}" "${perceptual[@]}" \
  --max_train_steps 1000 --output_dir "$work/autoencoder-start"
accelerate launch train_autoencoder.py $configs/autoencoder_garments256.yaml "${common[@]}" "${perceptual[@]}" \
  --pretrained_model_name_or_path "$work/autoencoder-start/vae" --gan_weight 0.05 --max_train_steps 1400 \
  --lr_decay_steps 1050 --output_dir "$work/autoencoder"
accelerate launch train_autoencoder.py $configs/autoencoder_garments256.yaml "${common[@]}" "${perceptual[@]}" \
  --pretrained_model_name_or_path "$work/autoencoder/vae" --freeze_encoder true --gan_weight 0.1 --gan_ramp_steps 150 \
  --learning_rate 1e-3 --max_train_steps 700 --lr_decay_steps 500 --output_dir "$work/decoder"

# 2. The UNet on its latents, the classifier on the same.
accelerate launch train_unet.py $configs/unet_garments256.yaml "${common[@]}" "${cached[@]}" --output_dir "$work/unet"
accelerate launch train_classifier.py $configs/classifier_garments64.yaml "${common[@]}" "${cached[@]}" --resolution 256 \
  --unet_name_or_path "$work/unet/pipeline" --scheduler_name_or_path "$work/unet/pipeline" --output_dir "$work/classifier"

python assemble.py --unet "$work/unet/pipeline" --classifier "$work/classifier/classifier" --sketch_guidance_scale 2.0 \
  --eta 1.0 --output_dir "$work/garments-256"
