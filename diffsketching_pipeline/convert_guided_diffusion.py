# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Checkpoints of openai/guided-diffusion (ADM) -> a pipeline folder.

The flags are those of guided-diffusion's own scripts, and a flag that is not given has guided-diffusion's default.
What `UNet2DModel` or `NoisyImageClassifier` cannot compute exactly is refused, never approximated.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils import logging
from safetensors.torch import load_file

from diffsketching_pipeline.files import check_output_dir, staged_folder
from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier
from diffsketching_pipeline.unet_surgery import expand_unet_for_sketch


logger = logging.get_logger(__name__)

NORM_NUM_GROUPS = 32

# (kind, prefix of the names in the file, prefix of the names in our model); the kinds are those of `_renamed`.
Layout = list[tuple[str, str, str]]

DIFFUSION_DEFAULTS: dict[str, Any] = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}

MODEL_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}

# The last four are arguments of guided-diffusion's classifier class that its command line fixes or derives.
CLASSIFIER_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
    "classifier_channel_mult": "",
    "classifier_num_head_channels": 64,
    "classifier_use_new_attention_order": False,
    "classifier_dropout": 0.0,
}

SAMPLING_DEFAULTS: dict[str, Any] = {"clip_denoised": True, "classifier_scale": 1.0}

# What else guided-diffusion's sampling scripts take, or follows from the other flags.
IGNORED_FLAGS = ("num_samples", "batch_size", "use_ddim", "model_path", "classifier_path", "ddim_timesteps")

CHANNEL_MULTS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}

_IMAGENET_FLAGS: dict[str, Any] = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "diffusion_steps": 1000,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_head_channels": 64,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}

# The flags that guided-diffusion's README gives for its published ImageNet checkpoints.
PRESETS: dict[str, dict[str, Any]] = {
    "64": {
        **_IMAGENET_FLAGS,
        "image_size": 64,
        "noise_schedule": "cosine",
        "num_channels": 192,
        "num_res_blocks": 3,
        "dropout": 0.1,
        "use_new_attention_order": True,
        "classifier_depth": 4,
        "classifier_scale": 1.0,
    },
    "128": {
        **_IMAGENET_FLAGS,
        "image_size": 128,
        "num_heads": 4,
        "num_head_channels": -1,
        "classifier_scale": 0.5,
    },
    "256": {**_IMAGENET_FLAGS, "image_size": 256, "classifier_scale": 1.0},
    "512": {**_IMAGENET_FLAGS, "image_size": 512, "classifier_scale": 4.0},
    "256-uncond": {**_IMAGENET_FLAGS, "image_size": 256, "class_cond": False, "classifier_scale": 10.0},
}


