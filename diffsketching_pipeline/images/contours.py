# SPDX-License-Identifier: Apache-2.0
"""From a photo to the drawings that a program can make of it: classical contours at several scales, and the object's outline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from skimage.color import rgb2lab
from skimage.feature import canny
from skimage.morphology import disk


CONTOUR_SIZE = 256
"""Short side, in pixels, at which contours are found and kept."""

MAX_CONTOUR_SIDE = 4 * CONTOUR_SIZE

CONTOUR_NAMES = ("fine", "medium", "coarse", "object", "silhouette")
"""The drawings that `photo_to_contours` returns, in order."""

HED_CONTOUR_NAMES = ("hed_fine", "hed_medium", "hed_strong", "hed_object")
"""The drawings that `hed_contours.photo_to_hed_contours` returns, in order."""

DEFAULT_LINE_GAIN = 1.8
"""Ink per covered area: 1.0 draws thin lines in gray, 2.6 in black; 1.8 is the middle of what training draws."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom as fractions of the width and of the height, each in [0, 1]."""


def check_contour_source(source: str = "classical", hed_weights: str | Path | None = None) -> None:
    """Raises `ValueError` for an unknown source of contours, or HED without the file of its weights."""
    if source not in ("classical", "hed", "both"):
        raise ValueError(f"`contours` must be 'classical', 'hed' or 'both', but got {source!r}.")
    if source != "classical" and (hed_weights is None or not Path(hed_weights).is_file()):
        raise ValueError(
            f"`hed_weights` must be a file of HED weights for contours by {source!r}, but got {hed_weights}."
        )


def contour_distribution(classical: Sequence[float], source: str = "classical") -> np.ndarray:
    """
    Return the probability with which each drawing of a photo is chosen.

    Args:
        classical (`Sequence[float]`): relative frequency of each of `CONTOUR_NAMES`.
        source (`str`): "classical", "hed" (each of `HED_CONTOUR_NAMES` equally often) or "both" (half and half).

    Returns:
        `np.ndarray`: float64, sums to 1; the classical contours come first.
    """
    probabilities = np.asarray(classical, dtype=np.float64)
    probabilities = probabilities / probabilities.sum()
    if source == "classical":
        return probabilities
    hed = np.full(len(HED_CONTOUR_NAMES), 1 / len(HED_CONTOUR_NAMES))
    return hed if source == "hed" else np.concatenate([probabilities, hed]) / 2


