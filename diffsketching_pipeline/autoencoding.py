# SPDX-License-Identifier: Apache-2.0
"""Photos to the space that a UNet denoises, and back: the latents of an autoencoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def get_scale_factor(vae: Any) -> int:
    """
    f, the pixels per latent along a side; 1 without an autoencoder.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`], *optional*): each level of its encoder but the first halves.
    """
    if vae is None:
        return 1
    widths = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(widths) - 1)


def encode_photos(vae: Any, photos: torch.Tensor) -> torch.Tensor:
    """
    Latents of photos, shifted and scaled to about unit variance, without randomness: the mode of the distribution where the
    encoder gives one.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): its config holds `shift_factor` and `scaling_factor`.
        photos (`torch.Tensor` of shape `[batch_size, 3, height, width]`): in [-1, 1].

    Returns:
        `torch.Tensor`: float32 `[batch_size, latent_channels, height / f, width / f]`.

    Raises:
        ValueError: if f does not divide the photos' sides.
    """
    factor = get_scale_factor(vae)
    if any(side % factor for side in photos.shape[-2:]):
        height, width = photos.shape[-2:]
        raise ValueError(
            f"`photos` must have sides that are multiples of {factor}, the pixels per latent of `vae`, but got {width} x"
            f" {height}."
        )
    encoded = vae.encode(photos.to(vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (latents.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """
    Photos `[batch_size, 3, height, width]`, float32 and not clipped, of what [`encode_photos`] returns; differentiable.
    """
    latents = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()


def encode_each(vae: Any, photos: torch.Tensor) -> torch.Tensor:
    """Return [`encode_photos`] of one photo at a time, so that none depends on its batch; without a `vae`, the photos."""
    return photos if vae is None else torch.cat([encode_photos(vae, photo) for photo in photos.split(1)])


def decode_each(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return [`decode_latents`] of one photo at a time, so that none depends on its batch; without a `vae`, the latents."""
    return latents if vae is None else torch.cat([decode_latents(vae, latent) for latent in latents.split(1)])


class AutoencoderCall(nn.Module):
    """
    `function(vae, images)` as a module, so that [`~guidance.float32_call`] finds the weights: an autoencoder's own forward
    is the way there and back.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): the only child.
        function: [`encode_photos`] or [`decode_latents`].
    """

    def __init__(self, vae: Any, function: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.vae = vae
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(self.vae, images)
