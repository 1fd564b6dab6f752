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
"""Photos and the drawings that a program can make of them: what every training script reads.

No human drawing is needed: one photo has several valid drawings (Li et al., "Photo-Sketching", WACV 2019), here
classical contours at several scales plus the outline of the object alone, which is what people mostly draw.
"""

import hashlib
import io
import logging
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from skimage.color import rgb2lab
from skimage.feature import canny
from skimage.measure import approximate_polygon, find_contours
from skimage.morphology import disk
from torch.utils.data import Dataset
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

CONTOUR_SIZE = 256
"""Short side, in pixels, at which contours are found and kept."""

MAX_CONTOUR_SIDE = 4 * CONTOUR_SIZE

CONTOUR_NAMES = ("fine", "medium", "coarse", "object", "silhouette")
"""The drawings that `photo_to_contours` returns, in order."""

HED_CONTOUR_NAMES = ("hed_fine", "hed_medium", "hed_strong", "hed_object")
"""The drawings that `hed_contours.photo_to_hed_contours` returns, in order."""

DEFAULT_LINE_GAIN = 1.8
"""Ink per covered area: 1.0 draws thin lines in grey, 2.6 in black; 1.8 is the middle of what training draws."""

MAX_SQUASH = 4 / 3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises for a file that is damaged or no image."""
STRAIGHTENED_SHARE = 0.5
"""Share of the drawings by an unskilled hand that are made of few straight strokes."""
STRAIGHTENED_STRENGTH = 0.25
"""
The strength of `free_hand_distortion` that misses a contour by as much as `straightened_outline` does: 0.9 to 1.2 of 128
pixels at the tolerances in use, as strengths of 0.22 to 0.26 do (mean distance both ways, N = 35 silhouettes of garments).
"""

_CACHE_VERSION = "contours-3"
_DRAWING_ARRAYS = ("contours", "width")
_HED_CACHE_VERSION = "hed-contours-1"

Box = tuple[float, float, float, float]
"""left, top, right, bottom as fractions of the width and of the height, each in [0, 1]."""


class CachedPhoto(NamedTuple):
    """A decoded photo [h, w, 3] uint8, its drawings [N, H, W] bool (True = stroke), the box that holds the object."""

    image: np.ndarray
    contours: np.ndarray
    content_box: Box


# ---- from a photo to drawings of it ---------------------------------------------------------------------------------


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


def _canny_edges(grey: np.ndarray, sigma: float) -> np.ndarray:
    """Canny edges whose thresholds fall until something is found: pale garments on pale sheets have weak edges."""
    for factor in (1.0, 0.5, 0.25):
        edges = canny(grey, sigma=sigma, low_threshold=0.1 * factor, high_threshold=0.2 * factor)
        edges = without_small_parts(edges, min_size=40)
        if edges.sum() > 500:
            break
    return edges


def _centre_prior(height: int, width: int) -> np.ndarray:
    """Probability that a pixel shows the object before its colour is known: near 1 amid the photo, 0 at its rim."""
    y = np.abs((np.arange(height) + 0.5) / height * 2 - 1)[:, None]
    x = np.abs((np.arange(width) + 0.5) / width * 2 - 1)[None, :]
    radius = 0.6 * np.hypot(x, y) + 0.4 * np.maximum(x, y)
    return 1 / (1 + np.exp((radius - 0.72) / 0.1))


def object_mask(image: Image.Image, num_colors: int = 32, num_iterations: int = 6, side: int = 96) -> np.ndarray:
    """
    Separates the object that fills the middle of a photo from its background, without any learned weights.

    Colours are quantised with k-means in CIELAB; each colour's share of object and background is re-estimated from the
    current soft mask, starting from a centre prior (the idea of GrabCut with histograms instead of Gaussian mixtures).

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

    prior = _centre_prior(height, width)
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
    """Whether a mask has the size of an object and an outline that mostly runs along edges of the photo."""
    if not 0.05 < mask.mean() < 0.9 or not outline.any():
        return False
    return ndimage.binary_dilation(edges, disk(4))[outline].mean() > 0.6