def resized_to_short_side(image: Image.Image, short_side: int, longest_side: int) -> Image.Image:
    scale = min(short_side / min(image.size), longest_side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def without_small_parts(edges: np.ndarray, min_size: int = 0, min_share: float = 0.0) -> np.ndarray:
    """Keeps the 8-connected parts of at least `min_size` pixels and `min_share` of the largest part's pixels."""
    labels, count = ndimage.label(edges, structure=np.ones((3, 3)))
    if count == 0:
        return edges
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return ((sizes >= max(min_size, 1)) & (sizes >= min_share * sizes.max()))[labels]


def _canny_edges(gray: np.ndarray, sigma: float) -> np.ndarray:
    """Canny edges whose thresholds fall until something is found: pale garments on pale sheets have weak edges."""
    for factor in (1.0, 0.5, 0.25):
        edges = canny(gray, sigma=sigma, low_threshold=0.1 * factor, high_threshold=0.2 * factor)
        edges = without_small_parts(edges, min_size=40)
        if edges.sum() > 500:
            break
    return edges


def _center_prior(height: int, width: int) -> np.ndarray:
    """Probability that a pixel shows the object before its color is known: near 1 amid the photo, 0 at its rim."""
    y = np.abs((np.arange(height) + 0.5) / height * 2 - 1)[:, None]
    x = np.abs((np.arange(width) + 0.5) / width * 2 - 1)[None, :]
    radius = 0.6 * np.hypot(x, y) + 0.4 * np.maximum(x, y)
    return 1 / (1 + np.exp((radius - 0.72) / 0.1))


def object_mask(image: Image.Image, num_colors: int = 32, num_iterations: int = 6, side: int = 96) -> np.ndarray:
    """
    Separates the object that fills the middle of a photo from its background, without any learned weights.

    Colors are quantized with k-means in CIELAB; each color's share of object and background is re-estimated from the
    current soft mask, starting from a center prior (the idea of GrabCut with histograms instead of Gaussian mixtures).

    Returns:
        `np.ndarray`: bool [h, w] at a short side of `side` pixels; empty or full where the photo has no clear object.
    """
    image = resized_to_short_side(image.convert("RGB"), side, 4 * side)
    lab = ndimage.gaussian_filter(rgb2lab(np.asarray(image)), sigma=(1.0, 1.0, 0.0))
    lab[..., 0] *= 0.7  # a shadow changes lightness more than hue
    height, width = lab.shape[:2]
    colors = lab.reshape(-1, 3)
    if np.ptp(colors, axis=0).max() < 1e-3:
        return np.zeros((height, width), dtype=bool)
    _, codes = kmeans2(colors, min(num_colors, len(colors)), iter=8, minit="++", rng=np.random.default_rng(0))

    prior = _center_prior(height, width)
    prior_logit = np.log((prior + 0.02) / (1 - prior + 0.02))
    probability = prior
    for _ in range(num_iterations):
        inside = np.bincount(codes, probability.ravel(), num_colors) + 0.5
        outside = np.bincount(codes, 1 - probability.ravel(), num_colors) + 0.5
        color_logit = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
        smooth_logit = ndimage.gaussian_filter(color_logit[codes].reshape(height, width), 1.5)
        probability = 1 / (1 + np.exp(-np.clip(1.5 * smooth_logit + prior_logit, -30, 30)))
    mask = ndimage.binary_opening(probability > 0.5, iterations=2)
    mask = ndimage.binary_closing(np.pad(mask, 4), iterations=3)[4:-4, 4:-4]
    return ndimage.binary_fill_holes(without_small_parts(mask, min_share=0.25))


def mask_outline(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The outline, one pixel wide, of a mask smoothly enlarged to `size` (width, height); none at the photo's rim."""
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    smooth = ndimage.gaussian_filter(np.asarray(enlarged, dtype=np.float32), 2.5) > 127
    return smooth & ~ndimage.binary_erosion(smooth, structure=np.ones((3, 3)), border_value=1)


def is_plausible_mask(mask: np.ndarray, outline: np.ndarray, edges: np.ndarray) -> bool:
    """Return whether a mask has the size of an object and an outline that mostly runs along edges of the photo."""
    if not 0.05 < mask.mean() < 0.9 or not outline.any():
        return False
    return ndimage.binary_dilation(edges, disk(4))[outline].mean() > 0.6


def keep_object_parts(edges: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the part of `edges` that belongs to the object: the floor and the wall behind it are not what a person draws."""
    size = (edges.shape[1], edges.shape[0])
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    near_object = ndimage.binary_dilation(np.asarray(enlarged) > 127, disk(4))
    return without_small_parts(edges & near_object, min_size=25, min_share=0.2)


def contours_and_box(image: Image.Image) -> tuple[list[np.ndarray], Box]:
    image = image.convert("RGB")
    scaled = resized_to_short_side(image, CONTOUR_SIZE, MAX_CONTOUR_SIDE)
    gray = np.asarray(scaled.convert("L"), dtype=np.float32) / 255
    low, high = np.percentile(gray, [2, 98])
    gray = np.clip((gray - low) / max(high - low, 0.1), 0, 1)
    fine, medium, coarse = (_canny_edges(gray, sigma) for sigma in (2.5, 3.5, 5.0))

    mask = object_mask(image)
    silhouette = mask_outline(mask, scaled.size)
    if is_plausible_mask(mask, silhouette, fine | medium):
        object_parts, content = keep_object_parts(medium, mask), mask
    else:
        object_parts = silhouette = content = without_small_parts(medium, min_share=0.25)
    edges = [fine, medium, coarse, object_parts, silhouette]
    return [ndimage.binary_dilation(e, disk(1)) for e in edges], bounding_box(content)


def photo_to_contours(image: Image.Image) -> list[np.ndarray]:
    """
    Draws a photo in several valid ways.

    Args:
        image (`PIL.Image.Image`): a photo of any size and mode; it is scaled to a short side of `CONTOUR_SIZE` pixels.

    Returns:
        `list[np.ndarray]`: one bool array [H, W] per name in `CONTOUR_NAMES`, True = stroke (lines 3 pixels wide):
        Canny edges at sigma 2.5, 3.5 and 5, the larger parts of the second that belong to the object, and the outline
        of the object alone. Where no object stands out, the last two are both the largest parts of the second. A photo
        without any edge gives empty drawings.
    """
    return contours_and_box(image)[0]


def bounding_box(ink: np.ndarray) -> Box:
    """The box around the True pixels as fractions of the sides; the whole page when there are none."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if len(rows) == 0:
        return (0.0, 0.0, 1.0, 1.0)
    height, width = ink.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


def contour_to_sketch(
    contour: np.ndarray, resolution: int, box: Box | None = None, line_gain: float = DEFAULT_LINE_GAIN
) -> np.ndarray:
    """
    Renders a binary contour in the one sketch convention, by area so that no thin line is lost, smooth where it is enlarged.

    Args:
        contour (`np.ndarray`): [H, W], non-zero = stroke.
        resolution (`int`): side of the square result in pixels; the box is squashed to a square.
        box (`Box`, *optional*): the part to render, as fractions of the sides; the whole contour by default.
        line_gain (`float`): ink per covered area before clipping; larger is darker.

    Returns:
        `np.ndarray`: float32 [resolution, resolution] in [-1, 1], -1 = stroke, +1 = paper.
    """
    contour = np.asarray(contour)
    if contour.ndim != 2:
        raise ValueError(f"`contour` must be a 2-D array, but has shape {contour.shape}.")
    height, width = contour.shape
    left, top, right, bottom = box if box is not None else (0.0, 0.0, 1.0, 1.0)
    page = Image.fromarray((contour > 0).astype(np.float32))
    pixel_box = (left * width, top * height, right * width, bottom * height)
    # By area no thin line is lost where the page shrinks; where it grows, areas are blocks, and pens draw none.
    shrinks = min((right - left) * width, (bottom - top) * height) >= resolution
    resample = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    coverage = np.asarray(page.resize((resolution, resolution), resample, box=pixel_box))
    return 1 - 2 * np.clip(coverage * line_gain, 0, 1)


def photo_to_sketch(image: Image.Image, resolution: int, contour: str = "medium") -> np.ndarray:
    """
    The drawing that evaluation compares with: one named contour of a whole photo, squashed to a square.

    Returns:
        `np.ndarray`: float32 [resolution, resolution], -1 = stroke, +1 = paper.

    Raises:
        ValueError: `contour` is not one of `CONTOUR_NAMES`.
    """
    if contour not in CONTOUR_NAMES:
        raise ValueError(f"`contour` must be one of {CONTOUR_NAMES}, but is {contour!r}.")
    return contour_to_sketch(photo_to_contours(image)[CONTOUR_NAMES.index(contour)], resolution)