@dataclass(frozen=True)
class Architecture:
    """The shape of an ADM network, or of its downsampling half, in `UNet2DModel`'s terms."""

    image_size: int
    time_proj_dim: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[bool, ...]
    attention_head_dim: int | None
    new_attention_order: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    dropout: float

    def block_types(self, plain: str, resnet: str, attention: str) -> tuple[str, ...]:
        """Block type per level, highest resolution first."""
        return tuple(
            attention if has_attention else resnet if self.resblock_updown else plain
            for has_attention in self.attention_levels
        )

    def shared_config(self) -> dict[str, Any]:
        """The arguments that `UNet2DModel` and `NoisyImageClassifier` have in common."""
        return {
            "sample_size": self.image_size,
            "in_channels": 3,
            "down_block_types": self.block_types("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "downsample_type": "resnet" if self.resblock_updown else "conv",
            "dropout": self.dropout,
            "attention_head_dim": self.attention_head_dim,
            "norm_num_groups": NORM_NUM_GROUPS,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "scale_shift" if self.use_scale_shift_norm else "default",
        }


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
    model_flags, classifier_flags, sampling_flags = _split_flags(_named_flags(flags, preset))
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
    flags = _complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    num_classes = _file_classes(state_dict, "label_emb.weight") if flags["class_cond"] else None
    unet, architecture = _unet_of_flags(flags, num_classes)
    layout = [*_encoder_layout(architecture), *_decoder_layout(architecture), ("same", "out.2", "conv_out")]
    if flags["class_cond"]:
        layout.append(("same", "label_emb", "class_embedding"))
    return _load_converted(unet, state_dict, layout, architecture, "UNet")


def _unet_of_flags(flags: Mapping[str, Any], num_classes: int | None) -> tuple[UNet2DModel, Architecture]:
    """The UNet that complete flags build, without weights (on the device "meta")."""
    architecture = _architecture(flags, "UNet")
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
    architecture = _architecture(_as_model_flags(flags), "classifier")
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
    model_flags, classifier_flags, _ = _split_flags(_named_flags(None, preset))
    flags = _complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    unet = _unet_of_flags(flags, num_classes if flags["class_cond"] else None)[0]
    flags = _complete_flags(classifier_flags, CLASSIFIER_DEFAULTS | DIFFUSION_DEFAULTS, "classifier_flags")
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
    flags = _complete_flags(
        _prefix_classifier_flags(classifier_flags), CLASSIFIER_DEFAULTS | DIFFUSION_DEFAULTS, "classifier_flags"
    )
    if flags["classifier_pool"] != "attention":
        raise ValueError(
            f"`classifier_pool` is {flags['classifier_pool']!r}, but only classifiers with attention pooling can be "
            f"converted."
        )
    classifier, architecture = _classifier_of_flags(flags, _file_classes(state_dict, "out.2.c_proj.weight"))
    layout = [*_encoder_layout(architecture), ("pool", "out.2", "pool")]
    return _load_converted(classifier, state_dict, layout, architecture, "classifier")


def read_checkpoint(path: str | os.PathLike, argument: str) -> dict[str, torch.Tensor]:
    """
    Reads a state dict on the CPU from `.safetensors`, or else from what `torch.save` wrote, without executing any code
    a pickle may hold.

    Args:
        path: The file.
        argument: The argument of the caller that named it, for the error.

    Raises:
        ValueError: if there is no such file, it cannot be read, or it is no state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` must be a file but there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can raise anything, and what torch says of a dangerous one is how to run it all the same.
    except Exception as error:
        raise ValueError(
            f"`{argument}` {path} cannot be read as a file of weights: it is damaged or holds more than tensors."
        ) from error
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    )
    if not is_state_dict or not state_dict:
        raise ValueError(f"`{argument}` {path} holds no state dict: it must map parameter names to tensors.")
    return state_dict


def _named_flags(flags: Mapping[str, Any] | str | os.PathLike | None, preset: str | None) -> Mapping[str, Any]:
    if (flags is None) == (preset is None):
        raise ValueError("Exactly one of `flags` and `preset` must be given.")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)} but is {preset!r}.")
        return PRESETS[preset]
    if isinstance(flags, str | os.PathLike):
        try:
            flags = json.loads(Path(flags).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`flags` {flags} cannot be read as a JSON file ({error}).") from error
    if not isinstance(flags, Mapping):
        raise ValueError(f"`flags` must map names to values but is a {type(flags).__name__}.")
    return flags


def _split_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Flags, flat or in sections -> those of the UNet and its diffusion, of the classifier, and of sampling."""
    sections = {name: flags.get(name) or {} for name in ("model_flags", "classifier_flags")}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise ValueError(f"`{name}` must map names to values but is {section!r}.")
    classifier_flags = _prefix_classifier_flags(sections["classifier_flags"])
    model_flags = {name: value for name, value in flags.items() if name not in sections}
    model_flags |= sections["model_flags"]
    sampling_flags: dict[str, Any] = {}
    for given in (classifier_flags, model_flags):
        sampling_flags |= {name: given.pop(name) for name in SAMPLING_DEFAULTS if name in given}
        for name in IGNORED_FLAGS:
            given.pop(name, None)
    for name in [name for name in model_flags if name in CLASSIFIER_DEFAULTS and name != "image_size"]:
        classifier_flags[name] = model_flags.pop(name)

    # A noisy classifier is only right for the image size and the noise schedule that the UNet has too.
    defaults = MODEL_DEFAULTS | DIFFUSION_DEFAULTS
    for name in ("image_size", "noise_schedule", "diffusion_steps"):
        value = model_flags.get(name, defaults[name])
        if str(classifier_flags.setdefault(name, value)) != str(value):
            raise ValueError(
                f"`{name}` must be the same for UNet and classifier but is {value} and {classifier_flags[name]}."
            )
    return model_flags, classifier_flags, sampling_flags


def _prefix_classifier_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    prefixed = {name: f"classifier_{name}" for name in flags}
    return {prefixed[name] if prefixed[name] in CLASSIFIER_DEFAULTS else name: value for name, value in flags.items()}


def _as_model_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Completed classifier flags under the names that the same things have for the UNet."""
    names = {"width": "num_channels", "depth": "num_res_blocks"}
    bare = {name.removeprefix("classifier_"): value for name, value in flags.items()}
    return {"num_heads": 1, "num_heads_upsample": -1} | {names.get(name, name): bare[name] for name in bare}


def _complete_flags(given: Mapping[str, Any], defaults: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """`defaults` overridden by `given`, whose values may be strings as on a command line."""
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else "."
            raise ValueError(f"`{argument}` has the flag `{name}`, which guided-diffusion does not know{hint}")
    return {
        name: default if given.get(name) is None else _parse_flag(name, given[name], default)
        for name, default in defaults.items()
    }


def _parse_flag(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`; lists of numbers, like "1,2,4", stay what they are until `_numbers`."""
    if isinstance(default, bool):
        options = {"yes": True, "true": True, "t": True, "y": True, "1": True}
        options |= {"no": False, "false": False, "f": False, "n": False, "0": False}
        if str(value).lower() not in options:
            raise ValueError(f"`{name}` must be true or false but is {value!r}.")
        return options[str(value).lower()]
    if isinstance(default, int | float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(default, float) and number == number:
            return number
        if not number.is_integer():
            kind = "whole number" if isinstance(default, int) else "number"
            raise ValueError(f"`{name}` must be a {kind} but is {value!r}.")
        return int(number)
    return value


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """Numbers as guided-diffusion's flags list them, like "1,2,4" or [1, 2, 4], 4 or "", as a tuple."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = tuple(float(item) for item in items if item != "")
    except (TypeError, ValueError):
        numbers = (0.0,)
    if any(not number > 0 for number in numbers):
        raise ValueError(f"`{name}` must be positive numbers separated by commas but is {value!r}.")
    return numbers


def _architecture(flags: Mapping[str, Any], owner: str) -> Architecture:
    """What completed flags build. `owner` is "UNet" or "classifier", which has no upsampling half."""
    image_size = flags["image_size"]
    channel_mult = _numbers("channel_mult", flags["channel_mult"]) or CHANNEL_MULTS.get(image_size)
    if channel_mult is None:
        raise ValueError(
            f"The {owner} flags must name `channel_mult`, which has no default for an `image_size` of {image_size}."
        )
    if image_size % 2 ** (len(channel_mult) - 1) or image_size < 1:
        raise ValueError(
            f"An `image_size` of {image_size} cannot be halved {len(channel_mult) - 1} times as the {owner} flags ask."
        )
    widths = tuple(int(mult * flags["num_channels"]) for mult in channel_mult)
    if any(width % NORM_NUM_GROUPS or not width for width in widths) or flags["num_res_blocks"] < 1:
        raise ValueError(
            f"The {owner} flags ask for {flags['num_res_blocks']} residual blocks at each of the widths {widths}, but "
            f"there must be at least one and every width a multiple of {NORM_NUM_GROUPS}."
        )
    # guided-diffusion names the sides of feature maps, but compares the whole factors by which they are smaller.
    factors = {image_size // side for side in _numbers("attention_resolutions", flags["attention_resolutions"])}
    attention_levels = tuple(2**level in factors for level in range(len(widths)))
    return Architecture(
        image_size=image_size,
        time_proj_dim=flags["num_channels"],
        block_out_channels=widths,
        layers_per_block=flags["num_res_blocks"],
        attention_levels=attention_levels,
        attention_head_dim=_attention_head_dim(flags, widths, attention_levels, owner),
        new_attention_order=flags["use_new_attention_order"],
        use_scale_shift_norm=flags["use_scale_shift_norm"],
        resblock_updown=flags["resblock_updown"],
        dropout=flags["dropout"],
    )


def _attention_head_dim(
    flags: Mapping[str, Any], widths: tuple[int, ...], attention_levels: tuple[bool, ...], owner: str
) -> int | None:
    """The one head width of all attention layers, or `None` for a single head in each."""
    attended = [width for width, has_attention in zip(widths, attention_levels, strict=True) if has_attention]
    num_heads, num_head_channels = flags["num_heads"], flags["num_head_channels"]
    num_heads_upsample = num_heads if flags["num_heads_upsample"] == -1 else flags["num_heads_upsample"]
    layers = [(width, num_heads) for width in [*attended, widths[-1]]]
    if owner == "UNet":
        layers += [(width, num_heads_upsample) for width in attended]
    if num_head_channels != -1:
        layers = [(width, width / num_head_channels if num_head_channels else 0) for width, _ in layers]
    if any(heads < 1 or heads != int(heads) or width % heads for width, heads in layers):
        raise ValueError(
            f"The {owner} flags do not divide attention over {', '.join(map(str, sorted({*attended, widths[-1]})))} channels "
            f"into whole heads (`num_heads` {num_heads}, `num_head_channels` {num_head_channels})."
        )
    head_dims = {int(width / heads) for width, heads in layers}
    if len(head_dims) == 1:
        return head_dims.pop()
    if all(heads == 1 for _, heads in layers):
        return None
    raise ValueError(
        f"`UNet2DModel` has one head width for the whole network and cannot express attention heads of "
        f"{', '.join(map(str, sorted(head_dims)))} channels (`num_heads` {flags['num_heads']}, `num_heads_upsample` "
        f"{flags['num_heads_upsample']}, `num_head_channels` -1)."
    )


def _encoder_layout(architecture: Architecture) -> Layout:
    layout = [
        ("same", "time_embed.0", "time_embedding.linear_1"),
        ("same", "time_embed.2", "time_embedding.linear_2"),
        ("same", "input_blocks.0.0", "conv_in"),
    ]
    index = 0
    last_level = len(architecture.block_out_channels) - 1
    for level, has_attention in enumerate(architecture.attention_levels):
        for layer in range(architecture.layers_per_block):
            index += 1
            layout.append(("resnet", f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}"))
            if has_attention:
                layout.append(("attention", f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"))
        if level < last_level:
            index += 1
            target = f"down_blocks.{level}.downsamplers.0"
            if architecture.resblock_updown:
                layout.append(("resnet", f"input_blocks.{index}.0", target))
            else:
                layout.append(("same", f"input_blocks.{index}.0.op", f"{target}.conv"))
    return layout + [
        ("resnet", "middle_block.0", "mid_block.resnets.0"),
        ("attention", "middle_block.1", "mid_block.attentions.0"),
        ("resnet", "middle_block.2", "mid_block.resnets.1"),
        ("same", "out.0", "conv_norm_out"),
    ]


def _decoder_layout(architecture: Architecture) -> Layout:
    layout = []
    index = 0
    last_block = len(architecture.block_out_channels) - 1
    for block, has_attention in enumerate(reversed(architecture.attention_levels)):
        for layer in range(architecture.layers_per_block + 1):
            source = f"output_blocks.{index}"
            layout.append(("resnet", f"{source}.0", f"up_blocks.{block}.resnets.{layer}"))
            if has_attention:
                layout.append(("attention", f"{source}.1", f"up_blocks.{block}.attentions.{layer}"))
            if block < last_block and layer == architecture.layers_per_block:
                upsampler, target = f"{source}.{2 if has_attention else 1}", f"up_blocks.{block}.upsamplers.0"
                if architecture.resblock_updown:
                    layout.append(("resnet", upsampler, target))
                else:
                    layout.append(("same", f"{upsampler}.conv", f"{target}.conv"))
            index += 1
    return layout


_RENAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "same": {"": ("",)},
    "resnet": {
        ".in_layers.0": (".norm1",),
        ".in_layers.2": (".conv1",),
        ".emb_layers.1": (".time_emb_proj",),
        ".out_layers.0": (".norm2",),
        ".out_layers.3": (".conv2",),
        ".skip_connection": (".conv_shortcut",),
    },
    "attention": {
        ".norm": (".group_norm",),
        ".qkv": (".to_q", ".to_k", ".to_v"),
        ".proj_out": (".to_out.0",),
    },
    "pool": {
        ".positional_embedding": (".positional_embedding",),
        ".qkv_proj": (".to_q", ".to_k", ".to_v"),
        ".c_proj": (".to_out",),
    },
}


def _renamed(layout: Layout, expected: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Parameter in the file -> the parameters of our model (three for a fused QKV) that `expected` has of it."""
    return {
        f"{source}{old}{parameter}": tuple(f"{target}{new}{parameter}" for new in news)
        for kind, source, target in layout
        for old, news in _RENAMES[kind].items()
        for parameter in (".weight", ".bias", "")
        if f"{target}{news[0]}{parameter}" in expected
    }


def _load_converted(
    model: Any, state_dict: Mapping[str, torch.Tensor], layout: Layout, architecture: Architecture, owner: str
) -> Any:
    """Fills `model`, which is on the meta device, with every tensor of `state_dict`; strict in both directions."""
    expected = model.state_dict()
    renamed = _renamed(layout, expected)
    _check_fit(state_dict, renamed, expected, owner)
    converted: dict[str, torch.Tensor] = {}
    for source, targets in renamed.items():
        tensor = state_dict[source].to(torch.float32)
        if source.endswith("positional_embedding"):
            tensor = tensor.T
        parts: tuple[torch.Tensor, ...] = (tensor,)
        if len(targets) == 3:
            # guided-diffusion's pooling has the new order whatever the attention layers have.
            new_order = architecture.new_attention_order or source.startswith("out.")
            width = tensor.shape[0] // 3
            parts = _split_qkv(tensor, width // (architecture.attention_head_dim or width), new_order)
        for target, part in zip(targets, parts, strict=True):
            converted[target] = part.reshape(expected[target].shape).clone(memory_format=torch.contiguous_format)
    model.load_state_dict(converted, strict=True, assign=True)
    return model.eval()


def _split_qkv(tensor: torch.Tensor, heads: int, new_order: bool) -> tuple[torch.Tensor, ...]:
    """Rows of a fused projection, ordered (qkv, head, dim) if `new_order` else (head, qkv, dim) -> Q, K and V."""
    if new_order:
        return tensor.chunk(3)
    return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1))


def _source_shape(source: str, targets: tuple[str, ...], expected: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape that a parameter has in a guided-diffusion file."""
    rows, *rest = expected[targets[0]].shape
    if source.endswith("positional_embedding"):
        return (*rest, rows)
    # Projections that are linear layers here are 1x1 convolutions over a sequence there.
    is_convolution = source.rpartition(".")[0].endswith(("qkv", "proj_out", "qkv_proj", "c_proj"))
    return (rows * len(targets), *rest, *([1] if is_convolution and rest else []))


def _check_fit(
    state_dict: Mapping[str, torch.Tensor],
    renamed: Mapping[str, tuple[str, ...]],
    expected: Mapping[str, torch.Tensor],
    owner: str,
) -> None:
    misfits = {source: f"also has `{source}`" for source in state_dict if source not in renamed}
    for source, targets in renamed.items():
        shape = _source_shape(source, targets, expected)
        if source not in state_dict:
            misfits[source] = f"has no `{source}`"
        elif tuple(state_dict[source].shape) != shape:
            misfits[source] = f"has `{source}` of shape {tuple(state_dict[source].shape)}, where {shape} is expected"
    if misfits:
        source, flag = _likely_cause(misfits, state_dict, renamed, owner)
        others = f", among {len(misfits)} differences" if len(misfits) > 1 else ""
        raise ValueError(
            f"The flags do not fit the {owner} checkpoint, which {misfits[source]}{others}; check {flag} first."
        )


def _likely_cause(
    misfits: Mapping[str, str], state_dict: Mapping[str, torch.Tensor], renamed: Mapping[str, Any], owner: str
) -> tuple[str, str]:
    """The difference that explains the most others, and the flag that decides it."""
    prefix, width, depth, head = "", "num_channels", "num_res_blocks", "learn_sigma"
    if owner == "classifier":
        prefix, width, depth, head = "classifier_", "classifier_width", "classifier_depth", "classifier_pool"
    causes = []
    if any(name.startswith("output_blocks.") for name in state_dict) != (owner == "UNet"):
        causes.append(("output_blocks", f"that this is the {owner} file"))
    causes += [("time_embed", f"`{width}`"), ("label_emb", "`class_cond`")]
    in_file, wanted = (
        {name.split(".")[1] for name in names if name.startswith("input_blocks.")} for names in (state_dict, renamed)
    )
    if in_file != wanted:
        causes.append(("input_blocks", f"`{depth}` and `{prefix}channel_mult`"))
    causes += [
        (r"\.op\.", f"`{prefix}resblock_updown`"),
        (r"input_blocks\.\d+\.0\.in_layers", f"`{prefix}channel_mult`"),
        (r"\.qkv\.", f"`{prefix}attention_resolutions`"),
        (r"\.emb_layers\.", f"`{prefix}use_scale_shift_norm`"),
        (r"positional_embedding", "`image_size`"),
        (r"^out\.", f"`{head}`"),
    ]
    for pattern, flag in causes:
        for source in misfits:
            if re.search(pattern, source):
                return source, flag
    return next(iter(misfits)), "that they belong to this file"


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
    flags = _complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
    steps = flags["diffusion_steps"]
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    if flags["noise_schedule"] not in schedules:
        raise ValueError(f"`noise_schedule` must be linear or cosine but is {flags['noise_schedule']!r}.")
    # guided-diffusion stretches the linear schedule so that any number of steps ends in the same noise.
    beta_start, beta_end = 0.1 / max(steps, 1), 20.0 / max(steps, 1)
    if steps < 1 or (flags["noise_schedule"] == "linear" and beta_end >= 1):
        raise ValueError(f"`diffusion_steps` must be above 20 for a linear `noise_schedule` but is {steps}.")
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
        clip_sample=_complete_flags(sampling_flags, SAMPLING_DEFAULTS, "flags")["clip_denoised"],
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
        scale = _complete_flags(sampling_flags, SAMPLING_DEFAULTS, "flags")["classifier_scale"]
        recommended["classifier_guidance_scale"] = scale
    flags = _complete_flags(model_flags, MODEL_DEFAULTS | DIFFUSION_DEFAULTS, "model_flags")
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
