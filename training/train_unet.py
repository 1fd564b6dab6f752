# SPDX-License-Identifier: Apache-2.0
"""Trains the UNet of a DiffSketching pipeline: photos from noise, a drawing (further input channels) and a class.

    accelerate launch training/train_unet.py training/configs/unet_garments64.yaml --train_data_dir garments

With `--pretrained_vae_model_name_or_path` the UNet works on the latents of that autoencoder (train_autoencoder.py), which
are encoded once and cached; the drawing keeps its full size, folded into channels.

The drawings are contours made from the photos, so no drawing by a human is needed. Class, drawing and both together are
withheld from part of the samples; sampling can then strengthen them by classifier-free guidance. The result, with
averaged weights, is a pipeline folder `output_dir/pipeline`. To save time at the start, train with `--resolution 32`
first and go on with `--resolution 64 --pretrained_model_name_or_path OUTPUT_DIR/pipeline`.

`--pretrained_model_name_or_path` takes a pipeline of this package (the bundled one by its name, a folder, a Hub id), also a
converted one, or a plain unconditional one of diffusers. Its architecture, noise schedule and autoencoder are then used in the
place of what the arguments say, and its classes need not be those of the photos: see
`diffsketching_pipeline/training/starts.py`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.autoencoding import decode_latents, get_scale_factor
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.denoising import join_unet_inputs
from diffsketching_pipeline.images.contours import check_contour_source
from diffsketching_pipeline.images.free_hand import check_free_hand, check_stroke_deletion
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import TrainingArguments, num_readers, parse_args, resolve_data_dir
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import (
    Sample,
    add_noise_and_timestep,
    class_balanced_weights,
    clean_images,
    keyed_generator,
)
from diffsketching_pipeline.training.latents import LatentDataset, load_vae
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.starts import Start
from diffsketching_pipeline.training.trainer import Trainer


@dataclass
class UNetTrainingArguments(TrainingArguments):
    """The arguments that this script adds to [`TrainingArguments`]."""

    output_dir: str = argument("diffsketching-unet", "where checkpoints, samples, logs and `pipeline` are written")

    block_out_channels: list[int] = argument([48, 96, 192, 256], "UNet2DModel's `block_out_channels`")
    down_block_types: list[str] = argument(
        ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"], "UNet2DModel's `down_block_types`"
    )
    up_block_types: list[str] = argument(
        ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"], "UNet2DModel's `up_block_types`"
    )
    layers_per_block: int = argument(1, "UNet2DModel's `layers_per_block`")
    attention_head_dim: int = argument(32, "channels of one attention head")
    norm_num_groups: int = argument(16, "UNet2DModel's `norm_num_groups`")
    pretrained_vae_model_name_or_path: str | None = argument(
        None, "train on the latents of this autoencoder: a folder of it, a pipeline folder or a Hub id"
    )
    crops_per_photo: int = argument(4, "crops of each photo whose latents are cached")
    abstraction_plane: bool = argument(
        False, "tell the UNet by one more channel how far its drawing may be off: `sketch_abstraction` of the pipeline"
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = argument("scale_shift", "how the timestep enters")
    dropout: float = argument(0.0, "dropout inside the residual blocks")
    gradient_checkpointing: bool = argument(False, "recompute activations in the backward pass to save memory")

    ddpm_num_steps: int = argument(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = argument(
        "squaredcos_cap_v2", "noise schedule"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = argument("v_prediction", "what the UNet predicts")
    timestep_spacing: Literal["leading", "trailing"] = argument(
        "leading", "spacing of the sampling steps; trailing begins at the noisiest timestep, which few steps need"
    )
    snr_gamma: float | None = argument(
        None, "gamma of Min-SNR weighting (Hang et al., 2023), usually 5; off when left out"
    )

    model_guidance_scale: float = argument(
        0.0, "w of model guidance (Tang et al., 2025): the guided prediction is learned, one pass samples it; 0 = off"
    )
    model_guidance_start_step: int = argument(0, "step from which that counts; before, there is nothing to guide by")

    proportion_empty_class_labels: float = argument(
        0.05, "share of samples whose class is withheld, beside those that lose both"
    )
    proportion_empty_sketches: float = argument(
        0.05, "share of samples whose drawing is withheld, beside those that lose both"
    )
    proportion_empty_conditioning: float = argument(
        0.1,
        "share of samples whose class and drawing are withheld together: the other end of classifier-free guidance",
    )
    class_balance_power: float = argument(0.5, "0 samples photos evenly, 1 classes, between them in proportion")

    free_hand_share: float = argument(
        0.0,
        "share of the drawings that are redrawn as an unskilled hand would: wrong proportions, gaps, straight lines",
    )
    free_hand_strength: float = argument(1.0, "largest strength of that")
    contours: Literal["classical", "hed", "both"] = argument("classical", "who draws the photos' contours")
    hed_weights: str | None = argument(
        None, "file of HED's weights for `contours`, see `diffsketching_pipeline/training/hed_contours.py`"
    )
    stroke_deletion_share: float = argument(
        0.0,
        "share of the drawings that lack up to 90%% of their strokes: a half-made drawing still means a whole photo",
    )

    publish_ema: str = argument(
        "first",
        "average that becomes the pipeline: first, best (by validation loss), or one of `further_ema_max_decays`",
    )
    num_validation_samples: int = argument(64, "validation photos on which losses are measured")
    num_validation_images: int = argument(12, "validation drawings in the picture")
    ddpm_num_inference_steps: int = argument(25, "sampling steps for the picture")
    validation_sketch_guidance_scale: float = argument(2.0, "`sketch_guidance_scale` for the picture")


def check_unet_arguments(args: UNetTrainingArguments) -> None:
    """Raises `ValueError` for a proportion outside [0, 1], a gamma that is not positive, or sizes that do not fit."""
    shares = ("proportion_empty_class_labels", "proportion_empty_sketches", "proportion_empty_conditioning")
    for name in shares:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], but got {getattr(args, name)}.")
    check_free_hand(args.free_hand_share, args.free_hand_strength)
    check_stroke_deletion(args.stroke_deletion_share)
    check_contour_source(args.contours, args.hed_weights)
    if args.snr_gamma is not None and args.snr_gamma <= 0:
        raise ValueError(f"`snr_gamma` must be positive, but got {args.snr_gamma}.")
    if args.pretrained_model_name_or_path is None:
        check_size(args.resolution, args.block_out_channels)
    for name in ("num_validation_samples", "num_validation_images", "crops_per_photo"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {getattr(args, name)}.")
    for name in ("model_guidance_scale", "model_guidance_start_step"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` must be at least 0, but got {getattr(args, name)}.")
    known = ["first", "best", *(f"{decay:g}" for decay in args.further_ema_max_decays or ())]
    if args.publish_ema not in known:
        raise ValueError(f"`publish_ema` must be one of {known}, but got {args.publish_ema!r}.")


def check_size(resolution: int, block_out_channels: Sequence[int], scale_factor: int = 1) -> None:
    """Raises `ValueError` where the levels of the UNet, or the autoencoder below it, do not divide `resolution`."""
    factor = 2 ** (len(block_out_channels) - 1) * scale_factor
    if resolution % factor:
        raise ValueError(f"`resolution` must be a multiple of {factor} for this UNet, but got {resolution}.")


def make_scheduler(args: UNetTrainingArguments) -> DDIMScheduler:
    """The noise schedule, with the sampling settings that a bundled checkpoint fixes."""
    return DDIMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        timestep_spacing=args.timestep_spacing,
        steps_offset=0,
        set_alpha_to_one=True,
        # Latents have no bounds.
        clip_sample=args.pretrained_vae_model_name_or_path is None,
    )


def make_unet(
    args: UNetTrainingArguments, id2label: dict[int, str], vae: Any = None, start: Start | None = None
) -> UNet2DModel:
    """
    A new UNet, or that of `start` at this resolution, told these classes; class n is "no class". With `vae` it denoises
    that autoencoder's latents.
    """
    factor = get_scale_factor(vae)
    channels = 3 if vae is None else vae.config.latent_channels
    if start is not None:
        unet = start.unet(id2label, channels, factor, args.abstraction_plane)
        check_size(args.resolution, unet.config.block_out_channels, factor)
        unet.register_to_config(sample_size=args.resolution // factor)
        return unet
    check_size(args.resolution, args.block_out_channels, factor)
    torch.manual_seed(args.seed)
    return UNet2DModel(
        sample_size=args.resolution // factor,
        in_channels=channels + factor**2 + int(args.abstraction_plane),
        out_channels=channels,
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=tuple(args.down_block_types),
        up_block_types=tuple(args.up_block_types),
        layers_per_block=args.layers_per_block,
        attention_head_dim=args.attention_head_dim,
        norm_num_groups=args.norm_num_groups,
        resnet_time_scale_shift=args.resnet_time_scale_shift,
        dropout=args.dropout,
        num_class_embeds=len(id2label) + 1,
    )


def drop_conditions(
    sample: Sample,
    generator: torch.Generator,
    num_train_timesteps: int,
    null_class: int,
    proportion_empty_class_labels: float,
    proportion_empty_sketches: float,
    proportion_empty_conditioning: float,
) -> Sample:
    """Adds noise and timestep to a sample, and withholds its class (`null_class`) and its drawing (0) now and then."""
    sample = add_noise_and_timestep(sample, generator, num_train_timesteps)
    drop_class, drop_sketch, drop_both = torch.rand(3, generator=generator).tolist()
    if drop_class < proportion_empty_class_labels or drop_both < proportion_empty_conditioning:
        sample["class_label"] = null_class
    if drop_sketch < proportion_empty_sketches or drop_both < proportion_empty_conditioning:
        sample["sketch"] = torch.zeros_like(sample["sketch"])
    return sample


@dataclass
class ModelGuidance:
    """
    Model guidance adds to the target (Tang et al., "Diffusion Models without Classifier-free Guidance", 2025):
    w (ε(x_t, s, y) - ε(x_t, ∅)) without gradients, for samples that have a class or a drawing. The network then predicts in
    one pass what classifier-free guidance with w + 1 makes of two.

    Args:
        scale: w.
        null_class: index of "no class".
    """

    scale: float
    null_class: int

    @torch.no_grad()
    def __call__(
        self, unet: Any, prediction: Tensor, noisy_images: Tensor, in_channels: int, batch: Mapping[str, Any]
    ) -> Tensor:
        """The change of the target, shaped as `prediction`, the conditional one; 0 where nothing is given."""
        is_given = (batch["class_label"] != self.null_class) | (batch["sketch"] != 0).flatten(1).any(dim=1)
        nulls = torch.full_like(batch["class_label"], self.null_class)
        unconditional = unet(join_unet_inputs(noisy_images, in_channels), batch["timestep"], class_labels=nulls).sample
        unconditional = unconditional.float()[:, : prediction.shape[1]]
        return self.scale * is_given.reshape(-1, 1, 1, 1) * (prediction.detach() - unconditional)


def diffusion_loss(
    unet: Any,
    scheduler: DDIMScheduler,
    batch: Mapping[str, Any],
    snr_gamma: float | None = None,
    in_channels: int | None = None,
    model_guidance: ModelGuidance | None = None,
) -> Tensor:
    """
    Mean squared error of the UNet's prediction, per sample.

    Args:
        unet: called as a conditional `UNet2DModel`.
        scheduler: owns the noise schedule and says what is predicted.
        batch: `pixel_values` `[B, 3, R, R]` or `latents` `[B, C, R / f, R / f]`, `noise` of that shape, `sketch`
            `[B, 1, R, R]`, `timestep` and `class_label` `[B]`, and maybe `sketch_abstraction` `[B]`.
        snr_gamma: if given, the error of x_0 at each timestep is weighted by min(SNR, gamma), clamped as in "Efficient
            Diffusion Training via Min-SNR Weighting Strategy" (Hang et al., 2023), instead of the prediction's own.
        in_channels: the UNet's; c + f² if left out, without a plane for `sketch_abstraction`.
        model_guidance: if given, the target is the guided prediction, see [`ModelGuidance`].

    Returns:
        `Tensor`: `[B]`.
    """
    images, noise, timesteps = clean_images(batch), batch["noise"], batch["timestep"]
    if in_channels is None:
        in_channels = images.shape[1] + (batch["sketch"].shape[-1] // images.shape[-1]) ** 2
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    inputs = join_unet_inputs(noisy_images, in_channels, batch["sketch"], batch.get("sketch_abstraction", 0.0))
    prediction = unet(inputs, timesteps, class_labels=batch["class_label"]).sample.float()
    prediction = prediction[:, : images.shape[1]]  # a learned variance after it is left as it is: DDIM does not use it
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(images, noise, timesteps)
    else:
        target = images
    if model_guidance is not None:
        target = target + model_guidance(unet, prediction, noisy_images, in_channels, batch)
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return loss
    snr = compute_snr(scheduler, timesteps)
    # An error of 1 in the prediction is an error of this many in x_0, squared.
    x0_error = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": torch.ones_like(snr)}[prediction_type]
    return loss * snr.clamp(max=snr_gamma) * x0_error


class UNetValidation:
    """
    Losses on fixed validation photos with fixed noise, and a picture: drawings, their photos, generated photos.

    `loss_swapped_sketch` gives each photo the drawing of another one and `loss_no_sketch` none: a network that ignores
    the drawing has three equal losses.
    """

    def __init__(
        self, args: UNetTrainingArguments, dataset: PhotoSketchDataset, scheduler: DDIMScheduler, vae: Any = None
    ):
        self.args, self.scheduler, self.vae = args, scheduler, vae
        self.id2label = dataset.id2label
        count = min(args.num_validation_samples, len(dataset))
        samples = [dataset.sample(i * len(dataset) // count) for i in range(count)]
        for i, sample in enumerate(samples):
            noise = torch.randn(clean_images(sample).shape, generator=keyed_generator(args.seed, i))
            # Evenly spread timesteps in an order that has nothing to do with the order of the classes.
            timestep = int(scheduler.config.num_train_timesteps * ((i * 0.6180339887) % 1))
            sample |= {"noise": noise, "timestep": timestep}
        self.batch: dict[str, Tensor] = {
            name: torch.stack([torch.as_tensor(sample[name]) for sample in samples])
            for name in samples[0]
            if name != "id"
        }
        drawn = [i for i in range(count) if (samples[i]["sketch"] < 0).any()]
        shown = min(args.num_validation_images, len(drawn))
        self.shown = [drawn[i * len(drawn) // shown] for i in range(shown)]

    @torch.no_grad()
    def loss(self, unet: Any, sketch: Tensor | None = None) -> float:
        """Mean loss, with these drawings `[N, 1, R, R]` instead of the photos' own if they are given."""
        losses = []
        sketch = self.batch["sketch"] if sketch is None else sketch
        batch = self.batch | {"sketch": sketch}
        for first in range(0, len(sketch), self.args.train_batch_size):
            part = slice(first, first + self.args.train_batch_size)
            batch_part = {name: value[part].to(unet.device) for name, value in batch.items()}
            losses.append(diffusion_loss(unet, self.scheduler, batch_part, in_channels=unet.config.in_channels))
        return float(torch.cat(losses).mean())

    def picture(self, unet: Any) -> Tensor:
        """Rows of drawings, photos (of latents, what decoding them gives) and generated photos, `[3, H, W]` in [-1, 1]."""
        pipeline = DiffSketchingPipeline(unet=unet, scheduler=self.scheduler, vae=self.vae, id2label=self.id2label)
        pipeline.set_progress_bar_config(disable=True)
        sketches = self.batch["sketch"][self.shown]
        images = pipeline(
            sketches,
            class_labels=self.batch["class_label"][self.shown].tolist(),
            num_images_per_sketch=1,
            num_inference_steps=self.args.ddpm_num_inference_steps,
            sketch_guidance_scale=self.args.validation_sketch_guidance_scale,
            generator=[torch.Generator().manual_seed(i) for i in range(len(self.shown))],
            output_type="pt",
        ).images
        photos = clean_images(self.batch)[self.shown]
        if self.vae is not None:
            photos = torch.cat([decode_latents(self.vae, part.to(self.vae.device)).cpu() for part in photos.split(4)])
        return image_grid([sketches, photos, images * 2 - 1], scale=1 if self.args.resolution > 128 else 2)

    def __call__(self, unet: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The losses and the picture of a UNet."""
        sketch = self.batch["sketch"]
        losses = {
            "loss": self.loss(unet, sketch),
            "loss_swapped_sketch": self.loss(unet, sketch.roll(1, dims=0)),
            "loss_no_sketch": self.loss(unet, torch.zeros_like(sketch)),
        }
        return losses, {"sketch_photo_generated": self.picture(unet)} if self.shown else {}


def make_dataset(args: UNetTrainingArguments, root: Path, split: str, vae: Any = None) -> PhotoSketchDataset:
    """The photos of one split with drawings of them, as pixels or, with `vae`, as its latents."""
    is_train = split == "train"
    options: dict[str, Any] = {"train": is_train, "cache_dir": args.cache_dir, "num_readers": num_readers(args)}
    if is_train:
        options["max_samples"] = args.max_train_samples
        names = ("free_hand_share", "free_hand_strength", "stroke_deletion_share")
        options |= {name: getattr(args, name) for name in names}
        options |= {"contour_source": args.contours, "hed_weights": args.hed_weights}
    if vae is None:
        return PhotoSketchDataset(root, split, args.resolution, args.seed, **options)
    return LatentDataset(root, split, vae, args.resolution, args.seed, crops_per_photo=args.crops_per_photo, **options)


def choose_average(args: UNetTrainingArguments, trainer: Trainer, validation: UNetValidation) -> Any:
    """
    A copy of the UNet with the average that `publish_ema` names, on the main process; the others get None. The validation
    losses that `best` compares are printed.
    """
    if args.publish_ema == "first":
        return trainer.ema_copy("unet")
    if args.publish_ema != "best":
        chosen = {f"{decay:g}": decay for decay in args.further_ema_max_decays or ()}[args.publish_ema]
        return trainer.ema_copy("unet", max_decay=chosen)
    device, losses = trainer.accelerator.device, {}
    for decay in (None, *(args.further_ema_max_decays or ())):
        candidate = trainer.ema_copy("unet", torch.float32, max_decay=decay)
        if candidate is None:
            return None
        losses[decay] = validation.loss(candidate.to(device))
        print(f"average with decay up to {decay or args.ema_max_decay:g}: validation loss {losses[decay]:.5f}")
    return trainer.ema_copy("unet", max_decay=min(losses, key=lambda decay: losses[decay]))


def main(args: UNetTrainingArguments) -> None:
    """Trains as the arguments say; the pipeline lies in `output_dir/pipeline` afterwards."""
    check_unet_arguments(args)
    root = resolve_data_dir(args)
    start = None
    if args.pretrained_model_name_or_path is not None:
        start = Start.read(args.pretrained_model_name_or_path)
    vae, vae_name = None, args.pretrained_vae_model_name_or_path
    if vae_name is None and start is not None and start.has("vae"):
        vae_name = start.path
    if vae_name is not None:
        vae = load_vae(vae_name)
    if start is None:
        check_size(args.resolution, args.block_out_channels, get_scale_factor(vae))

    # 1. Data
    dataset = make_dataset(args, root, "train", vae)
    validation_dataset = make_dataset(args, root, "validation", vae)

    # 2. Model and loop
    scheduler = (start.scheduler() if start is not None else None) or make_scheduler(args)
    unet = make_unet(args, dataset.id2label, vae, start)
    in_channels = unet.config.in_channels
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    null_class = len(dataset.id2label)
    trainer = Trainer(
        args,
        {"unet": unet},
        dataset,
        transform=partial(
            drop_conditions,
            num_train_timesteps=scheduler.config.num_train_timesteps,
            null_class=null_class,
            proportion_empty_class_labels=args.proportion_empty_class_labels,
            proportion_empty_sketches=args.proportion_empty_sketches,
            proportion_empty_conditioning=args.proportion_empty_conditioning,
        ),
        sample_weights=class_balanced_weights(dataset.class_labels, args.class_balance_power),
    )
    validation = UNetValidation(args, validation_dataset, scheduler, vae)
    guidance = ModelGuidance(args.model_guidance_scale, null_class) if args.model_guidance_scale > 0 else None

    def compute_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        active = guidance if trainer.global_step >= args.model_guidance_start_step else None
        unet = trainer.modules["unet"]
        return {"loss": diffusion_loss(unet, scheduler, batch, args.snr_gamma, in_channels, active).mean()}

    # 3. Train, publish the averaged UNet
    trainer.train(compute_loss, lambda: validation(trainer.unwrap("unet")))
    averaged = choose_average(args, trainer, validation)
    if averaged is not None:
        pipeline = DiffSketchingPipeline(unet=averaged, scheduler=scheduler, vae=vae, id2label=dataset.id2label)
        with write_folder(Path(args.output_dir) / "pipeline") as folder:
            pipeline.save_pretrained(folder)
        print(Path(args.output_dir) / "pipeline")
        trainer.push(Path(args.output_dir) / "pipeline")


if __name__ == "__main__":
    with stoppable(__file__):
        main(parse_args(UNetTrainingArguments, sys.argv[1:], description=__doc__))
