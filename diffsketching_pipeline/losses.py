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
"""The cross-domain constraints of the paper as small callable modules."""

import warnings
from typing import Any

import torch
from torch import nn


def check_range(name: str, value: torch.Tensor, channels: int) -> None:
    """
    Refuse what is not a float batch `[batch_size, channels, height, width]` in [-1, 1], and warn of one that looks like
    [0, 1].

    Raises:
        ValueError: naming the argument, and what it was.
    """
    if not torch.is_tensor(value) or not value.is_floating_point():
        kind = value.dtype if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` has to be a float tensor in [-1, 1] but is {kind}.")
    if value.ndim != 4 or value.shape[1] != channels or value.numel() == 0:
        raise ValueError(
            f"`{name}` has to have shape [batch, {channels}, height, width] but has {tuple(value.shape)}."
        )
    low, high = (float(bound) for bound in value.detach().aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"`{name}` has to be in [-1, 1] but is in [{low:.4g}, {high:.4g}]: scale or clamp it first.")
    # Blank paper, all of it near 1, is in [-1, 1]; black at 0 is not.
    if 0.0 <= low < 0.1:
        warnings.warn(
            f"`{name}` has to be in [-1, 1] but looks like [0, 1]: its smallest value is {low:.4g}.", stacklevel=3
        )


class SketchFeatureMaps(nn.Module):
    """
    The feature maps of F_s that eq. 5 compares, finest first: after the stem's convolution, the stem, and each stage.

    Args:
        sketch_encoder (`transformers.ResNetForImageClassification`): F_s, one input channel.
    """

    sketch_encoder: Any

    def __init__(self, sketch_encoder: nn.Module):
        super().__init__()
        self.sketch_encoder = sketch_encoder

    def forward(self, sketch: torch.Tensor) -> list[torch.Tensor]:
        """`[batch_size, channels_l, H_l, W_l]` for each l, of sketches `[batch_size, 1, height, width]` in [-1, 1]."""
        resnet = self.sketch_encoder.resnet
        # The stem's convolution halves the size and its pooling halves it again: without the map in between nothing of
        # a stroke finer than four pixels would be seen.
        fine = resnet.embedder.embedder(sketch)
        stages = resnet.encoder(resnet.embedder.pooler(fine), output_hidden_states=True).hidden_states
        return [fine, *stages]


class SketchPerceptualLoss(nn.Module):
    """
    Perceptual distance of two sketches (eq. 5): L_p = Σ_l 1/(H_l W_l) Σ_{h,w} ‖ w_l ⊙ (F̂(ŝ)^l_{hw} - F̂(s)^l_{hw}) ‖².

    F̂^l are the feature maps of `sketch_encoder`, each feature vector scaled to unit length over its channels as LPIPS
    does (Zhang et al., 2018), and w_l are per-channel weights. Unlike a pixel distance it tolerates the spatial
    distortion of free-hand strokes.

    Args:
        sketch_encoder (`transformers.ResNetForImageClassification`): F_s, one input channel; used as it is, frozen or
            not. Its maps are those of [`SketchFeatureMaps`]; any other callable from a sketch to a list of feature maps
            will do, too.
        weights (`list[torch.Tensor]`, *optional*): w_l, one `[channels_l]` tensor per feature map; 1 if not given.
        eps: keeps the gradient of the normalisation finite at a zero feature vector, which blank paper has.
    """

    def __init__(self, sketch_encoder: Any, weights: list[torch.Tensor] | None = None, eps: float = 1e-10):
        super().__init__()
        self.feature_maps = SketchFeatureMaps(sketch_encoder) if hasattr(sketch_encoder, "resnet") else sketch_encoder
        self.eps = eps
        self.num_weights = 0 if weights is None else len(weights)
        for index, weight in enumerate(weights or []):
            self.register_buffer(f"weight_{index}", weight.reshape(1, -1, 1, 1))

    def features(self, sketch: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length feature maps `[batch_size, channels_l, H_l, W_l]` of a sketch batch, finest first."""
        maps = self.feature_maps(sketch)
        return [x / (x.square().sum(dim=1, keepdim=True) + self.eps).sqrt() for x in maps]

    def forward(self, pred_sketch: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
        """
        L_p of each pair, `[batch_size]`.

        Args:
            pred_sketch (`torch.Tensor` of shape `[batch_size, 1, height, width]`): ŝ in [-1, 1].
            sketch (`torch.Tensor` of shape `[batch_size, 1, height, width]`): s in [-1, 1].

        Raises:
            ValueError: for another dtype, shape or range.
        """
        check_range("pred_sketch", pred_sketch, channels=1)
        check_range("sketch", sketch, channels=1)
        if pred_sketch.shape != sketch.shape:
            raise ValueError(
                f"`pred_sketch` and `sketch` have to have one shape but have {tuple(pred_sketch.shape)} and"
                f" {tuple(sketch.shape)}."
            )
        return self.distance(self.features(pred_sketch), self.features(sketch))

    def distance(self, pred_features: list[torch.Tensor], features: list[torch.Tensor]) -> torch.Tensor:
        """L_p, `[batch_size]`, of two sketches whose [`~SketchPerceptualLoss.features`] are known."""
        if self.num_weights not in (0, len(features)):
            raise ValueError(f"`weights` has {self.num_weights} entries for {len(features)} feature maps.")
        loss = features[0].new_zeros(len(features[0]))
        for index, (ours, theirs) in enumerate(zip(pred_features, features, strict=True)):
            difference = ours - theirs
            if self.num_weights:
                difference = difference * getattr(self, f"weight_{index}")
            loss = loss + difference.square().sum(dim=1).mean(dim=(1, 2))
        return loss
