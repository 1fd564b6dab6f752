# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of openai/guided-diffusion (ADM) -> a pipeline folder.

The flags are those of guided-diffusion's own scripts, and a flag that is not given has guided-diffusion's default.
What `UNet2DModel` or `NoisyImageClassifier` cannot compute exactly is refused, never approximated.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils import logging

from diffsketching_pipeline.converters.guided_diffusion_flags import (
    CLASSIFIER_DEFAULTS,
    DIFFUSION_DEFAULTS,
    MODEL_DEFAULTS,
    NORM_NUM_GROUPS,
    SAMPLING_DEFAULTS,
    Architecture,
    as_model_flags,
    complete_flags,
    named_flags,
    prefix_classifier_flags,
    read_architecture,
    split_flags,
)
from diffsketching_pipeline.converters.guided_diffusion_layout import decoder_layout, encoder_layout, load_converted
from diffsketching_pipeline.converters.reading import read_checkpoint
from diffsketching_pipeline.files import check_output_dir, staged_folder
from diffsketching_pipeline.messages import brief_errors
from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier
from diffsketching_pipeline.unet_surgery import expand_unet_for_sketch
from diffsketching_pipeline.verification import at_most_parameters


logger = logging.get_logger(__name__)


@brief_errors()
def convert_guided_diffusion(
    unet_checkpoint: str | os.PathLike,
    classifier_checkpoint: str | os.PathLike | None = None,
    *,
    flags: Mapping[str, Any] | str | os.PathLike | None = None,
    preset: str | None = None,
    sketch_channel: bool = False,
    output_dir: str | os.PathLike,
) -> Path:
    """
    Converts guided-diffusion checkpoints to a folder that `DiffSketchingPipeline.from_pretrained` loads, in float32.

    The scheduler is the `DDIMScheduler` that steps as guided-diffusion's DDIM does. `classifier_scale` and
    `timestep_respacing` become what the checkpoint recommends to calls that do not say. Flags that only matter while
    training or for speed (`use_fp16`, `use_checkpoint`, `use_kl`, `rescale_learned_sigmas`) have no effect.

    Args:
        unet_checkpoint: The diffusion model, a `.pt` file (read without executing pickled code) or `.safetensors`.
        classifier_checkpoint: The noisy classifier, likewise; optional.
        flags:
            The flags that build the two, or a JSON file of them: either flat, as on guided-diffusion's command lines,
            or in the sections `model_flags` and `classifier_flags`. Unnamed flags have guided-diffusion's defaults.
        preset:
            Instead of `flags`, the published checkpoints' name: `"64"`, `"128"`, `"256"`, `"512"` or `"256-uncond"`.
            (`UNet2DModel` can express those of 64 and 256 pixels.)
        sketch_channel:
            Give the UNet a 4th input channel for the drawing, which it ignores until it is fine-tuned
            ([`expand_unet_for_sketch`]).
        output_dir: The folder to write; it must not exist or be empty.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if something cannot be read, does not fit, or cannot be expressed; nothing is written then.
    """
    check_output_dir(output_dir)
    model_flags, classifier_flags, sampling_flags = split_flags(named_flags(flags, preset))
    scheduler = _scheduler(model_flags, sampling_flags)
    unet = convert_unet_checkpoint(read_checkpoint(unet_checkpoint, "unet_checkpoint"), model_flags)
    classifier = None
    if classifier_checkpoint is not None:
        state_dict = read_checkpoint(classifier_checkpoint, "classifier_checkpoint")
        classifier = convert_classifier_checkpoint(state_dict, classifier_flags)
        _check_same_classes(unet, classifier)
    if sketch_channel:
        unet = expand_unet_for_sketch(unet)

    # From the package, which first registers our classes with diffusers so that the folder names them properly.
    from diffsketching_pipeline import DiffSketchingPipeline

    recommended = _recommended(model_flags, sampling_flags, has_classifier=classifier is not None)
    pipeline = DiffSketchingPipeline(unet=unet, scheduler=scheduler, classifier=classifier, recommended=recommended)
    with staged_folder(output_dir) as folder:
        pipeline.save_pretrained(folder)
    return Path(output_dir)


