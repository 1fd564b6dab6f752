# SPDX-License-Identifier: Apache-2.0
"""Color hints: palettes, and coarse strokes of color on a page."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from scipy import ndimage

from diffsketching_pipeline.images.reading import is_number, read_photo


# Whiter than this in all channels is the paper under strokes of color.
_PAPER_LEVEL = 250


def parse_palette(colors: Any) -> torch.Tensor | None:
    """
    `[num_colors, 3, 1, 1]` in [-1, 1] of a list of CSS colors or (r, g, b) of 0 to 255; `None` for anything else.

    Raises:
        ValueError: for an empty list, or a color that is none.
    """
    if not isinstance(colors, (list, tuple)):
        return None
    if not colors:
        raise ValueError("`color_hint` is an empty list: give at least one color, or None.")
    parsed = []
    for color in colors:
        try:
            rgb = ImageColor.getrgb(color)[:3] if isinstance(color, str) else tuple(color)
        except (ValueError, TypeError):
            rgb = ()
        if len(rgb) != 3 or not all(is_number(value) and 0 <= value <= 255 for value in rgb):
            raise ValueError(
                f"`color_hint` has {color!r}, which is no color: use names or codes such as 'navy' and '#803010', or (r, g,"
                " b) of 0 to 255."
            )
        parsed.append(rgb)
    return torch.tensor(parsed, dtype=torch.float32)[:, :, None, None] / 127.5 - 1


def are_color_strokes(color_hint: Any) -> bool:
    """
    Return whether a hint is a page of strokes, whose place matters, rather than a palette.

    Raises:
        ValueError: as [`parse_palette`].
    """
    return color_hint is not None and parse_palette(color_hint) is None


def preprocess_color_strokes(
    image: Any, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coarse strokes of color on a page of any size: their colors `[3, height, width]` in [-1, 1], on paper that of the
    nearest stroke, and the share of each pixel that they cover `[1, height, width]`. Paper is what is transparent or, in an
    opaque image, white.

    Args:
        box: left, top, right and bottom in pixels of the page, a part that is stretched to the size. `None` fits the page
            into it.

    Raises:
        ValueError: if the image cannot be read, or holds no stroke.
    """
    page = read_photo(image, "`color_hint`")
    rgb = np.asarray(page.convert("RGB"))
    alpha = np.asarray(page.convert("RGBA").getchannel("A"))
    if alpha.min() == 255:
        alpha = 255 * (rgb.min(axis=2) < _PAPER_LEVEL)
    if not alpha.any():
        raise ValueError("`color_hint` holds no color: it is white or transparent everywhere.")
    # Premultiplied, so that paper does not bleed into the strokes where the page is made smaller.
    layers = [channel * (alpha / 255.0) for channel in (*rgb.transpose(2, 0, 1), np.full(alpha.shape, 255.0))]
    fitted = [_fit_layer(Image.fromarray(layer.astype(np.float32)), (width, height), box) for layer in layers]
    cover = fitted[3] / 255
    nearest = ndimage.distance_transform_edt(cover == 0, return_distances=False, return_indices=True)
    colors = (np.stack(fitted[:3]) / np.maximum(cover, 1e-6))[:, nearest[0], nearest[1]]
    return torch.from_numpy(colors / 127.5 - 1).float(), torch.from_numpy(cover)[None]


def _fit_layer(layer: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None) -> np.ndarray:
    if box is None:
        return np.asarray(ImageOps.pad(layer, size, Image.Resampling.BOX))
    return np.asarray(layer.resize(size, Image.Resampling.BOX, box))
