# SPDX-License-Identifier: Apache-2.0
"""Trains the autoencoder of a latent pipeline: photos of 256 pixels to a grid of 32 x 32 latents and back.

    accelerate launch training/train_autoencoder.py training/configs/autoencoder_garments256.yaml --train_data_dir DIR

Photos are seen in random crops. The loss is L1, a distance in the features of a frozen network, and a PatchGAN's opinion
once the rest is learned (Esser et al., 2021); the latents are kept small and somewhat noisy, so that a diffusion model has
an easy space to work in. The result, with averaged weights, is `output_dir/vae`, whose `shift_factor` and
`scaling_factor` bring the latents of the training photos to mean 0 and variance 1.

A second phase with `--freeze_encoder true --pretrained_model_name_or_path OUTPUT_DIR/vae` makes the decoder sharper and
leaves the latents as they are: a UNet that was trained on them can go on with the new decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from diffsketching_pipeline.autoencoding import get_scale_factor
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import TrainingArguments, parse_args, resolve_data_dir
from diffsketching_pipeline.training.discriminators import PatchDiscriminator, discriminator_distance
from diffsketching_pipeline.training.modules import load_pretrained
from diffsketching_pipeline.training.perceptual_networks import load_perceptual_network, perceptual_distance
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.reconstruction import PhotoDataset, reconstruct, reconstruction_metrics
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.trainer import Trainer


@dataclass
class AutoencoderArguments(TrainingArguments):
    """The arguments that this script adds to [`TrainingArguments`]."""

    output_dir: str = argument("diffsketching-autoencoder", "where checkpoints, samples, logs and `vae` are written")
    resolution: int = argument(128, "side of the training crops in pixels")
    validation_resolution: int = argument(256, "side of the validation photos in pixels")

    latent_channels: int = argument(8, "channels of the latents")
    block_out_channels: list[int] = argument(
        [32, 32, 32, 32], "channels at each resolution of encoder and decoder, all the same; each further one halves"
    )
    num_encoder_blocks: list[int] = argument([1, 2, 3, 3], "AutoencoderTiny's `num_encoder_blocks`")
    num_decoder_blocks: list[int] = argument([3, 3, 2, 1], "AutoencoderTiny's `num_decoder_blocks`")
    freeze_encoder: bool = argument(False, "train the decoder alone; needs `pretrained_model_name_or_path`")

    l1_weight: float = argument(1.0, "weight of the L1 distance")
    perceptual_weight: float = argument(0.1, "weight of the distance in features of `perceptual_network`")
    perceptual_network: str = argument(
        "none", "none, lpips:alex|vgg|squeeze, squeezenet:FILE, or the folder of an image model of transformers"
    )
    latent_weight: float = argument(1e-3, "weight of the mean square of the latents")
    latent_noise: float = argument(0.05, "standard deviation of the noise that the decoder has to overlook")
    gan_weight: float = argument(0.0, "weight of the adversarial term; 0 trains no discriminator")
    gan_start_step: int = argument(0, "step from which the adversarial term counts, a little at first")
    gan_ramp_steps: int = argument(1000, "steps from there until it counts with its full weight")
    discriminator_name_or_path: str | None = argument(
        None,
        "start from the discriminator in this folder, that of a first phase say; the two arguments below are its own",
    )
    ndf: int = argument(32, "channels of the discriminator's first convolution")
    discriminator_layers: int = argument(3, "halvings of the discriminator; 3 look at patches of 70 pixels")

    adam_beta2: float = argument(0.95, "AdamW's beta 2")
    adam_weight_decay: float = argument(0.0, "AdamW's weight decay")
    num_validation_photos: int = argument(64, "validation photos measured while it trains; all of them at the end")
    num_validation_images: int = argument(8, "validation photos in the picture")


def check_autoencoder_arguments(args: AutoencoderArguments) -> None:
    """Raises `ValueError` for sizes that do not fit, negative weights, or a frozen encoder that was never trained."""
    widths = set(args.block_out_channels)
    if len(widths) != 1:
        raise ValueError(f"`block_out_channels` must be one width throughout, but got {args.block_out_channels}.")
    for name in ("num_encoder_blocks", "num_decoder_blocks"):
        if len(getattr(args, name)) != len(args.block_out_channels):
            raise ValueError(
                f"`{name}` must have {len(args.block_out_channels)} entries, but got {getattr(args, name)}."
            )
    factor = 2 ** (len(args.block_out_channels) - 1)
    for name in ("resolution", "validation_resolution"):
        if getattr(args, name) % factor:
            raise ValueError(f"`{name}` must be a multiple of {factor}, but got {getattr(args, name)}.")
    for name in ("l1_weight", "perceptual_weight", "latent_weight", "latent_noise", "gan_weight", "gan_start_step"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` must be at least 0, but got {getattr(args, name)}.")
    for name in ("num_validation_photos", "latent_channels", "gan_ramp_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {getattr(args, name)}.")
    if args.freeze_encoder and args.pretrained_model_name_or_path is None:
        raise ValueError("`freeze_encoder` needs `pretrained_model_name_or_path`, whose encoder is kept.")


class TrainableAutoencoder(AutoencoderTiny):
    """`AutoencoderTiny` with a forward to train by: its own rounds the latents to bytes, which no gradient passes."""

    def forward(self, photos: Tensor, latent_noise: float = 0.0) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Reconstructions of photos `[B, 3, H, W]` in [-1, 1], and their latents `[B, C, H / f, W / f]`."""
        latents = self.encoder(photos)
        return self.decoder(latents + latent_noise * torch.randn_like(latents)), latents

    def plain(self) -> AutoencoderTiny:
        """The same weights as an `AutoencoderTiny`, as it is saved and shared."""
        plain = AutoencoderTiny.from_config(self.config)
        plain.load_state_dict(self.state_dict())
        return (plain if plain.dtype == self.dtype else plain.to(dtype=self.dtype)).eval()


