# SPDX-License-Identifier: Apache-2.0
"""The flags of openai/guided-diffusion, and the networks and schedulers that they stand for."""

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


NORM_NUM_GROUPS = 32
_MAX_LEVELS = 16

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


def named_flags(flags: Mapping[str, Any] | str | os.PathLike | None, preset: str | None) -> Mapping[str, Any]:
    if (flags is None) == (preset is None):
        raise ValueError("Exactly one of `flags` and `preset` must be given.")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)} but is {preset!r}.")
        return PRESETS[preset]
    if isinstance(flags, str | os.PathLike):
        try:
            flags = json.loads(Path(flags).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"`flags` {flags} cannot be read as a JSON file ({error}).") from error
    if not isinstance(flags, Mapping):
        raise ValueError(f"`flags` must map names to values but is a {type(flags).__name__}.")
    return flags


def split_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Flags, flat or in sections -> those of the UNet and its diffusion, of the classifier, and of sampling."""
    sections = {name: flags.get(name) or {} for name in ("model_flags", "classifier_flags")}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise ValueError(f"`{name}` must map names to values but is {section!r}.")
    classifier_flags = prefix_classifier_flags(sections["classifier_flags"])
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


def prefix_classifier_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    prefixed = {name: f"classifier_{name}" for name in flags}
    return {prefixed[name] if prefixed[name] in CLASSIFIER_DEFAULTS else name: value for name, value in flags.items()}


def as_model_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Completed classifier flags under the names that the same things have for the UNet."""
    names = {"width": "num_channels", "depth": "num_res_blocks"}
    bare = {name.removeprefix("classifier_"): value for name, value in flags.items()}
    return {"num_heads": 1, "num_heads_upsample": -1} | {names.get(name, name): bare[name] for name in bare}


def complete_flags(given: Mapping[str, Any], defaults: Mapping[str, Any], argument: str) -> dict[str, Any]:
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
        except (TypeError, ValueError, OverflowError):
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
    except (TypeError, ValueError, OverflowError):
        numbers = (0.0,)
    if any(not 0 < number < math.inf for number in numbers) or len(numbers) > _MAX_LEVELS:
        raise ValueError(
            f"`{name}` must be positive numbers separated by commas, at most {_MAX_LEVELS}, but is {value!r}."
        )
    return numbers


def read_architecture(flags: Mapping[str, Any], owner: str) -> Architecture:
    """Return the architecture that completed flags build. `owner` is "UNet" or "classifier", which has no upsampling half."""
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
