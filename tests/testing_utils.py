# SPDX-License-Identifier: Apache-2.0
"""Tiny but real components, and the formulas that several test files compare with."""

import signal
import subprocess
import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import NoisyImageClassifier, PhotoSketcher


ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "training"
FIXTURES = ROOT / "tests" / "fixtures"

SIZE = 16
ID2LABEL = {0: "a", 1: "b", 2: "c"}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")


def make_unet(in_channels=4, out_channels=3, num_class_embeds=4, sample_size=SIZE):
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=DOWN_BLOCKS,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_class_embeds,
        **BLOCKS,
    )


def make_resnet(num_channels, num_labels=3):
    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=num_labels,
    )
    return ResNetForImageClassification(config)


def make_scheduler(**options):
    options = {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
        **options,
    }
    return DDIMScheduler(**options)


LATENT_SIZE, LATENT_CHANNELS, FACTOR = 8, 4, 4
PIXEL_SIZE = FACTOR * LATENT_SIZE
VAE_SCALE, VAE_SHIFT = 1.5, 0.1


def make_vae(factor=FACTOR, latent_channels=LATENT_CHANNELS, width=8):
    """An `AutoencoderTiny` that was never trained, whose photos and latents have a deviation that is not tiny."""
    levels = factor.bit_length()
    blocks = {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    widths = {f"{part}_block_out_channels": (width,) * levels for part in ("encoder", "decoder")}
    vae = AutoencoderTiny(
        latent_channels=latent_channels, scaling_factor=VAE_SCALE, shift_factor=VAE_SHIFT, **blocks, **widths
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        # A photo is 2 x - 1 of what this layer makes: gray, give or take.
        vae.decoder.layers[-1].weight.mul_(0.05)
        vae.decoder.layers[-1].bias.fill_(0.5)
    return vae


COMPONENTS = {
    "classifier": lambda: NoisyImageClassifier(
        sample_size=SIZE, num_classes=len(ID2LABEL), down_block_types=DOWN_BLOCKS, **BLOCKS
    ),
    "sketcher": lambda: PhotoSketcher(ngf=4, n_blocks=1),
    "sketch_encoder": lambda: make_resnet(1),
    "image_encoder": lambda: make_resnet(3),
}


LATENT_COMPONENTS = {
    **COMPONENTS,
    "classifier": lambda: NoisyImageClassifier(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        num_classes=len(ID2LABEL),
        down_block_types=DOWN_BLOCKS,
        **BLOCKS,
    ),
    "vae": make_vae,
}
# x_t, the drawing folded by the autoencoder's factor, and a plane for `sketch_abstraction`.
LATENT_UNET = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS + FACTOR**2 + 1,
    "out_channels": LATENT_CHANNELS,
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine_alphas_cumprod(num_train_timesteps=1000):
    """ᾱ of `squaredcos_cap_v2` from the formula of Nichol & Dhariwal (2021), float64."""
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alphas = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    return torch.cumprod(1 - (1 - alphas[1:] / alphas[:-1]).clamp(max=0.999), dim=0)


def directional_derivatives(function, x, num_directions=24, step=1e-7):
    """
    Central differences of `function(batch, row)`, one number per row of a float64 batch, at each row of `x`.

    Returns random directions `[len(x), num_directions, ...]` and the derivatives along them `[len(x), num_directions]`.
    """
    directions = randn(len(x), num_directions, *x.shape[1:], seed=11, dtype=torch.float64)
    derivatives = torch.zeros(len(x), num_directions, dtype=torch.float64)
    with torch.no_grad():
        for row in range(len(x)):
            steps = step * directions[row]
            plus, minus = function(torch.cat([x[row] + steps, x[row] - steps]), row).chunk(2)
            derivatives[row] = (plus - minus) / (2 * step)
    return directions, derivatives


def along(gradient, directions):
    """Derivatives along `directions` that a gradient predicts, `[len(gradient), num_directions]`."""
    return torch.einsum("nchw,nkchw->nk", gradient.double(), directions)


def kill_when(condition, command, env):
    """Launches a script and kills it (-9) as soon as `condition()` holds; it may not have ended before."""
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
