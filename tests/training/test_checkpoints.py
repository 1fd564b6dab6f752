# SPDX-License-Identifier: Apache-2.0
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from testing_utils import TRAINING
from torchvision.transforms.functional import pil_to_tensor
from train_unet import UNetTrainingArguments, check_unet_arguments, make_unet

from diffsketching_pipeline.autoencoding import encode_photos, get_scale_factor
from diffsketching_pipeline.manifest import check_manifest, listed_files
from diffsketching_pipeline.training.arguments import parse_args
from diffsketching_pipeline.training.latents import load_vae
from diffsketching_pipeline.training.reconstruction import reconstruct, reconstruction_metrics


FOLDER = TRAINING / "checkpoints" / "garments-256"


def picture_of_a_shirt():
    """A blue shape with a seam on a light ground, `[1, 3, 256, 256]` in [-1, 1]."""
    picture = Image.new("RGB", (256, 256), (225, 220, 210))
    draw = ImageDraw.Draw(picture)
    draw.polygon(
        [(60, 50), (196, 50), (236, 110), (200, 120), (200, 220), (56, 220), (56, 120), (20, 110)], (60, 80, 150)
    )
    draw.line([(128, 50), (128, 220)], (30, 40, 90), 3)
    return (pil_to_tensor(picture).float() / 127.5 - 1)[None]


def test_the_committed_autoencoder_keeps_a_picture_and_is_what_its_sums_say():
    check_manifest(FOLDER, listed_files(FOLDER), "garments-256")
    weights = load_file(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    vae = load_vae(str(FOLDER / "vae"))
    photo = picture_of_a_shirt()
    assert get_scale_factor(vae) == 8
    with torch.no_grad():
        latents = encode_photos(vae, photo)
    assert latents.shape == (1, 8, 32, 32) and 0.2 < float(latents.std()) < 3
    assert reconstruction_metrics(reconstruct(vae, photo), photo)["psnr"] > 24


def test_the_recipe_makes_a_unet_for_it_of_at_most_18_million_parameters():
    args = parse_args(UNetTrainingArguments, [str(TRAINING / "configs" / "unet_garments256.yaml")])
    check_unet_arguments(args)
    with torch.device("meta"):
        unet = make_unet(args, {i: str(i) for i in range(15)}, load_vae(str(FOLDER / "vae")))
    assert unet.config.in_channels == 8 + 64 + 1 and unet.config.sample_size == 32
    assert sum(parameter.numel() for parameter in unet.parameters()) <= 18_000_000
