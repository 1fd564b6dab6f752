# SPDX-License-Identifier: Apache-2.0
"""New UNets from the weights of others: with a channel for the drawing, without it or the class, and between two."""

from typing import Any

import torch
from diffusers import UNet2DModel


def expand_unet_for_sketch(unet: UNet2DModel, scale_factor: int = 1, sketch_abstraction: bool = False) -> UNet2DModel:
    """
    Return a copy of a UNet of x_t alone that takes a sketch in further input channels and computes exactly what it did, whatever
    they hold, because the new weights are zero: where fine-tuning on sketches starts.

    Args:
        unet: A `UNet2DModel` with 3 input channels, or with those of the latents of an autoencoder; it is not changed.
        scale_factor: f, the autoencoder's pixels per latent along a side; 1 without one. The sketch takes f² channels.
        sketch_abstraction: whether one more is added, for the plane of `sketch_abstraction`.

    Returns:
        A new `UNet2DModel` with f² or f² + 1 more input channels (4 in all for pixels), with the data type, device and
        train/eval mode of `unet`.

    Raises:
        ValueError: if `unet` has another number of input channels.
    """
    channels, out_channels = unet.config.in_channels, unet.config.out_channels
    if scale_factor == 1 and channels != 3:
        raise ValueError(f"`unet` must have 3 input channels but has {channels}.")
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"`unet` must take x_t alone, as many channels as it predicts ({out_channels}, or half of them with a learned"
            f" variance), but got `in_channels={channels}`."
        )
    added = scale_factor**2 + sketch_abstraction
    with torch.device("meta"):
        expanded = UNet2DModel.from_config(unet.config, in_channels=channels + added)
    state_dict = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
    weight = state_dict["conv_in.weight"]
    state_dict["conv_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), added, *weight.shape[2:])], dim=1)
    expanded.load_state_dict(state_dict, strict=True, assign=True)
    return expanded.train(unet.training)


def without_sketch(unet: UNet2DModel, sample_channels: int = 3) -> UNet2DModel:
    """
    Return a copy of a UNet that takes `sample_channels` (x_t) alone and computes what the other does without a drawing.

    "No drawing" is 0 everywhere, so what the first convolution makes of its channels can be left out.
    """
    narrow = UNet2DModel.from_config(unet.config, in_channels=sample_channels)
    state = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
    state["conv_in.weight"] = state["conv_in.weight"][:, :sample_channels].contiguous()
    narrow.load_state_dict(state)
    return narrow.to(unet.device, unet.dtype).train(unet.training)


def without_class(unet: UNet2DModel, null_class: int) -> UNet2DModel:
    """Return a copy of a class-conditional UNet that takes every class for "no class"."""
    blind = UNet2DModel.from_config(unet.config)
    blind.load_state_dict(unet.state_dict())
    with torch.no_grad():
        blind.class_embedding.weight[:] = blind.class_embedding.weight[null_class].clone()
    return blind.to(unet.device, unet.dtype).train(unet.training)


def _settings(unet: UNet2DModel) -> dict[str, Any]:
    """Return what a config says about the computation: not where it came from, and lists as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dict(unet.config).items()
        if not key.startswith("_")
    }


def interpolate_unets(first: UNet2DModel, second: UNet2DModel, ratio: float) -> UNet2DModel:
    """
    Return a UNet between two of one architecture: (1 - ratio) of the first's weights and ratio of the second's.

    Between a pretrained and a fine-tuned network this is a slider from one's behavior to the other's, because
    fine-tuning stays in the same basin (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).

    Args:
        first, second (`UNet2DModel`): unchanged; their configs have to agree.
        ratio (`float`): 0 is the first, 1 the second; in [0, 1].

    Returns:
        `UNet2DModel`: a new one, in the dtype and on the device of the first, in eval mode.

    Raises:
        ValueError: `ratio` is outside [0, 1], or the architectures differ; names the setting.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"`ratio` has to be in [0, 1] but is {ratio}.")
    settings = [_settings(first), _settings(second)]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        values = [config.get(key) for config in settings]
        if values[0] != values[1]:
            raise ValueError(
                f"`first` and `second` have to be alike, but have the {key} {values[0]!r} and {values[1]!r}."
            )
    result = UNet2DModel.from_config(first.config)
    # In float32: a small step between float16 weights would be rounded away before it is taken.
    theirs = second.state_dict()
    state = {}
    for name, ours in first.state_dict().items():
        mixed = (1 - ratio) * ours.float() + ratio * theirs[name].to(ours.device).float()
        state[name] = mixed.to(ours.dtype) if ours.is_floating_point() else ours
    result.load_state_dict(state)
    return result.to(first.device, first.dtype).eval()