def keep_object_parts(edges: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of `edges`, what belongs to the object: the floor and the wall behind it are not what a person draws."""
    size = (edges.shape[1], edges.shape[0])
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    near_object = ndimage.binary_dilation(np.asarray(enlarged) > 127, disk(4))
    return without_small_parts(edges & near_object, min_size=25, min_share=0.2)


def _find_contours(image: Image.Image) -> tuple[list[np.ndarray], Box]:
    image = image.convert("RGB")
    scaled = resized_to_short_side(image, CONTOUR_SIZE, MAX_CONTOUR_SIDE)
    grey = np.asarray(scaled.convert("L"), dtype=np.float32) / 255
    low, high = np.percentile(grey, [2, 98])
    grey = np.clip((grey - low) / max(high - low, 0.1), 0, 1)
    fine, medium, coarse = (_canny_edges(grey, sigma) for sigma in (2.5, 3.5, 5.0))

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
    return _find_contours(image)[0]


def bounding_box(ink: np.ndarray) -> Box:
    """The box around the True pixels as fractions of the sides; the whole page when there are none."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if len(rows) == 0:
        return (0.0, 0.0, 1.0, 1.0)
    height, width = ink.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


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
    How often each drawing of a photo is chosen.

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


# ---- from a binary contour to a sketch tensor -----------------------------------------------------------------------


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


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> torch.Tensor:
    """A smooth random vector field [H, W, 2] with about unit variance that varies over 1/`cells` of the page."""
    noise = torch.from_numpy(rng.standard_normal((1, 2, cells + 1, cells + 1), dtype=np.float32))
    # A cubic surface at a quarter of the size is smooth enough, and four times as fast.
    quarter = [max(2, side // 4) for side in shape]
    field = F.interpolate(noise, size=quarter, mode="bicubic", align_corners=True)
    return F.interpolate(field, size=shape, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)


def _page_grid(shape: tuple[int, int], box: Box = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """Pixel centres of an output page [H, W, 2] as (x, y) in the [-1, 1] coordinates of the input page."""
    left, top, right, bottom = box
    x = left + (right - left) * (torch.arange(shape[1], dtype=torch.float32) + 0.5) / shape[1]
    y = top + (bottom - top) * (torch.arange(shape[0], dtype=torch.float32) + 0.5) / shape[0]
    return torch.stack([x[None, :].expand(shape), y[:, None].expand(shape)], dim=-1) * 2 - 1


def _resample(ink: np.ndarray, grid: torch.Tensor) -> torch.Tensor:
    page = torch.from_numpy(np.ascontiguousarray(ink, dtype=np.float32))[None, None]
    return F.grid_sample(page, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0]


def _render_jittered(
    contour: np.ndarray, resolution: int, box: Box, line_gain: float, jitter: float, rng: np.random.Generator
) -> np.ndarray:
    """`contour_to_sketch` with every stroke moved smoothly by at most 1.5 `jitter` output pixels."""
    height, width = contour.shape
    longest = max((box[2] - box[0]) * width, (box[3] - box[1]) * height)
    oversampling = max(1, round(0.75 * longest / resolution))
    side = oversampling * resolution
    amount = jitter * rng.random()
    offset = torch.from_numpy(rng.standard_normal(2, dtype=np.float32)) * 0.5
    field = (0.6 * _smooth_noise(rng, (side, side), cells=int(rng.integers(3, 7))) + offset).clamp(-1.5, 1.5) * amount
    box_size = torch.tensor([box[2] - box[0], box[3] - box[1]], dtype=torch.float32)
    grid = _page_grid((side, side), box) + field * (2 * box_size / resolution)
    coverage = F.avg_pool2d(_resample(contour, grid)[None, None], oversampling)[0, 0].numpy()
    return 1 - 2 * np.clip(coverage * line_gain, 0, 1)


# ---- free-hand distortion -------------------------------------------------------------------------------------------


def _drop_parts(ink: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Leaves out some connected parts; the largest always stays."""
    labels, count = ndimage.label(ink, structure=np.ones((3, 3)))
    if count < 2:
        return ink
    sizes = np.bincount(labels.ravel())
    keep = rng.random(count + 1) >= rng.uniform(0, 0.9) * min(strength, 1)
    keep[1 + np.argmax(sizes[1:])] = True
    keep[0] = False
    return keep[labels]


def _erase(ink: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Lifts the pen: up to five short gaps and, now and then, one long one."""
    rows, columns = np.nonzero(ink)
    if len(rows) == 0:
        return ink
    side = min(ink.shape)
    radii = list(rng.uniform(0.01, 0.045, rng.integers(0, 1 + round(5 * min(strength, 1)))) * side)
    if rng.random() < 0.25 * strength:
        radii.append(rng.uniform(0.06, 0.14) * side)
    y, x = np.ogrid[: ink.shape[0], : ink.shape[1]]
    for radius in radii:
        k = rng.integers(len(rows))
        ink = ink & ((y - rows[k]) ** 2 + (x - columns[k]) ** 2 > radius**2)
    return ink


def _random_affine(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Wrong proportions: a 2 x 2 matrix of stretch, shear and a little rotation."""
    stretch = np.exp(rng.normal(0, 0.16 * strength, 2))
    shear, angle = rng.normal(0, 0.12 * strength), rng.normal(0, math.radians(6) * strength)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)


def _elastic_field(shape: tuple[int, int], rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Smooth displacement in [-1, 1] page coordinates: a wrong shape at large scale, a trembling hand at small."""
    wrong_shape = _smooth_noise(rng, shape, cells=int(rng.integers(2, 5))) * rng.uniform(0, 0.06)
    tremor = _smooth_noise(rng, shape, cells=int(rng.integers(7, 15))) * rng.uniform(0, 0.018)
    return (wrong_shape + tremor) * strength


def half_size(contour: np.ndarray) -> np.ndarray:
    """Half the resolution with every stroke kept: [H, W] bool -> [ceil(H / 2), ceil(W / 2)]."""
    padded = np.pad(contour, [(0, side % 2) for side in contour.shape])
    return padded[::2, ::2] | padded[1::2, ::2] | padded[::2, 1::2] | padded[1::2, 1::2]


def straightened_outline(contour: np.ndarray, tolerance: float) -> np.ndarray | None:
    """
    The closed outlines of a drawing as polygons of few straight strokes, which is how people draw a garment.

    Args:
        contour (`np.ndarray`): bool [H, W], True = stroke.
        tolerance (`float`): how far, in pixels, a stroke may run from the outline (Douglas and Peucker, 1973).

    Returns:
        `np.ndarray`: bool [H, W]; None where no outline is closed around a twentieth of the page.
    """
    filled = ndimage.binary_fill_holes(contour)
    filled = without_small_parts(ndimage.binary_opening(filled, iterations=2), min_share=0.25)
    if filled.mean() < 0.05:
        return None
    page = Image.new("1", (contour.shape[1], contour.shape[0]))
    for outline in find_contours(np.pad(filled, 1).astype(np.float32), 0.5):
        corners = approximate_polygon(outline, tolerance) - 1
        if len(corners) > 3:
            ImageDraw.Draw(page).line([(x, y) for y, x in corners], fill=1, width=2)
    return np.asarray(page)


def maybe_straightened(ink: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """With probability `share` the drawing's [`straightened_outline`], more or less exact, where it has one."""
    if rng.random() >= share:
        return ink
    straightened = straightened_outline(ink, tolerance=rng.uniform(1.5, 5.0) * min(ink.shape) / 128)
    return ink if straightened is None else straightened


def _pieces(ink: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Cuts a drawing into its 8-connected parts, and long parts across into strokes of a tenth to a half of the short side.

    Returns:
        `tuple`: the inked pixels [P, 2] as (row, column), the piece of each [P], and one pixel of each piece [N, 2].
    """
    labels, count = ndimage.label(ink, structure=np.ones((3, 3)))
    pixels = np.argwhere(ink)
    part = labels[ink]
    length = rng.uniform(0.1, 0.5) * min(ink.shape) * 3  # in pixels of ink: lines are two or three wide
    piece = np.empty(len(pixels), dtype=np.int64)
    middles: list[np.ndarray] = []
    for label in range(1, count + 1):
        members = np.flatnonzero(part == label)
        cuts = min(len(members), max(1, round(len(members) / length)))
        seeds = pixels[rng.choice(members, cuts, replace=False)]
        distances = ((pixels[members, None] - seeds[None]) ** 2).sum(-1)
        piece[members] = len(middles) + distances.argmin(1)
        middles += list(seeds)
    return pixels, piece, np.array(middles)


def delete_strokes(ink: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """
    Leaves a drawing half made: blank paper then means "not yet said" (Sarukkai et al., "Block and Detail", 2024).

    Long lines are cut into strokes first, so that a half-drawn outline occurs. Which strokes are missing ranges from any
    to those farthest from the one that was drawn first. What stays is where it was.

    Args:
        ink (`np.ndarray`): [H, W], True = stroke.
        rng (`np.random.Generator`): the only source of randomness.
        share (`float`): share of the strokes to delete, in [0, 1]; one always stays.

    Returns:
        `np.ndarray`: bool [H, W], a subset of `ink`; never empty unless `ink` is.

    Raises:
        ValueError: `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], but got {share}.")
    ink = np.asarray(ink) > 0
    if share == 0 or not ink.any():
        return ink
    pixels, piece, middles = _pieces(ink, rng)
    sizes = np.bincount(piece, minlength=len(middles))
    first = rng.choice(len(middles), p=sizes / sizes.sum())
    distance = np.hypot(*(middles - middles[first]).T) / math.hypot(*ink.shape)
    together = rng.random()
    order = together * distance + (1 - together) * rng.random(len(middles))
    order[first] = -1
    kept = order.argsort()[: max(1, len(middles) - math.floor(share * len(middles)))]
    page = np.zeros_like(ink)
    page[tuple(pixels[np.isin(piece, kept)].T)] = True
    return page


def check_stroke_deletion(share: float = 0.0, largest: float = 0.9) -> None:
    """Raises `ValueError` for a `stroke_deletion_share` or `max_stroke_deletion` outside [0, 1]."""
    for name, value in (("stroke_deletion_share", share), ("max_stroke_deletion", largest)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], but got {value}.")


def check_free_hand(share: float = 0.0, strength: float = 1.0) -> None:
    """Raises `ValueError` for a `free_hand_share` or `free_hand_strength` that cannot be."""
    if not 0 <= share <= 1:
        raise ValueError(f"`free_hand_share` must be in [0, 1], but got {share}.")
    if strength < 0:
        raise ValueError(f"`free_hand_strength` must not be negative, but got {strength}.")


def free_hand_distortion(sketch: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """
    Redraws a binary contour as an unskilled hand would: parts missing, wrong proportions, shaky lines, gaps, strokes
    drawn twice, lines of another width.

    Args:
        sketch (`np.ndarray`): [H, W], non-zero = stroke, at a side of about 128 to 256 pixels.
        rng (`np.random.Generator`): the only source of randomness.
        strength (`float`): 0 returns the drawing as it is, 1 is a poor hand; beyond 1.5 classes become unrecognisable.

    Returns:
        `np.ndarray`: bool, the shape of `sketch`; never empty unless `sketch` is.
    """
    ink = np.asarray(sketch) > 0
    if ink.ndim != 2:
        raise ValueError(f"`sketch` must be a 2-D array, but has shape {ink.shape}.")
    if strength < 0:
        raise ValueError(f"`strength` must not be negative, but is {strength}.")
    if strength == 0 or not ink.any():
        return ink
    parts = _drop_parts(ink, rng, strength)
    left, top, right, bottom = bounding_box(parts)
    centre = torch.tensor([left + right - 1, top + bottom - 1], dtype=torch.float32)
    matrix = torch.from_numpy(_random_affine(rng, strength).astype(np.float32))
    grid = (_page_grid(ink.shape) - centre) @ matrix.T + centre
    grid = grid + _elastic_field(ink.shape, rng, strength)
    drawn = _resample(parts, grid).numpy() > 0.4
    if rng.random() < 0.25 * strength:
        again = _resample(parts, grid + 0.5 * _elastic_field(ink.shape, rng, strength)).numpy() > 0.4
        drawn |= _erase(again, rng, 2.0)
    drawn = _erase(drawn, rng, strength)
    if rng.random() < 0.2 * strength:
        drawn = ndimage.binary_dilation(drawn, disk(1))
    return drawn if drawn.any() else ink


# ---- the dataset ----------------------------------------------------------------------------------------------------


def decode_photo(content: bytes) -> Image.Image:
    """The upright RGB photo of an image file; `OSError` where it is damaged."""
    with Image.open(io.BytesIO(content)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def photo_to_keep(image: Image.Image, image_size: int) -> np.ndarray:
    """
    The pixels [h, w, 3] that are kept of a photo: a short side of `image_size`, at most four times as long.

    Above `CONTOUR_SIZE` pixels no photo is enlarged: that would cost disk and time, and add nothing.
    """
    if image_size > CONTOUR_SIZE:
        image_size = min(image_size, min(image.size))
    return np.asarray(resized_to_short_side(image, image_size, 4 * image_size))


def prepare_photo(content: bytes, image_size: int) -> CachedPhoto:
    """Decodes an image file, see `photo_to_keep`, and draws it; `OSError` where it is damaged."""
    image = decode_photo(content)
    contours, content_box = _find_contours(image)
    return CachedPhoto(photo_to_keep(image, image_size), np.stack(contours), content_box)


def _pack_contours(contours: np.ndarray) -> dict[str, Any]:
    return {"contours": np.packbits(contours, axis=-1), "width": np.asarray(contours.shape[-1])}


def _unpack_contours(packed: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.unpackbits(packed["contours"], axis=-1, count=int(packed["width"])).view(bool)


def _pack(photo: CachedPhoto) -> dict[str, Any]:
    """What is kept of a photo in memory or in a file: contours with eight pixels per byte."""
    return {
        "image": photo.image,
        **_pack_contours(photo.contours),
        "content_box": np.asarray(photo.content_box, dtype=np.float64),
    }


def _unpack(packed: Mapping[str, np.ndarray]) -> CachedPhoto:
    left, top, right, bottom = packed["content_box"].tolist()
    return CachedPhoto(packed["image"], _unpack_contours(packed), (left, top, right, bottom))


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """
    Writes an `.npz` file aside and renames it, so that a killed run or a second one at the same time never leaves half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays of these names and no others are read; None where the file is missing or damaged (it is then made again)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def cache_path(cache_dir: Path, made_with: str, content: bytes) -> Path:
    """The cache's file for what is made in the way `made_with` of a file with this content."""
    key = hashlib.sha256(made_with.encode() + content).hexdigest()[:40]
    return cache_dir / key[:2] / f"{key}.npz"


def photo_cache_path(cache_dir: Path, content: bytes, image_size: int) -> Path:
    """The cache's file for a photo, kept at a short side of `image_size`, and its classical contours."""
    # A size that no photo is enlarged to has entries of its own: see `photo_to_keep`.
    at_most = "at-most-" if image_size > CONTOUR_SIZE else ""
    return cache_path(cache_dir, f"{_CACHE_VERSION}:{at_most}{image_size}:{CONTOUR_SIZE}:", content)


def cache_photo(cache_dir: Path, content: bytes, image_size: int, contours: np.ndarray, content_box: Box) -> None:
    """Puts a photo into the cache with contours bool [N, H, W] that were made elsewhere, as if they were made of it here."""
    image = photo_to_keep(decode_photo(content), image_size)
    save_arrays(photo_cache_path(cache_dir, content, image_size), _pack(CachedPhoto(image, contours, content_box)))


def list_images(root: Path, split: str) -> tuple[list[Path], list[str]]:
    """Image files of `root/split/<class>/` in a fixed order, and the class names of the whole set."""
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"`root` must hold a folder {split!r} with a folder of photos per class, but it has none.")
    class_root = root / "train" if (root / "train").is_dir() else folder
    class_names = sorted(path.name for path in class_root.iterdir() if path.is_dir())
    unknown = sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(class_names))
    if unknown:
        raise ValueError(f"`split` {split!r} has classes that the training photos lack: {', '.join(unknown)}.")
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"`root` has no images under {folder}/<class>/ ({', '.join(IMAGE_SUFFIXES)}).")
    return files, class_names


class PhotoSketchDataset(Dataset):
    """
    Photos of an imagefolder `root/split/<class>/*.jpg`, each with drawings made of it.

    Every random choice of `sample(index, epoch)` comes from `np.random.default_rng([seed, epoch, index])`, so a
    resumed run and any number of workers or processes see the same samples. Without `train` nothing is random: the
    photo's whole height or width (squashed by at most 4:3), contour `index % N`, the middle line gain.

    Files that cannot be decoded are left out, counted and named once in a warning.

    Args:
        root (`str` or `Path`): the imagefolder.
        split (`str`): the name of the split's folder.
        resolution (`int`): side of the square samples.
        seed (`int`): first word of the random key.
        train (`bool`): whether to augment.
        cache_dir (`str` or `Path`, *optional*): where decoded photos and contours are kept, keyed by the files'
            content; safe to share between runs and to kill. Without it they are kept in memory.
        contours (`"one"`, `"all"` or `"none"`): which drawings a sample holds. "all" adds `sketches` [N, 1, R, R] (N
            fixed, no jitter, middle gain) to `sketch`, "none" leaves both out.
        contour_probabilities (`Sequence[float]`): how often each of `CONTOUR_NAMES` is drawn.
        line_gain (`tuple[float, float]`): range of the darkness of lines, see `contour_to_sketch`.
        jitter (`float`): free-hand jitter of the sketch relative to the photo: at most 1.5 `jitter` pixels at 64.
        free_hand_share (`float`): share of the drawings that are redrawn as an unskilled hand would, half of them
            straightened first, so that they are only roughly where the photo's contours are.
        free_hand_strength (`float`): largest strength of that, see `free_hand_distortion`.
        stroke_deletion_share (`float`): share of the drawings that are half made, see `delete_strokes`.
        max_stroke_deletion (`float`): largest share of the strokes that these lack.
        color_jitter (`float`): range of brightness and contrast changes; above 0.2 the hue changes, too.
        zoom (`float`): up to this share of both sides is cut away, as far as the object stays whole.
        contour_source (`"classical"`, `"hed"` or `"both"`): who draws the contours. HED's are cached beside the
            classical ones, by the photo's content and the hash of the weights, and take seconds a photo, once.
        hed_weights (`str` or `Path`, *optional*): file for `hed_contours.HEDNetwork.from_file`.
        keep (`Callable[[str], bool]`, *optional*): takes a file's stem, tells whether the photo is in the dataset.

    Raises:
        ValueError: the folder is missing, holds no readable image, or has a class that `train` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        resolution: int = 64,
        seed: int = 0,
        train: bool = True,
        cache_dir: str | Path | None = None,
        *,
        contours: Literal["one", "all", "none"] = "one",
        contour_probabilities: Sequence[float] = (0.12, 0.18, 0.2, 0.2, 0.3),
        line_gain: tuple[float, float] = (1.0, 2.6),
        jitter: float = 1.0,
        free_hand_share: float = 0.0,
        free_hand_strength: float = 1.0,
        stroke_deletion_share: float = 0.0,
        max_stroke_deletion: float = 0.9,
        color_jitter: float = 0.1,
        zoom: float = 0.12,
        contour_source: Literal["classical", "hed", "both"] = "classical",
        hed_weights: str | Path | None = None,
        keep: Callable[[str], bool] | None = None,
    ):
        if len(contour_probabilities) != len(CONTOUR_NAMES):
            raise ValueError(
                f"`contour_probabilities` needs {len(CONTOUR_NAMES)} values, but has {len(contour_probabilities)}."
            )
        self.resolution, self.seed, self.train = resolution, seed, train
        self.contours, self.line_gain, self.jitter = contours, line_gain, jitter
        check_stroke_deletion(stroke_deletion_share, max_stroke_deletion)
        self.free_hand_share, self.free_hand_strength = free_hand_share, free_hand_strength
        self.stroke_deletion_share, self.max_stroke_deletion = stroke_deletion_share, max_stroke_deletion
        self.color_jitter, self.zoom = color_jitter, zoom
        check_contour_source(contour_source, hed_weights)
        self.contour_source, self.hed_weights = contour_source, hed_weights
        self.contour_probabilities = contour_distribution(contour_probabilities, contour_source)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.image_size = 2 * resolution

        files, class_names = self._list(root, split)
        self.id2label = dict(enumerate(class_names))
        self.label2id = {label: index for index, label in self.id2label.items()}
        files = [file for file in files if keep is None or keep(file.stem)]
        self.files: list[Any] = []
        self.corrupt_files: list[Any] = []
        self._cached: list[Path | dict[str, np.ndarray]] = []
        self._hed_cached: list[Path | dict[str, np.ndarray]] = []
        self._hed_network: Any = None
        if contour_source == "classical":
            self._prepare(files, split)
        else:
            self._load_hed()  # first: bad weights are told before any photo is drawn
            self._prepare(files, split)
            self._prepare_hed(split)
        self.class_labels = [self._class_label(file) for file in self.files]
        self.ids = [file.stem for file in self.files]

    # What a dataset of other files changes: which there are, their classes, how they are read and drawn.

    def _list(self, root: Any, split: str) -> tuple[list[Any], list[str]]:
        return list_images(Path(root), split)

    def _class_label(self, file: Any) -> int:
        return self.label2id[file.parent.name]

    def _read(self, file: Any) -> bytes:
        """Everything that the photo and its drawings are made of."""
        return file.read_bytes()

    def _make(self, content: bytes) -> CachedPhoto:
        return prepare_photo(content, self.image_size)

    def _choose_contour(self, contours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return contours[rng.choice(len(contours), p=self.contour_probabilities)]

    def _prepare(self, files: list[Any], split: str) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10
        for file in tqdm(files, desc=f"Drawing {split} photos", unit="photo", mininterval=interval, leave=False):
            try:
                entry = self._cache_entry(file)
            except IMAGE_ERRORS as error:
                logger.debug("%s: %s", file, error)
                self.corrupt_files.append(file)
                continue
            self.files.append(file)
            self._cached.append(entry)
        if self.corrupt_files:
            names = ", ".join(file.name for file in self.corrupt_files)
            logger.warning("%d of %d files unreadable, left out: %s", len(self.corrupt_files), len(files), names)
        if not self.files:
            raise ValueError(f"`split` {split!r} has no readable photo left of {len(files)} files.")

    def _cache_entry(self, file: Any) -> Path | dict[str, np.ndarray]:
        content = self._read(file)
        if self.cache_dir is None:
            return _pack(self._make(content))
        path = photo_cache_path(self.cache_dir, content, self.image_size)
        if not path.exists():
            save_arrays(path, _pack(self._make(content)))
        return path

    def _load_hed(self) -> None:
        from hed_contours import HEDNetwork, hash_weights  # it imports this module

        assert self.hed_weights is not None
        self._hed_network = HEDNetwork.from_file(self.hed_weights)
        self._hed_hash = hash_weights(self.hed_weights)

    def _prepare_hed(self, split: str) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10
        names = tqdm(self.files, desc=f"HED draws {split} photos", unit="photo", mininterval=interval, leave=False)
        self._hed_cached = [self._hed_entry(file) for file in names]
        self._hed_network = None  # 59 MB that no sample needs

    def _hed_entry(self, file: Any) -> Path | dict[str, np.ndarray]:
        content = self._read(file)
        if self.cache_dir is None:
            return _pack_contours(self._make_hed(content))
        path = self._cache_path(f"{_HED_CACHE_VERSION}:{self._hed_hash}:{CONTOUR_SIZE}:", content)
        if not path.exists():
            save_arrays(path, _pack_contours(self._make_hed(content)))
        return path

    def _make_hed(self, content: bytes) -> np.ndarray:
        from hed_contours import photo_to_hed_contours

        if self._hed_network is None:
            self._load_hed()
        return np.stack(photo_to_hed_contours(decode_photo(content), self._hed_network))

    def _hed_contours(self, index: int) -> np.ndarray:
        entry = self._hed_cached[index]
        if not isinstance(entry, Path):
            return _unpack_contours(entry)
        packed = load_arrays(entry, _DRAWING_ARRAYS)
        if packed is None:
            packed = _pack_contours(self._make_hed(self._read(self.files[index])))
            save_arrays(entry, packed)
        return _unpack_contours(packed)

    def _cache_path(self, made_with: str, content: bytes) -> Path:
        assert self.cache_dir is not None
        return cache_path(self.cache_dir, made_with, content)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """`dataset[index]` is epoch 0; a sampler that yields `(epoch, index)` gets that epoch's augmentation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(index, epoch)

    def photo(self, index: int) -> CachedPhoto:
        """The decoded photo, its contours and its content box, before any augmentation."""
        photo = self._classical_photo(index)
        return photo if self.contour_source == "classical" else photo._replace(contours=self.drawings(index))

    def _classical_photo(self, index: int) -> CachedPhoto:
        entry = self._cached[index]
        if not isinstance(entry, Path):
            return _unpack(entry)
        packed = load_arrays(entry, ("image", *_DRAWING_ARRAYS, "content_box"))
        if packed is None:
            photo = self._make(self._read(self.files[index]))
            save_arrays(entry, _pack(photo))
            return photo
        return _unpack(packed)

    def drawings(self, index: int) -> np.ndarray:
        """The contours of [`PhotoSketchDataset.photo`] alone, bool [N, H, W]: the photo itself is not read."""
        if self.contour_source == "hed":
            return self._hed_contours(index)
        entry = self._cached[index]
        packed = load_arrays(entry, _DRAWING_ARRAYS) if isinstance(entry, Path) else entry
        classical = self._classical_photo(index).contours if packed is None else _unpack_contours(packed)
        if self.contour_source == "classical":
            return classical
        return np.concatenate([classical, self._hed_contours(index)])

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """
        One augmented sample.

        Returns:
            `dict`: `pixel_values` float32 [3, R, R] in [-1, 1]; `sketch` float32 [1, R, R], -1 = stroke, +1 = paper;
            `sketches` [N, 1, R, R] with `contours="all"`; `sketch_abstraction` float32 scalar in [0, 1], how freely
            `sketch` is drawn (0: it traces the photo); `class_label` int; `id` the file's stem.
        """
        photo = self.photo(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        box = self._crop_box(photo, rng)
        flip = self.train and rng.random() < 0.5
        sample: dict[str, Any] = {"pixel_values": self._pixel_values(photo.image, box, rng)}
        conditions = {}
        if self.contours != "none":
            sketch, abstraction = self._sketch(photo.contours, index, box, rng)
            sample["sketch"] = torch.from_numpy(sketch)[None]
            conditions["sketch_abstraction"] = torch.tensor(abstraction, dtype=torch.float32)
        if self.contours == "all":
            drawings = [contour_to_sketch(contour, self.resolution, box) for contour in photo.contours]
            sample["sketches"] = torch.from_numpy(np.stack(drawings))[:, None]
        if flip:
            sample = {name: value.flip(-1) for name, value in sample.items()}
        return {**sample, **conditions, "class_label": self.class_labels[index], "id": self.ids[index]}

    def view(self, index: int) -> tuple[torch.Tensor, np.ndarray, Box]:
        """
        A photo as it is without augmentation, and what can be drawn of it; the same at every call.

        Returns:
            `tuple`: float32 [3, R, R] in [-1, 1], all contours bool [N, H, W], and the box of the contours that the photo
            shows, see `contour_to_sketch`.
        """
        return self.view_of(self.photo(index))

    def view_of(self, photo: CachedPhoto) -> tuple[torch.Tensor, np.ndarray, Box]:
        """[`PhotoSketchDataset.view`] of any photo, if it is in the dataset or not."""
        if self.train:
            raise ValueError("`view` needs a dataset with `train=False`.")
        rng = np.random.default_rng(0)
        box = self._crop_box(photo, rng)
        return self._pixel_values(photo.image, box, rng), photo.contours, box

    def _crop_box(self, photo: CachedPhoto, rng: np.random.Generator) -> Box:
        """
        A box whose sides differ by at most 4:3, between the whole photo and the object with a thin margin.

        Users' drawings are recentred and scaled to a margin, so the object must be seen at that scale, too.
        """
        height, width = photo.image.shape[:2]
        short = min(height, width)
        largest = (min(width, MAX_SQUASH * short), min(height, MAX_SQUASH * short))
        left, top, right, bottom = photo.content_box
        margin = 1.04 + rng.random() * 0.2
        needed = max((right - left) * width, (bottom - top) * height) * margin
        tightness, shrink = (rng.random(), 1 - self.zoom * rng.random()) if self.train else (0.0, 1.0)
        box: list[tuple[float, float]] = []
        for side, limit, low, high in ((width, largest[0], left, right), (height, largest[1], top, bottom)):
            tight = min(limit, max(needed, short * (1 - 3 * self.zoom)))
            length = max(min(limit, needed), (limit + (tight - limit) * tightness) * shrink)
            first, last = high * side - length, low * side
            first, last = max(0.0, min(first, last)), min(side - length, max(first, last))
            start = min(max(first + (last - first) * (rng.random() if self.train else 0.5), 0.0), side - length)
            box.append((start / side, (start + length) / side))
        return (box[0][0], box[1][0], box[0][1], box[1][1])

    def _pixel_values(self, image: np.ndarray, box: Box, rng: np.random.Generator) -> torch.Tensor:
        height, width = image.shape[:2]
        pixel_box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        resized = Image.fromarray(image).resize((self.resolution,) * 2, Image.Resampling.BICUBIC, box=pixel_box)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        if not self.train or self.color_jitter == 0:
            return pixels.contiguous()
        brightness, contrast = rng.uniform(-1, 1, 2) * self.color_jitter
        pixels = pixels * (1 + contrast) + brightness
        if self.color_jitter > 0.2:
            saturation, *tint = rng.uniform(-1, 1, 4) * self.color_jitter
            grey = pixels.mean(0, keepdim=True)
            pixels = grey + (pixels - grey) * (1 + saturation) + torch.tensor(tint).float().view(3, 1, 1) / 2
        return pixels.clamp(-1, 1).contiguous()

    def _sketch(
        self, contours: np.ndarray, index: int, box: Box, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """
        A drawing of a photo, and how freely it is drawn.

        Args:
            contours (`np.ndarray`): all drawings of the photo, bool [N, H, W].
            index (`int`): of the photo; it alone chooses the drawing without `train`.
            box (`Box`): the part of the photo to draw.
            rng (`np.random.Generator`): the only source of randomness.

        Returns:
            `tuple[np.ndarray, float]`: float32 [R, R], -1 = stroke, +1 = paper, and the abstraction in [0, 1]: 0 for what
            traces the photo, jitter aside; else the strength of the free-hand distortion over `free_hand_strength`, the
            largest. A straightened outline counts as a strength of at least `STRAIGHTENED_STRENGTH`. Deleted strokes
            count nothing: what is drawn is where it should be.
        """
        if not self.train:
            return contour_to_sketch(
                contours[index % len(contours)], self.resolution, box, sum(self.line_gain) / 2
            ), 0.0
        contour = self._choose_contour(contours, rng)
        gain = rng.uniform(*self.line_gain)
        if self.free_hand_share > 0 and rng.random() < self.free_hand_share:
            contour = half_size(contour)
            ink = maybe_straightened(contour, rng, STRAIGHTENED_SHARE)
            least = 0.0 if ink is contour else STRAIGHTENED_STRENGTH
            ink = self._half_made(ink, box, rng)
            strength = self.free_hand_strength * rng.random()
            drawn = free_hand_distortion(ink, rng, strength)
            largest = self.free_hand_strength or STRAIGHTENED_STRENGTH
            return contour_to_sketch(drawn, self.resolution, box, gain), min(1.0, max(strength, least) / largest)
        contour = self._half_made(contour, box, rng)
        if self.jitter == 0:
            return contour_to_sketch(contour, self.resolution, box, gain), 0.0
        jitter = self.jitter * self.resolution / 64
        return _render_jittered(contour, self.resolution, box, gain, jitter, rng), 0.0

    def _half_made(self, ink: np.ndarray, box: Box, rng: np.random.Generator) -> np.ndarray:
        """Deletes strokes of a share of the drawings, within `box` only: something stays where it can be seen."""
        if self.stroke_deletion_share == 0 or rng.random() >= self.stroke_deletion_share:
            return ink
        height, width = ink.shape
        rows = slice(math.floor(box[1] * height), math.ceil(box[3] * height))
        columns = slice(math.floor(box[0] * width), math.ceil(box[2] * width))
        ink = ink.copy()
        ink[rows, columns] = delete_strokes(ink[rows, columns], rng, self.max_stroke_deletion * rng.random())
        return ink