def make_models(args: AutoencoderArguments) -> dict[str, nn.Module]:
    """
    The autoencoder, new or that of `pretrained_model_name_or_path`, and where `gan_weight` is not 0 a discriminator.

    Raises:
        ValueError: the pretrained one has other latent channels or another factor than this run.
    """
    torch.manual_seed(args.seed)
    if args.pretrained_model_name_or_path is not None:
        vae = load_pretrained(TrainableAutoencoder, args.pretrained_model_name_or_path, "vae")
        wanted = (args.latent_channels, 2 ** (len(args.block_out_channels) - 1))
        found = (vae.config.latent_channels, get_scale_factor(vae))
        if found != wanted:
            raise ValueError(
                f"`pretrained_model_name_or_path` must have (latent channels, factor) {wanted} as the other arguments say, "
                f"but {args.pretrained_model_name_or_path!r} has {found}."
            )
    else:
        vae = TrainableAutoencoder(
            latent_channels=args.latent_channels,
            encoder_block_out_channels=tuple(args.block_out_channels),
            decoder_block_out_channels=tuple(args.block_out_channels),
            num_encoder_blocks=tuple(args.num_encoder_blocks),
            num_decoder_blocks=tuple(args.num_decoder_blocks),
        )
    vae.encoder.requires_grad_(not args.freeze_encoder)
    models: dict[str, nn.Module] = {"vae": vae.to(memory_format=torch.channels_last)}
    if args.gan_weight > 0:
        if args.discriminator_name_or_path is not None:
            discriminator = load_pretrained(PatchDiscriminator, args.discriminator_name_or_path, "discriminator")
        else:
            discriminator = PatchDiscriminator(in_channels=3, ndf=args.ndf, n_layers=args.discriminator_layers)
        # The discriminator first: it learns from the reconstructions that the autoencoder is then corrected for.
        models = {"discriminator": discriminator.to(memory_format=torch.channels_last)} | models
    return models


