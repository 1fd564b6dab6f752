# SPDX-License-Identifier: Apache-2.0
"""The module that replaces an autoencoder where a UNet is to denoise the pixels of large photos themselves."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin

from diffsketching_pipeline.autoencoding import get_scale_factor


class FoldedPixels(ModelMixin, ConfigMixin):
    r"""
    A `vae` that loses nothing and learns nothing: each block of f x f pixels becomes 3 f² channels of one latent
    (`pixel_unshuffle`). It is there to measure what an autoencoder is worth.

    Parameters:
        latent_channels (`int`, *optional*, defaults to 192): 3 f².
        block_out_channels (`tuple[int]`, *optional*, defaults to `(3, 3, 3, 3)`): As an autoencoder says its f: each level
            but the first halves.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            What the pixels in [-1, 1] are multiplied by, see [`~autoencoding.encode_photos`]. Neighboring pixels agree, so
            that noise hides photos later than it hides latents of unit variance: a factor below 1 makes up for it
            (Chen, "On the Importance of Noise Scheduling for Diffusion Models", 2023).
        in_channels (`int`, *optional*, defaults to 3), out_channels (`int`, *optional*, defaults to 3): Those of photos.

    Raises:
        ValueError: `latent_channels` is not 3 f².
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 192,
        block_out_channels: tuple[int, ...] = (3, 3, 3, 3),
        scaling_factor: float = 1.0,
        in_channels: int = 3,
        out_channels: int = 3,
    ):
        super().__init__()
        self.factor = get_scale_factor(self)
        if latent_channels != 3 * self.factor**2:
            raise ValueError(
                f"`latent_channels` must be {3 * self.factor**2} for {self.factor} pixels per latent, but got"
                f" {latent_channels}."
            )
        # A module without a tensor is on no device and of no type, and a folder without weights is no component.
        self.register_buffer("placement", torch.zeros(1))

    @property
    def encoder(self) -> torch.nn.Module:
        """The module that latents depend on: nothing that is learned."""
        return torch.nn.Identity()

    def encode(self, x: torch.Tensor) -> AutoencoderTinyOutput:
        """Fold photos `[batch_size, 3, height, width]` into `[batch_size, 3 f², height / f, width / f]`."""
        return AutoencoderTinyOutput(latents=F.pixel_unshuffle(x, self.factor))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Unfold what [`FoldedPixels.encode`] folded."""
        return DecoderOutput(sample=F.pixel_shuffle(z, self.factor))
