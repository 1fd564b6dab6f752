# SPDX-License-Identifier: Apache-2.0
"""From a contour to what a person might have drawn: shaky, misplaced, straightened, half made."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours
from skimage.morphology import disk

from diffsketching_pipeline.images.contours import Box, bounding_box, without_small_parts


STRAIGHTENED_SHARE = 0.5
"""Share of the drawings by an unskilled hand that are made of few straight strokes."""

STRAIGHTENED_STRENGTH = 0.25
"""
The strength of `free_hand_distortion` that misses a contour by as much as `straightened_outline` does: 0.9 to 1.2 of 128
pixels at the tolerances in use, as strengths of 0.22 to 0.26 do (mean distance both ways, N = 35 silhouettes of garments).
"""


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> torch.Tensor:
    """A smooth random vector field [H, W, 2] with about unit variance that varies over 1/`cells` of the page."""
    noise = torch.from_numpy(rng.standard_normal((1, 2, cells + 1, cells + 1), dtype=np.float32))
    # A cubic surface at a quarter of the size is smooth enough, and four times as fast.
    quarter = [max(2, side // 4) for side in shape]
    field = F.interpolate(noise, size=quarter, mode="bicubic", align_corners=True)
    return F.interpolate(field, size=shape, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)


def _page_grid(shape: tuple[int, int], box: Box = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """Pixel centers of an output page [H, W, 2] as (x, y) in the [-1, 1] coordinates of the input page."""
    left, top, right, bottom = box
    x = left + (right - left) * (torch.arange(shape[1], dtype=torch.float32) + 0.5) / shape[1]
    y = top + (bottom - top) * (torch.arange(shape[0], dtype=torch.float32) + 0.5) / shape[0]
    return torch.stack([x[None, :].expand(shape), y[:, None].expand(shape)], dim=-1) * 2 - 1


def _resample(ink: np.ndarray, grid: torch.Tensor) -> torch.Tensor:
    page = torch.from_numpy(np.ascontiguousarray(ink, dtype=np.float32))[None, None]
    return F.grid_sample(page, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0]


def render_jittered(
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
        strength (`float`): 0 returns the drawing as it is, 1 is a poor hand; beyond 1.5 classes become unrecognizable.

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
    center = torch.tensor([left + right - 1, top + bottom - 1], dtype=torch.float32)
    matrix = torch.from_numpy(_random_affine(rng, strength).astype(np.float32))
    grid = (_page_grid(ink.shape) - center) @ matrix.T + center
    grid = grid + _elastic_field(ink.shape, rng, strength)
    drawn = _resample(parts, grid).numpy() > 0.4
    if rng.random() < 0.25 * strength:
        again = _resample(parts, grid + 0.5 * _elastic_field(ink.shape, rng, strength)).numpy() > 0.4
        drawn |= _erase(again, rng, 2.0)
    drawn = _erase(drawn, rng, strength)
    if rng.random() < 0.2 * strength:
        drawn = ndimage.binary_dilation(drawn, disk(1))
    return drawn if drawn.any() else ink