def autoencoder_losses(
    trainer: Trainer, args: AutoencoderArguments
) -> dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]]:
    """The least-squares GAN's loss of the discriminator (Mao et al., 2017), if there is one, then the autoencoder's."""
    network = load_perceptual_network(args.perceptual_network)
    if network is not None:
        network = network.to(trainer.accelerator.device).to(memory_format=torch.channels_last)

    def gan_share() -> float:
        """0 before `gan_start_step`, 1 from `gan_ramp_steps` later on."""
        return min(max((trainer.global_step - args.gan_start_step) / args.gan_ramp_steps, 0.0), 1.0)

    def discriminator_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        real = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        if gan_share() == 0:  # nothing to learn yet; one forward all the same, because DDP waits for it
            real = real[:1]
        with torch.no_grad(), trainer.accelerator.autocast():
            fake = trainer.unwrap("vae")(real, args.latent_noise)[0]
        loss = discriminator_distance(trainer.modules["discriminator"](torch.cat([real, fake.to(real)])).float())
        return {"loss": loss if gan_share() > 0 else 0 * loss}

    def autoencoder_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        photos = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        reconstructions, latents = trainer.modules["vae"](photos, args.latent_noise)
        reconstructions = reconstructions.float()
        l1 = (reconstructions - photos).abs().mean()
        loss = args.l1_weight * l1 + args.latent_weight * latents.float().square().mean()
        outputs = {"l1": l1}
        if network is not None and args.perceptual_weight > 0:
            with trainer.accelerator.autocast():
                perceptual = perceptual_distance(network, reconstructions, photos).mean()
            loss = loss + args.perceptual_weight * perceptual
            outputs["perceptual"] = perceptual
        if args.gan_weight > 0 and gan_share() > 0:
            with trainer.accelerator.autocast():
                scores = trainer.unwrap("discriminator")(reconstructions).float()
            adversarial = (scores - 1).square().mean()
            loss = loss + gan_share() * args.gan_weight * adversarial
            outputs["adversarial"] = adversarial
        return {"loss": loss, **outputs}

    return (
        {"discriminator": discriminator_loss, "vae": autoencoder_loss}
        if args.gan_weight > 0
        else {"vae": autoencoder_loss}
    )


@torch.no_grad()
def measure_latents(
    vae: Any, dataset: PhotoDataset, num_photos: int = 1024, batch_size: int = 8
) -> tuple[float, float]:
    """
    `shift_factor` and `scaling_factor` with which (latents - shift) * scale has mean 0 and variance 1 over photos.

    Args:
        vae: an autoencoder; its own two factors are not used.
        dataset: photos without augmentation; at most `num_photos` of them, evenly spread, are encoded.
    """
    total, squares, count = 0.0, 0.0, 0
    chosen = np.linspace(0, len(dataset) - 1, min(num_photos, len(dataset))).astype(int)
    for first in range(0, len(chosen), batch_size):
        photos = torch.stack([dataset.sample(int(i))["pixel_values"] for i in chosen[first : first + batch_size]])
        latents = vae.encode(photos.to(vae.device, vae.dtype)).latents.double()
        total, squares = total + float(latents.sum()), squares + float(latents.square().sum())
        count += latents.numel()
    mean = total / count
    return mean, (squares / count - mean**2) ** -0.5


def main(args: AutoencoderArguments) -> None:
    """Trains as the arguments say; the autoencoder lies in `output_dir/vae` afterwards, its measures in the log."""
    check_autoencoder_arguments(args)
    root = resolve_data_dir(args)

    # 1. Data
    dataset = PhotoDataset(root, "train", args.resolution, args.seed, max_samples=args.max_train_samples)
    held_out = PhotoDataset(root, "validation", args.validation_resolution, train=False)
    chosen = np.linspace(0, len(held_out) - 1, min(args.num_validation_photos, len(held_out))).astype(int)
    validation = torch.stack([held_out.sample(int(i))["pixel_values"] for i in chosen])

    # 2. Models and loop
    trainer = Trainer(args, make_models(args), dataset, ema_modules=["vae"])

    def validate() -> tuple[dict[str, float], dict[str, Tensor]]:
        result = reconstruct(trainer.unwrap("vae"), validation)
        shown = slice(None, None, max(1, len(validation) // args.num_validation_images))
        rows = [pictures[shown][: args.num_validation_images] for pictures in (validation, result)]
        return reconstruction_metrics(result, validation), {"photo_reconstruction": image_grid(rows)}

    # 3. Train; publish the averaged autoencoder with the factors that scale its latents
    trainer.train(autoencoder_losses(trainer, args), validate)
    averaged = trainer.ema_copy("vae")
    if averaged is None:
        return
    vae = averaged.plain()
    if not args.freeze_encoder:
        measured = PhotoDataset(
            root, "train", args.validation_resolution, train=False, max_samples=args.max_train_samples
        )
        shift, scale = measure_latents(vae, measured)
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    photos = torch.stack([held_out.sample(i)["pixel_values"] for i in range(len(held_out))])
    metrics = reconstruction_metrics(reconstruct(vae, photos), photos)
    print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), f"(N = {len(photos)})")
    with write_folder(Path(args.output_dir) / "vae") as folder:
        vae.save_pretrained(folder)
    print(Path(args.output_dir) / "vae")
    trainer.push(Path(args.output_dir) / "vae")


if __name__ == "__main__":
    with stoppable(__file__):
        main(parse_args(AutoencoderArguments, description=__doc__))
