# SPDX-License-Identifier: Apache-2.0
"""Networks that tell real pictures from made ones, for the losses of generators."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """
    pix2pix's PatchGAN (Isola et al., 2017): one score per overlapping patch of a picture or a pair of them.

    Args:
        in_channels (`int`): channels of the pictures together.
        ndf (`int`): channels of the first convolution.
        n_layers (`int`): number of halvings.
    """

    @register_to_config
    def __init__(self, in_channels: int = 4, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for index in range(1, n_layers + 1):
            stride, width = (2 if index < n_layers else 1), ndf * min(2**index, 8)
            # Statistics of one picture alone: a batch of 1 and of 16 then mean the same.
            layers += [
                nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False),
                nn.InstanceNorm2d(width, affine=True),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, *pictures: Tensor) -> Tensor:
        """Scores [B, 1, h, w], near 1 for real ones, of pictures [B, C, H, W] in [-1, 1] that belong together."""
        return self.layers(torch.cat(pictures, dim=1))


def discriminator_distance(scores: Tensor) -> Tensor:
    """The least-squares loss of a discriminator (Mao et al., 2017): scores, of real ones and then as many fakes, from 1 and 0."""
    real_scores, fake_scores = scores.chunk(2)
    return 0.5 * ((real_scores - 1).square().mean() + fake_scores.square().mean())