def convert_unet_checkpoint(state_dict: Mapping[str, torch.Tensor], model_flags: Mapping[str, Any]) -> UNet2DModel:
    """
    guided-diffusion's `UNetModel` as the `UNet2DModel` that computes the same, in float32 and eval mode.

    Args:
        state_dict: Its parameters under guided-diffusion's names, in any floating-point type.
        model_flags: The flags of guided-diffusion's `create_model_and_diffusion` that build it.

    Raises:
        ValueError: if the flags are unknown, do not fit the parameters, or describe what `UNet2DModel` cannot compute.
    """
    flags = complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    num_classes = _file_classes(state_dict, "label_emb.weight") if flags["class_cond"] else None
    with at_most_parameters(_most_parameters(state_dict)):
        unet, architecture = _unet_of_flags(flags, num_classes)
    layout = [*encoder_layout(architecture), *decoder_layout(architecture), ("same", "out.2", "conv_out")]
    if flags["class_cond"]:
        layout.append(("same", "label_emb", "class_embedding"))
    return load_converted(unet, state_dict, layout, architecture, "UNet")


def _unet_of_flags(flags: Mapping[str, Any], num_classes: int | None) -> tuple[UNet2DModel, Architecture]:
    """The UNet that complete flags build, without weights (on the device "meta")."""
    architecture = read_architecture(flags, "UNet")
    if architecture.block_out_channels[0] != architecture.time_proj_dim:
        raise ValueError(
            f"`UNet2DModel` cannot express a sinusoidal embedding of {architecture.time_proj_dim} channels "
            f"(`num_channels`) beside a first block of {architecture.block_out_channels[0]} (`channel_mult` times it)."
        )
    with torch.device("meta"):
        unet = UNet2DModel(
            **architecture.shared_config(),
            out_channels=6 if flags["learn_sigma"] else 3,
            up_block_types=architecture.block_types("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")[::-1],
            upsample_type="resnet" if architecture.resblock_updown else "conv",
            attn_norm_num_groups=NORM_NUM_GROUPS,
            num_class_embeds=num_classes,
        )
    return unet, architecture


def _classifier_of_flags(flags: Mapping[str, Any], num_classes: int) -> tuple[NoisyImageClassifier, Architecture]:
    """The classifier that complete flags build, without weights (on the device "meta")."""
    architecture = read_architecture(as_model_flags(flags), "classifier")
    with torch.device("meta"):
        classifier = NoisyImageClassifier(
            **architecture.shared_config(), num_classes=num_classes, time_proj_dim=architecture.time_proj_dim
        )
    return classifier, architecture


def networks_of_preset(preset: str, num_classes: int = 1000) -> tuple[UNet2DModel, NoisyImageClassifier]:
    """
    The UNet and the noisy classifier of a published checkpoint without weights, on the device "meta": to count what they
    cost.

    Raises:
        ValueError: if there is no such preset, or `UNet2DModel` cannot express it.
    """
    model_flags, classifier_flags, _ = split_flags(named_flags(None, preset))
    flags = complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    unet = _unet_of_flags(flags, num_classes if flags["class_cond"] else None)[0]
    flags = complete_flags(classifier_flags, CLASSIFIER_DEFAULTS | DIFFUSION_DEFAULTS, "classifier_flags")
    return unet, _classifier_of_flags(flags, num_classes)[0]


def convert_classifier_checkpoint(
    state_dict: Mapping[str, torch.Tensor], classifier_flags: Mapping[str, Any]
) -> NoisyImageClassifier:
    """
    guided-diffusion's `EncoderUNetModel` with attention pooling as a [`NoisyImageClassifier`], in float32 and eval
    mode.

    Args:
        state_dict: Its parameters under guided-diffusion's names, in any floating-point type.
        classifier_flags:
            The flags of guided-diffusion's `create_classifier_and_diffusion` that build it, with or without their
            `classifier_` prefix; also `channel_mult` where it is not the default of the image size.

    Raises:
        ValueError: if the flags are unknown, do not fit the parameters, or ask for another pooling.
    """
    flags = complete_flags(
        prefix_classifier_flags(classifier_flags), CLASSIFIER_DEFAULTS | DIFFUSION_DEFAULTS, "classifier_flags"
    )
    if flags["classifier_pool"] != "attention":
        raise ValueError(
            f"`classifier_pool` is {flags['classifier_pool']!r}, but only classifiers with attention pooling can be "
            f"converted."
        )
    with at_most_parameters(_most_parameters(state_dict)):
        classifier, architecture = _classifier_of_flags(flags, _file_classes(state_dict, "out.2.c_proj.weight"))
    layout = [*encoder_layout(architecture), ("pool", "out.2", "pool")]
    return load_converted(classifier, state_dict, layout, architecture, "classifier")


