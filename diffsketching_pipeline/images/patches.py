# SPDX-License-Identifier: Apache-2.0
"""A distance of colours and textures that needs no network: what a network that classifies overlooks, it sees."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


PATCH_SIZE, PATCHES_PER_IMAGE, PATCH_DIRECTIONS = 7, 32, 32
PYRAMID_LEVELS = 3
NUM_QUANTILES = 256

COARSEST_SIDE = 16
"""Side in pixels of the coarsest level: 7 pixels of 16 are what a garment's color and outline need, whatever the photo's size."""


def pyramid_levels(side: int) -> int:
    """
    Return how many levels photos of `side` pixels are compared on: halved until `COARSEST_SIDE`, 3 at 64 pixels and 5 at 256,
    so that a larger photo has finer levels in addition to the same coarse ones. Smaller photos keep `PYRAMID_LEVELS` while a
    patch fits into each.

    Raises:
        ValueError: `side` is less than a patch.
    """
    if side < PATCH_SIZE:
        raise ValueError(f"`side` must be at least {PATCH_SIZE}, but got {side}.")
    fitting = 1 + int(math.log2(side / PATCH_SIZE))
    return max(1 + int(math.log2(max(side / COARSEST_SIDE, 1))), min(PYRAMID_LEVELS, fitting))


def _patches_at(band: Tensor, where: Tensor) -> Tensor:
    """The patches `[n, P, 3 * PATCH_SIZE ** 2]` of `[n, 3, S, S]` at flat positions `[n, P]` of their upper left corners."""
    per_row = band.shape[-1] - PATCH_SIZE + 1
    offsets = torch.arange(PATCH_SIZE)
    rows = (where // per_row)[..., None, None] + offsets[:, None]
    columns = (where % per_row)[..., None, None] + offsets
    image_index = torch.arange(len(band))[:, None, None, None]
    return band.permute(0, 2, 3, 1)[image_index, rows, columns].permute(0, 1, 4, 2, 3).flatten(2)


def patch_projections(pixels: Tensor, seed: int = 0, num_levels: int = PYRAMID_LEVELS) -> Tensor:
    """
    Random patches of each level of a Laplacian pyramid, each as its positions along random directions.

    They need no network and see what a network that classifies may overlook: tints, blur, checkerboards.

    Args:
        pixels: uint8 `[N, 3, R, R]`.
        seed: of the patches and directions.
        num_levels: levels of the pyramid, each half as large as the one before; see [`pyramid_levels`].

    Returns:
        `torch.Tensor`: `[N, num_levels, PATCHES_PER_IMAGE, PATCH_DIRECTIONS]`, from fine to coarse.
    """
    generator = torch.Generator().manual_seed(seed)
    # Before any patch is chosen: sets of different sizes are compared along the same directions.
    shape = (num_levels, PATCH_DIRECTIONS, 3 * PATCH_SIZE**2)
    directions = F.normalize(torch.randn(shape, generator=generator), dim=2)
    places = [(pixels.shape[-1] // 2**index - PATCH_SIZE + 1) ** 2 for index in range(num_levels)]
    where = [torch.randint(count, (len(pixels), PATCHES_PER_IMAGE), generator=generator) for count in places]
    projections = []
    for chunk, *positions in zip(pixels.split(64), *(w.split(64) for w in where), strict=True):
        level, along = chunk.float() / 255, []
        for index, position in enumerate(positions):
            band = level
            if index < num_levels - 1:
                smaller = F.interpolate(level, scale_factor=0.5, mode="bilinear", antialias=True)
                band = level - F.interpolate(smaller, size=level.shape[-2:], mode="bilinear")
                level = smaller
            along.append(_patches_at(band, position) @ directions[index].T)
        projections.append(torch.stack(along, dim=1))
    return torch.cat(projections)


def patch_quantiles(projections: Tensor) -> Tensor:
    """Quantile functions of [`patch_projections`], `[num_levels, PATCH_DIRECTIONS, NUM_QUANTILES]`."""
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
