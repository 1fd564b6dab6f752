# SPDX-License-Identifier: Apache-2.0
"""The photo-to-sketch converter P of DiffSketching: Photo-Sketching's generator (Li et al., WACV 2019)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


STATISTICS = ("per_sample", "running")
MIN_SIDE = 8


class PhotoSketcherNorm(nn.BatchNorm2d):
    """
    Batch normalization whose result never depends on the other images of a batch nor on train/eval mode.

    Args:
        num_features (`int`): Number of channels.
        statistics (`str`):
            `"per_sample"`: mean and biased variance of each image alone, which is batch normalization in train mode
            on a batch of one. `"running"`: the stored mean and variance, which is batch normalization in eval mode.
            The stored values are never updated here: they come from a converted checkpoint.
    """

    def __init__(self, num_features: int, statistics: str):
        super().__init__(num_features)
        self.statistics = statistics

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.statistics == "per_sample":
            return F.instance_norm(hidden_states, weight=self.weight, bias=self.bias, eps=self.eps)
        return F.batch_norm(
            hidden_states, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class PhotoSketcherResnetBlock(nn.Module):
    """Residual block of two reflection-padded 3x3 convolutions: `[B, C, H, W]` -> `[B, C, H, W]`."""

    def __init__(self, channels: int, dropout: float, statistics: str):
        super().__init__()
        # The biases are left out because the normalization that follows would subtract them.
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, padding_mode="reflect", bias=False)
        self.norm1 = PhotoSketcherNorm(channels, statistics)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, padding_mode="reflect", bias=False)
        self.norm2 = PhotoSketcherNorm(channels, statistics)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.dropout(F.relu(self.norm1(self.conv1(hidden_states))))
        return residual + self.norm2(self.conv2(hidden_states))


class PhotoSketcher(ModelMixin, ConfigMixin):
    r"""
    Photo -> sketch: a 7x7 convolution, two halvings, `n_blocks` residual blocks, two doublings, a 7x7 convolution and
    tanh, with batch normalization and reflection padding. It is the ResNet generator of image translation GANs, as
    "Photo-Sketching: Inferring Contour Drawings from Images" (Li et al., WACV 2019) trains it.

    Parameters:
        in_channels (`int`, *optional*, defaults to 3): Channels of the photo.
        out_channels (`int`, *optional*, defaults to 1): Channels of the sketch.
        ngf (`int`, *optional*, defaults to 64): Channels of the first convolution; doubled at each halving.
        n_blocks (`int`, *optional*, defaults to 9): Number of residual blocks.
        dropout (`float`, *optional*, defaults to 0.0): Dropout inside the residual blocks, active in train mode only.
        statistics (`str`, *optional*, defaults to `"per_sample"`):
            What the normalization layers use, in train and eval mode alike: `"per_sample"` the statistics of each
            image alone (how the published tool runs, and how this model is trained here), `"running"` the statistics
            stored in a converted checkpoint. One image's sketch never depends on the rest of its batch.
            `PhotoSketcher.from_pretrained(folder, statistics="running")` overrides what a folder says.
    """

    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        ngf: int = 64,
        n_blocks: int = 9,
        dropout: float = 0.0,
        statistics: str = "per_sample",
    ):
        super().__init__()
        if statistics not in STATISTICS:
            raise ValueError(f"`statistics` must be one of {', '.join(STATISTICS)} but is {statistics!r}.")

        self.conv_in = nn.Conv2d(in_channels, ngf, kernel_size=7, padding=3, padding_mode="reflect", bias=False)
        self.norm_in = PhotoSketcherNorm(ngf, statistics)

        self.down_convs = nn.ModuleList()
        self.down_norms = nn.ModuleList()
        for channels in (2 * ngf, 4 * ngf):
            self.down_convs.append(nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1, bias=False))
            self.down_norms.append(PhotoSketcherNorm(channels, statistics))

        self.resnets = nn.ModuleList([PhotoSketcherResnetBlock(4 * ngf, dropout, statistics) for _ in range(n_blocks)])

        self.up_convs = nn.ModuleList()
        self.up_norms = nn.ModuleList()
        for channels in (2 * ngf, ngf):
            self.up_convs.append(
                nn.ConvTranspose2d(
                    2 * channels, channels, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False
                )
            )
            self.up_norms.append(PhotoSketcherNorm(channels, statistics))

        self.conv_out = nn.Conv2d(ngf, out_channels, kernel_size=7, padding=3, padding_mode="reflect")
        self.apply(self._init_gan_weights)

    @staticmethod
    def _init_gan_weights(module: nn.Module) -> None:
        # Image translation GANs diverge or stall with larger initial weights (pix2pix, Isola et al., 2017).
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, PhotoSketcherNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Photos in [-1, 1], at least 8 pixels a side. Where a side is no multiple of 4 the network works on the
                next multiple and its result is cropped.

        Returns:
            `torch.Tensor` of shape `(batch_size, out_channels, height, width)`: sketches in [-1, 1], +1 for paper.

        Raises:
            ValueError: if `pixel_values` has another number of dimensions or channels, or a side under 8 pixels.
        """
        shape, in_channels = tuple(pixel_values.shape), self.config["in_channels"]
        if len(shape) != 4 or shape[1] != in_channels or min(shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"`pixel_values` must be [batch, {in_channels}, height, width] with sides of at least "
                f"{MIN_SIDE} pixels but has shape {shape}."
            )

        hidden_states = F.relu(self.norm_in(self.conv_in(pixel_values)))
        for conv, norm in zip(self.down_convs, self.down_norms, strict=True):
            hidden_states = F.relu(norm(conv(hidden_states)))
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        for conv, norm in zip(self.up_convs, self.up_norms, strict=True):
            hidden_states = F.relu(norm(conv(hidden_states)))

        sketch = torch.tanh(self.conv_out(hidden_states))
        return sketch[..., : shape[2], : shape[3]]