def _most_parameters(state_dict: Mapping[str, torch.Tensor]) -> int:
    """The most parameters a network may have for its differences from a file to be listed."""
    return 6 * len(state_dict) + 500


def _file_classes(state_dict: Mapping[str, torch.Tensor], name: str) -> int:
    """The number of classes in a file, which is guided-diffusion's 1000 unless its source was edited."""
    return state_dict[name].shape[0] if name in state_dict and state_dict[name].ndim else 1000


def _check_same_classes(unet: UNet2DModel, classifier: NoisyImageClassifier) -> None:
    num_class_embeds, num_classes = unet.config.num_class_embeds, classifier.config["num_classes"]
    if num_class_embeds not in (None, num_classes):
        raise ValueError(
            f"`unet_checkpoint` knows {num_class_embeds} classes and `classifier_checkpoint` "
            f"{num_classes}, so they are not a pair."
        )


def _scheduler(model_flags: Mapping[str, Any], sampling_flags: Mapping[str, Any]) -> DDIMScheduler:
    """The `DDIMScheduler` whose timesteps, ᾱ and prediction type are those of guided-diffusion's DDIM."""
    flags = complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    steps = flags["diffusion_steps"]
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    if flags["noise_schedule"] not in schedules:
        raise ValueError(f"`noise_schedule` must be linear or cosine but is {flags['noise_schedule']!r}.")
    # guided-diffusion stretches the linear schedule so that any number of steps ends in the same noise.
    beta_start, beta_end = 0.1 / max(steps, 1), 20.0 / max(steps, 1)
    if steps < 1 or (flags["noise_schedule"] == "linear" and beta_end >= 1):
        raise ValueError(f"`diffusion_steps` must be above 20 for a linear `noise_schedule` but is {steps}.")
    if steps > 10**5:
        raise ValueError(f"`diffusion_steps` must be 100000 at most but is {steps}.")
    if flags["rescale_timesteps"] and steps != 1000:
        raise ValueError(
            f"`rescale_timesteps` with `diffusion_steps` {steps} cannot be converted, because diffusers gives a UNet "
            f"the scheduler's own timesteps."
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=schedules[flags["noise_schedule"]],
        clip_sample=complete_flags(sampling_flags, SAMPLING_DEFAULTS, "flags")["clip_denoised"],
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="sample" if flags["predict_xstart"] else "epsilon",
        timestep_spacing="leading",
    )
    # DDIM has no use for it, but `DDPMScheduler.from_config(pipe.scheduler.config)` samples with it.
    scheduler.register_to_config(variance_type="learned_range" if flags["learn_sigma"] else "fixed_large")
    return scheduler


def _recommended(
    model_flags: Mapping[str, Any], sampling_flags: Mapping[str, Any], has_classifier: bool
) -> dict[str, float]:
    """The pipeline's `recommended` values that follow from the flags."""
    recommended: dict[str, float] = {}
    if has_classifier:
        scale = complete_flags(sampling_flags, SAMPLING_DEFAULTS, "flags")["classifier_scale"]
        recommended["classifier_guidance_scale"] = scale
    flags = complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    steps, respacing = flags["diffusion_steps"], str(flags["timestep_respacing"])
    if respacing:
        count = int(respacing.removeprefix("ddim")) if respacing.removeprefix("ddim").isdecimal() else 0
        # "ddimN" rounds the stride up and the scheduler rounds it down; plain "N" spreads out to the last timestep.
        strides_agree = count > 0 and steps % count == 0
        if strides_agree and (respacing.startswith("ddim") or count == steps):
            recommended["num_inference_steps"] = count
        else:
            logger.warning(
                f"`timestep_respacing` {respacing!r} picks timesteps that the scheduler cannot, so no number of steps "
                f"is recommended in the converted folder."
            )
    return recommended
