# SPDX-License-Identifier: Apache-2.0
"""The part of a photo that an edit may change."""

import torch
from scipy import ndimage
from skimage.morphology import convex_hull_image


def enclosed_area(sketch: torch.Tensor) -> torch.Tensor:
    """
    Return the area that drawings `[K, 1, height, width]` of one result enclose together, `[1, height, width]` of 0 and 1: what
    a line shuts off from the border or, where outlines have gaps, the convex hull of the lines.
    """
    lines = (sketch.amin(dim=(0, 1)) < 0).cpu().numpy()
    filled, hull = ndimage.binary_fill_holes(lines), convex_hull_image(lines)
    area = filled if filled.sum() > 0.5 * hull.sum() else hull
    return torch.from_numpy(area)[None].float()
