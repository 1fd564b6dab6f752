# SPDX-License-Identifier: Apache-2.0
"""The chain of sampling steps that fine-tuning goes back through, and the losses at its end (eqs. 5-7 of the paper)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import ResNetForImageClassification
from transformers.image_processing_utils import ImageProcessingMixin

from diffsketching_pipeline import (
    DiffSketchingLoss,
    DiffSketchingPipeline,
    ImageIdentityLoss,
    SketchPerceptualLoss,
)
from diffsketching_pipeline.autoencoding import decode_latents
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import NoisePrediction, checkpointed, denoise
from diffsketching_pipeline.guidance import (
    ClassifierGuidanceCallback,
    GuidanceCallback,
    GuidedPredictor,
    SketchGuidanceCallback,
)
from diffsketching_pipeline.schedulers import sampling_scheduler
from diffsketching_pipeline.training.arguments import TrainingArguments


@dataclass
class FinetuneArguments(TrainingArguments):
    """The arguments that this script adds to [`TrainingArguments`]."""

    output_dir: str = argument(
        "diffsketching-finetuned", "where checkpoints, samples, logs and `pipeline` are written"
    )
    learning_rate: float = argument(1e-5, "the learning rate after the warm-up; 2e-6 to 5e-5 is a useful range")
    lr_warmup_steps: int = argument(20, "steps over which the learning rate rises from 0")
    adam_weight_decay: float = argument(0.0, "AdamW's weight decay")
    train_batch_size: int = argument(4, "photos per process and chain")

    identity_weight: float = argument(0.5, "lambda of eq. 7 in [0, 1]: 1 keeps the photo, 0 follows the drawing")
    perceptual_net: Literal["sketch_encoder", "alex", "vgg", "squeeze"] = argument(
        "sketch_encoder", "F_s of eq. 5: the pipeline's, or a network of LPIPS with its learned weights"
    )
    image_encoder_name_or_path: str | None = argument(
        None,
        "F_i of eq. 6 in the place of the pipeline's: a ResNetForImageClassification (folder or Hub id), fed as its "
        "preprocessor_config.json says",
    )
    num_train_inference_steps: int = argument(10, "sampling steps of the chain, and of the inversion that starts it")
    num_fixed_point_iterations: int = argument(3, "network evaluations per inversion step beyond the first")
    sketch_guidance_scale: float = argument(1.0, "classifier-free guidance on the drawing inside the chain; 1 = off")
    classifier_guidance_scale: float = argument(0.0, "eq. 4 inside the chain, not differentiated; 0 = off")
    perceptual_guidance_scale: float = argument(0.0, "guidance by eq. 5 inside the chain, not differentiated; 0 = off")

    sketch_abstraction: float | None = argument(
        None,
        "what a UNet with a plane for it is told inside the chain, in [0, 1]; left out: what the pipeline recommends, as in "
        "sampling",
    )

    backprop: Literal["chain", "per_step"] = argument(
        "chain", "differentiate the chain, or only x_0 as predicted at one random step of it"
    )
    truncate_backprop_steps: int | None = argument(None, "differentiate this many last steps of the chain only")
    gradient_checkpointing: bool = argument(False, "recompute each step's activations in the backward pass")

    train_shards: str | None = argument(
        None,
        "webdataset shards of pairs in the place of `train_data_dir`, for example `pairs-{000000..000099}.tar`; needs "
        "`max_train_steps`",
    )
    shuffle_buffer: int = argument(256, "pairs of a shard that are held in memory and shuffled together")
    conditioning_image_column: str | None = argument(
        None, "`dataset_name` has this column of drawings, one or a list per photo; left out: it is a folder of photos"
    )
    image_column: str = argument("image", "its column of photos")
    label_column: str = argument("label", "its column of classes, if it has one")
    lora_rank: int | None = argument(
        None, "train low-rank adapters of this rank (to `output_dir/lora`) instead of all weights; needs peft"
    )
    lora_alpha: float | None = argument(
        None, "the adapters' change is scaled by this over the rank; the rank if left out"
    )

    free_hand_strength: float | None = argument(
        None,
        "largest strength of the distortion of drawings, 0 = as they are; left out: 0.5 for contours, 0 for drawings that "
        "people made",
    )
    class_balance_power: float = argument(0.5, "0 samples photos evenly, 1 classes, between them in proportion")
    inversion_batch_size: int = argument(16, "photos inverted at once")

    num_validation_samples: int = argument(16, "validation photos on which the constraints are measured")
    num_validation_images: int = argument(8, "validation drawings in the picture")
    ddpm_num_inference_steps: int = argument(25, "sampling steps for the picture")


def run_chain(
    unet: Callable[..., Any],
    unet_config: Any,
    scheduler: DDIMScheduler,
    batch: dict[str, Tensor],
    args: FinetuneArguments,
    components: Mapping[str, Any] | None = None,
    null_class: int | None = None,
) -> Tensor:
    """
    x̂_0 of each photo's x_T and drawing, differentiable with respect to the parameters of `unet`.

    Args:
        unet: called as a conditional `UNet2DModel`; a wrapped one is called through its wrapper.
        unet_config: its config.
        scheduler: owns the noise schedule.
        batch: `latents` (x_T) [B, C, H, W], `sketch` [B, 1, R, R], `class_label` and `chain_step` [B].
        args: says how many steps there are, which of them are differentiated, and how they are guided.
        components: what the guidance that is on needs, by name: `classifier`; `sketcher`, `sketch_encoder` and `vae`.
        null_class: the UNet's "no class", which classifier-free guidance puts in the place of the class, as in sampling.

    Returns:
        `Tensor`: [B, C, H, W] in the UNet's own space, unclipped.
    """
    sampler = sampling_scheduler(scheduler, args.num_train_inference_steps, batch["latents"].device)
    labels = batch["class_label"]
    null_labels = None if null_class is None else torch.full_like(labels, null_class)
    told_abstraction = None
    if args.sketch_abstraction:
        told_abstraction = torch.full(labels.shape, args.sketch_abstraction, device=labels.device)
    conditioning = Conditioning(
        labels, batch["sketch"], null_class_labels=null_labels, sketch_abstraction=told_abstraction
    )
    called = checkpointed(unet) if args.gradient_checkpointing else unet
    told = (called, unet_config, scheduler, conditioning)
    predictor = GuidedPredictor(
        *told,
        sketch_guidance_scale=args.sketch_guidance_scale,
        callbacks=guidance_callbacks(args),
        num_steps=len(sampler.timesteps),
        components=components,
    )

    if args.backprop == "chain":
        return denoise(
            sampler,
            predictor,
            batch["latents"],
            sampler.timesteps,
            truncate_backprop_steps=args.truncate_backprop_steps,
        )

    visited, steps = [batch["latents"]], batch["chain_step"]

    def remember(step_index: int, timestep: Tensor, latents: Tensor, _: NoisePrediction) -> tuple[Tensor, bool]:
        visited.append(latents)
        return latents, True

    with torch.no_grad():
        denoise(sampler, predictor, batch["latents"], sampler.timesteps[: int(steps.max())], on_step_end=remember)
    latents = torch.stack(visited)[steps, torch.arange(len(steps), device=steps.device)]
    plain = GuidedPredictor(*told, sketch_guidance_scale=args.sketch_guidance_scale)
    return plain(latents, sampler.timesteps[steps]).pred_original_sample


def guidance_callbacks(args: FinetuneArguments) -> list[GuidanceCallback]:
    """Return the guidance by gradients that the arguments turn on; the chain is guided by them as sampling is."""
    callbacks: list[GuidanceCallback] = []
    if args.classifier_guidance_scale != 0:
        callbacks.append(ClassifierGuidanceCallback(args.classifier_guidance_scale))
    if args.perceptual_guidance_scale != 0:
        callbacks.append(SketchGuidanceCallback(args.perceptual_guidance_scale))
    return callbacks


def decoded(pipeline: DiffSketchingPipeline, images: Tensor) -> Tensor:
    """Photos [B, 3, R, R] of what the chain made, through the frozen decoder where it works on latents; differentiable."""
    return images if pipeline.vae is None else decode_latents(pipeline.vae, images)


def make_loss(pipeline: DiffSketchingPipeline, args: FinetuneArguments) -> DiffSketchingLoss:
    """Eq. 7 on the frozen networks of the pipeline, or those that the arguments name in their place."""
    perceptual = identity = None
    if args.perceptual_net != "sketch_encoder":
        perceptual = SketchPerceptualLoss.from_lpips(args.perceptual_net)
    elif pipeline.sketch_encoder is not None:
        perceptual = SketchPerceptualLoss(pipeline.sketch_encoder)
    if args.image_encoder_name_or_path is not None:
        identity = load_identity_loss(args.image_encoder_name_or_path)
    elif pipeline.image_encoder is not None:
        identity = ImageIdentityLoss(pipeline.image_encoder)
    return DiffSketchingLoss(pipeline.sketcher, perceptual, identity, args.identity_weight).to(pipeline.device)


def load_identity_loss(name_or_path: str) -> ImageIdentityLoss:
    """
    L_i on a ResNet of its own, with mean, standard deviation and size of its preprocessor, if it has one.

    Raises:
        ValueError: it does not take photos.
    """
    encoder = ResNetForImageClassification.from_pretrained(name_or_path).float().eval().requires_grad_(False)
    if encoder.config.num_channels != 3:
        raise ValueError(
            f"`image_encoder_name_or_path` must take photos, but {name_or_path!r} takes {encoder.config.num_channels} "
            "channel(s)."
        )
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(name_or_path)[0]
    except OSError:
        return ImageIdentityLoss(encoder)
    size = settings.get("crop_size") or settings.get("size")
    size = max(size.values()) if isinstance(size, dict) else size
    return ImageIdentityLoss(encoder, settings.get("image_mean"), settings.get("image_std"), size)
