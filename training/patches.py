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
"""A distance of colours and textures that needs no network: what a network that classifies overlooks, it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor


PATCH_SIZE, PATCHES_PER_IMAGE, PATCH_DIRECTIONS = 7, 32, 32
PYRAMID_LEVELS = 3
NUM_QUANTILES = 256


def patch_projections(pixels: Tensor, seed: int = 0) -> Tensor:
    """
    Random patches of each level of a Laplacian pyramid, each as its positions along random directions.

    They need no network and see what a network that classifies may overlook: tints, blur, checkerboards.

    Args:
        pixels: uint8 `[N, 3, R, R]`.

    Returns:
        `torch.Tensor`: `[N, PYRAMID_LEVELS, PATCHES_PER_IMAGE, PATCH_DIRECTIONS]`, from fine to coarse.
    """
    generator = torch.Generator().manual_seed(seed)
    # Before any patch is chosen: sets of different sizes are compared along the same directions.
    shape = (PYRAMID_LEVELS, PATCH_DIRECTIONS, 3, PATCH_SIZE, PATCH_SIZE)
    directions = F.normalize(torch.randn(shape, generator=generator).flatten(2), dim=2).reshape(shape)
    level, projections = pixels.float() / 255, []
    for index in range(PYRAMID_LEVELS):
        band = level
        if index < PYRAMID_LEVELS - 1:
            smaller = F.interpolate(level, scale_factor=0.5, mode="bilinear", antialias=True)
            band = level - F.interpolate(smaller, size=level.shape[-2:], mode="bilinear")
            level = smaller
        along = torch.cat([F.conv2d(chunk, directions[index]) for chunk in band.split(64)]).flatten(2)
        where = torch.randint(along.shape[-1], (len(pixels), 1, PATCHES_PER_IMAGE), generator=generator)
        projections.append(along.gather(2, where.expand(-1, PATCH_DIRECTIONS, -1)).transpose(1, 2))
    return torch.stack(projections, dim=1)


def patch_quantiles(projections: Tensor) -> Tensor:
    """Quantile functions of [`patch_projections`], `[PYRAMID_LEVELS, PATCH_DIRECTIONS, NUM_QUANTILES]`."""
    ordered = projections.permute(1, 3, 0, 2).flatten(2).sort(dim=-1).values
    where = (torch.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES * (ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., where.floor().long()], ordered[..., where.ceil().long()], where.frac())


def patch_distance(projections: Tensor, reference: Tensor) -> float:
    """
    Sliced Wasserstein distance between the patches of two sets of images (Karras et al., 2018), mean over the levels, in
    standard deviations of the reference's patches at each level.

    Args:
        projections: the [`patch_projections`] of the images.
        reference: the [`patch_quantiles`] of the reference.
    """
    scale = reference.std(dim=-1).mean(dim=1)[:, None, None]
    return float(((patch_quantiles(projections) - reference).abs() / scale).mean())
