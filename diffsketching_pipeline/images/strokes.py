# SPDX-License-Identifier: Apache-2.0
"""From brightness to strokes, and from strokes to lines of one width."""

import functools
import math
import numbers
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.morphology import skeletonize

from diffsketching_pipeline.images.reading import is_number
from diffsketching_pipeline.images.surround import enlarge, thumbnail


# Fainter than this share of full contrast is no stroke, and neither is what this many deviations of the noise explain.
_MIN_CONTRAST = 0.06
_NOISE_SIGMAS = 6.0
# Otsu's separability (between-class over total variance) of a page with two brightnesses; a plain gradient has 0.75.
_MIN_SEPARATION = 0.85
# A background estimate never falls below this share of the paper, so that a black shape stays darker than it.
_MIN_BACKGROUND = 0.2
# Share of the page that paper of one brightness covers in a digital drawing.
_MIN_EVEN_PAPER = 0.25
# A mark with less area than a square of this share of the drawing's longer side is dust; at the page's border, where
# shadows end, more is.
_SPECK = 0.01
_BORDER_SPECK = 0.03
# Half widths as shares of the drawing's longer side: the most that strokes have, the least that a filled shape has.
_MAX_STROKE = 0.06
_MIN_FILL = 0.05
# What spans fewer pixels than this in the source is not magnified as if it were a whole drawing.
MIN_SOURCE_EXTENT = 16.0
# By how much strokes are darker than a pattern that is left out from under them, the share of the page that one spans, how
# often it repeats, and how much alike (as a correlation).
_MIN_PATTERN_RATIO = 1.8
_PATTERN_EXTENT = 0.8
_MIN_PERIODS = 5
_MIN_REPEAT = 0.5
# The drawing is traced on a grid up to this many times finer than the output, and drawn on one this many times finer.
TRACE_SCALE = 6
_DRAW_SCALE = 4
# In pixels. Thinner lines than this do not survive area averaging.
MIN_LINE_WIDTH = 0.75


@dataclass(frozen=True)
class SketchOptions:
    """The options for every sketch of one call; see [`SketchProcessor`]."""

    size: tuple[int, int]
    threshold: float | str
    invert: bool | None
    fit: str
    resize_mode: str
    margin: float
    line_width: float | None


def check_options(options: SketchOptions) -> None:
    for side in options.size:
        if not (is_number(side, numbers.Integral) and 8 <= side <= 4096):
            raise ValueError(
                f"`resolution`, `height` and `width` have to be integers in [8, 4096] but one is {side!r}."
            )
    if options.threshold != "otsu" and not (is_number(options.threshold) and 0 < float(options.threshold) < 1):
        raise ValueError(f'`threshold` has to be "otsu" or a float in (0, 1) but is {options.threshold!r}.')
    if options.invert not in (None, True, False):
        raise ValueError(f"`invert` has to be True, False or None but is {options.invert!r}.")
    if options.fit not in ("content", "page"):
        raise ValueError(f'`fit` has to be "content" or "page" but is {options.fit!r}.')
    if options.resize_mode not in ("pad", "stretch"):
        raise ValueError(f'`resize_mode` has to be "pad" or "stretch" but is {options.resize_mode!r}.')
    if not (is_number(options.margin) and 0 <= options.margin <= 0.4):
        raise ValueError(f"`margin` has to be in [0, 0.4] but is {options.margin!r}.")
    if options.line_width is not None and not (is_number(options.line_width) and 0 < options.line_width <= 0.25):
        raise ValueError(f"`line_width` has to be None or in (0, 0.25] but is {options.line_width!r}.")


def _dark_part(gray: np.ndarray) -> tuple[np.ndarray, float, float] | None:
    """
    Return the dark part of a page that falls into two brightnesses, as a mask of its thumbnail, and the part's share of the
    border and of the interior. `None` if it does not: shading swamps the strokes.
    """
    thumb = thumbnail(gray, 256).astype(np.float32)
    if thumb.min() == thumb.max():
        return None
    dark = thumb <= threshold_otsu(thumb)
    share = dark.mean()
    separation = share * (1 - share) * (thumb[dark].mean() - thumb[~dark].mean()) ** 2 / thumb.var()
    if separation < _MIN_SEPARATION:
        return None
    frame = max(1, round(0.01 * min(thumb.shape)))
    border = np.ones_like(dark)
    border[frame:-frame, frame:-frame] = False
    inner = round(0.08 * min(thumb.shape))
    interior = dark[inner : dark.shape[0] - inner, inner : dark.shape[1] - inner]
    return dark, float(dark[border].mean()), float(interior.mean())


def is_light_on_dark(gray: np.ndarray) -> bool:
    """Paper is what touches the border and fills much of the page; failing that, strokes are what stands out."""
    part = _dark_part(gray)
    if part is None:
        thumb = thumbnail(gray, 256).astype(np.float32)
        return bool(((thumb - ndimage.gaussian_filter(thumb, 4)) ** 3).mean() > 0)
    _, border, interior = part
    return border > 0.5 and interior > 0.25


def without_surround(gray: np.ndarray) -> np.ndarray:
    """A drawn frame, a scanner's edge or the table that a page lies on: dark all along the border, becomes paper."""
    part = _dark_part(gray)
    if part is None or part[1] <= 0.5 or part[2] > 0.25:
        return gray
    # Opening cuts off strokes that touch the surround.
    dark = ndimage.binary_opening(np.pad(part[0], 7, constant_values=True), np.ones((7, 7)))
    labels, _ = ndimage.label(dark)
    surround = (labels == labels[0, 0])[7:-7, 7:-7]
    surround = ndimage.maximum_filter(surround, 1 + 2 * max(2, round(0.015 * max(surround.shape))))
    if surround.all():
        return gray
    nearest = ndimage.distance_transform_edt(surround, return_distances=False, return_indices=True)
    size = (gray.shape[1], gray.shape[0])
    paper = Image.fromarray(thumbnail(gray, 256)[tuple(nearest)]).resize(size, Image.Resampling.BILINEAR)
    surround = Image.fromarray(surround).resize(size, Image.Resampling.NEAREST)
    return np.where(np.asarray(surround), np.asarray(paper), gray)


def check_not_uniform(gray: np.ndarray, name: str) -> None:
    low, high = int(gray.min()), int(gray.max())
    if high - low >= 255 * _MIN_CONTRAST:
        return
    kind = "all dark" if high < 128 else "blank"
    raise ValueError(
        f"{name} holds no drawing: it is {kind} (gray levels {low} to {high} of 255). Draw dark lines on light paper."
    )


def trace(
    gray: np.ndarray, options: SketchOptions, name: str, region: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """
    Stroke mask, the page's height and width in cells of it, and cells per pixel of the source.

    Args:
        region: the pixels that are of the source, where others were laid around them.
    """
    side = TRACE_SCALE * max(options.size)
    mask, factor = _ink(gray, options.threshold, side, region)
    if not mask.any():
        raise ValueError(
            f"{name} holds no drawing: nothing in it is darker than its paper and noise. Draw darker lines, or pass"
            " another `threshold` or `invert`."
        )
    rows, columns = _occupied(mask)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    if options.fit == "content" and factor < 1 and extent < 0.5 * max(mask.shape):
        # A small drawing on a large page is traced at the resolution it has.
        pad = 0.1 * extent + 4
        top, left = (max(0, math.floor((index[0] - pad) / factor)) for index in (rows, columns))
        bottom, right = (math.ceil((index[-1] + 1 + pad) / factor) for index in (rows, columns))
        gray = gray[top:bottom, left:right]
        region = region if region is None else region[top:bottom, left:right]
        closer, closer_factor = _ink(gray, options.threshold, side, region)
        mask, factor = (closer, closer_factor) if closer.any() else (mask, factor)
    return mask, np.array(gray.shape) * factor, factor


def _occupied(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows and of the columns that are not empty."""
    return np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))


def _ink(
    gray: np.ndarray, threshold: float | str, side: int, region: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Stroke mask on a grid of about `side` cells, and its cells per pixel of `gray`."""
    is_photo = _is_photo(gray if region is None or not region.any() else gray[region][None])
    gray, factor = _resample(gray, side, is_photo)
    background = _background(gray)
    darkness = 1 - gray / background
    if isinstance(threshold, str):
        own = None if region is None or not region.any() else enlarge(region, darkness.shape)
        floor = _noise_floor(darkness, background, own) if is_photo else _MIN_CONTRAST
        darkness = np.maximum(darkness, 0)
        high = threshold_otsu(darkness)
        mask = apply_hysteresis_threshold(darkness, np.maximum(floor, 0.6 * high), np.maximum(floor, high))
        if not is_photo:
            mask = _without_pattern(mask, darkness)
    else:
        mask = darkness > 1 - threshold
    if not is_photo:
        # In a photo such edges are those of shadows.
        mask |= _swallowed_edges(gray, background, mask)
    return _remove_specks(mask), factor


def _noise_floor(darkness: np.ndarray, background: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Return the darkness that noise of a constant size in gray levels explains: in a shadow, a larger share of the paper."""
    level = np.median(darkness if own is None else darkness[own])
    deviation = np.abs(darkness - level) * background
    # A quartile of the deviations, 0.3186 sigma of a normal distribution, is that of the paper even on a crowded page.
    noise = np.quantile(deviation if own is None else deviation[own], 0.25) / 0.3186
    return np.maximum(_MIN_CONTRAST, level + _NOISE_SIGMAS * noise / background)


def _without_pattern(mask: np.ndarray, darkness: np.ndarray) -> np.ndarray:
    """Dark strokes alone where a pale regular pattern, a grid or rules, covers the page under them."""
    levels = darkness[mask]
    if len(levels) < 2 or levels.min() == levels.max():
        return mask
    split = threshold_otsu(levels)
    pale = mask & (darkness <= split)
    dark = darkness[mask & (darkness > split)]
    if not pale.any() or not len(dark):
        return mask
    level, stroke_level = float(np.median(darkness[pale])), float(np.median(dark))
    if stroke_level < _MIN_PATTERN_RATIO * level or not _is_regular(pale):
        return mask
    # Half way, because a second color of the pattern, a margin's line, may be darker than the split.
    return darkness > (level + stroke_level) / 2


def _is_regular(pattern: np.ndarray) -> bool:
    """Return whether marks cover the page from side to side, and repeat along one of its axes."""
    if any(
        np.ptp(index) < _PATTERN_EXTENT * side for index, side in zip(_occupied(pattern), pattern.shape, strict=True)
    ):
        return False
    for axis in (0, 1):
        profile = pattern.sum(axis).astype(np.float64)
        profile -= ndimage.uniform_filter1d(profile, max(3, len(profile) // 4), mode="nearest")
        power = np.abs(np.fft.rfft(profile, 2 * len(profile))) ** 2
        repeats = np.fft.irfft(power)[: len(profile) // _MIN_PERIODS]
        # Less is left to overlap at a larger lag.
        repeats *= len(profile) / (len(profile) - np.arange(len(repeats)))
        first = np.flatnonzero(repeats < 0)
        if len(first) and repeats[0] > 0 and repeats[first[0] :].max(initial=0) > _MIN_REPEAT * repeats[0]:
            return True
    return False


def _is_photo(gray: np.ndarray) -> bool:
    """Return whether no three neighboring gray levels hold much of the page, as the paper of a digital drawing does."""
    share = np.array(Image.fromarray(gray).histogram()) / gray.size
    return bool(np.convolve(share, np.ones(3)).max() < _MIN_EVEN_PAPER)


def _resample(gray: np.ndarray, side: int, is_photo: bool) -> tuple[np.ndarray, float]:
    """To at most `side` cells along the longer side, and at least half as many, without losing a dark line."""
    step = math.ceil(max(gray.shape) / side)
    if step > 1:
        # A photo's lines are many pixels wide, and the darkest pixel of a cell would be noise; in a clean image an
        # average would fade a one-pixel line into the paper.
        average = max(1, step // 2) if is_photo else 1
        gray = np.asarray(Image.fromarray(gray).reduce(average))
        step = math.ceil(max(gray.shape) / side)
        return _block_minimum(gray, step).astype(np.float32), 1 / (average * step)
    step = max(1, math.ceil(side / 2 / max(gray.shape)))
    size = (gray.shape[1] * step, gray.shape[0] * step)
    finer = Image.fromarray(gray).resize(size, Image.Resampling.BICUBIC) if step > 1 else gray
    return np.asarray(finer, dtype=np.float32), float(step)


def _block_minimum(gray: np.ndarray, step: int) -> np.ndarray:
    height, width = (math.ceil(n / step) * step for n in gray.shape)
    padded = np.pad(gray, ((0, height - gray.shape[0]), (0, width - gray.shape[1])), mode="edge")
    darkest = padded.reshape(height // step, step, width).min(1)
    return functools.reduce(np.minimum, [darkest[:, i::step] for i in range(step)])


def _background(gray: np.ndarray) -> np.ndarray:
    """Brightness of the paper at every pixel: dark structures narrower than a tenth of the page are closed."""
    small = thumbnail(np.clip(gray, 0, 255).astype(np.uint8), 128).astype(np.float32)
    window = max(3, round(max(small.shape) / 10))
    # Continued by point reflection, a page that darkens towards its border goes on darkening and is not closed there;
    # where that would brighten it, as across a shadow's edge, a mirror image does.
    small = ndimage.grey_closing(small, 5)
    padded = np.minimum(
        np.pad(small, window, mode="reflect", reflect_type="odd"), np.pad(small, window, mode="reflect")
    )
    closed = ndimage.grey_closing(padded, (window, window), mode="nearest")
    closed = np.maximum(closed, _MIN_BACKGROUND * small.max())
    # Enlarging blurs the edge of a fill or a shadow; the lower side of it must not come out brighter than it is.
    lowest = ndimage.grey_erosion(closed, 3)
    closed = np.minimum(lowest, ndimage.gaussian_filter(closed, window / 3, mode="nearest"))
    size = (gray.shape[1], gray.shape[0])
    closed = Image.fromarray(closed[window:-window, window:-window])
    return np.maximum(np.asarray(closed.resize(size, Image.Resampling.BILINEAR)), 1.0)


def _swallowed_edges(gray: np.ndarray, background: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Sharp edges of the large gray or colored fills that were taken for background, where no stroke runs along them.
    """
    paper = background.max()
    fill = gray < 0.9 * paper
    edge = fill & ~ndimage.binary_erosion(fill, border_value=1) & (background < 0.95 * paper)
    if not edge.any():
        return edge
    # A fill is wide: a rule or a dark edge of the page that lies on the border is narrow.
    width = max(3, round(_MIN_FILL * max(fill.shape)))
    labels, count = ndimage.label(fill)
    is_wide = np.zeros(count + 1, dtype=bool)
    is_wide[labels[ndimage.minimum_filter(fill, width, mode="constant")]] = True
    edge &= is_wide[labels]
    sharp = ndimage.maximum_filter(gray, 5) - ndimage.minimum_filter(gray, 5) > 0.1 * paper
    return edge & sharp & ~ndimage.maximum_filter(mask, 5)


def _remove_specks(mask: np.ndarray) -> np.ndarray:
    """Without the components too small to be a mark of the pen that drew the rest."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return mask
    side = np.full(count + 1, _SPECK)
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        side[border] = _BORDER_SPECK
    rows, columns = _occupied(mask)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    keep = np.bincount(labels.ravel()) > (side * extent) ** 2
    keep[0] = False
    return keep[labels]


def center_lines(mask: np.ndarray, gap: float) -> np.ndarray:
    """
    One-pixel lines: the skeleton of strokes, and the outline of filled shapes. Strokes closer than `gap` cells, which
    the output cannot tell apart, become one.
    """
    reach = round(gap / 2)
    mask = np.pad(mask, reach + 1)
    mask = ndimage.grey_closing(mask.astype(np.uint8), size=2 * reach + 1).astype(bool)
    skeleton = skeletonize(mask)
    depth = ndimage.distance_transform_edt(mask)
    rows, columns = _occupied(mask)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    half_width = float(np.median(depth[skeleton]))
    is_stroke = half_width < _MAX_STROKE * extent
    radius = max(_MIN_FILL * extent, 2.2 * half_width if is_stroke else 0)
    if depth.max() > radius:
        # Opening by a disc finds what is thick; 1.5 radii reach into its corners.
        filled = mask & (ndimage.distance_transform_edt(depth <= radius) <= 1.5 * radius)
        outline = filled & ~ndimage.binary_erosion(mask)
        skeleton = skeletonize(mask & ~filled) | outline
    return skeleton[reach + 1 : -reach - 1, reach + 1 : -reach - 1]


def place_drawing(
    drawing: np.ndarray, page: np.ndarray, factor: float, options: SketchOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Output pixels per cell, and the position in cells that comes to the output's center; both as (y, x)."""
    if options.fit == "page":
        extent, center, target = page, page / 2, np.array(options.size)
    else:
        index = _occupied(drawing)
        extent = np.maximum([np.ptp(i) for i in index], MIN_SOURCE_EXTENT * factor)
        center = np.array([(i[0] + i[-1] + 1) / 2 for i in index])
        target = (1 - 2 * options.margin) * np.array(options.size)
    scale = target / extent
    return (np.full(2, scale.min()) if options.resize_mode == "pad" else scale), center


def draw_lines(
    shape: np.ndarray, size: tuple[int, int], placement: tuple[np.ndarray, np.ndarray], width: float
) -> np.ndarray:
    """Area coverage in [0, 1] of what lies within `width / 2` output pixels of `shape`, or for 0 of `shape` itself."""
    scale, center = placement
    reach = np.ceil((width / 2 + 2) / scale).astype(int) + 1
    shape = np.pad(shape, [(r, r) for r in reach])
    distance = ndimage.distance_transform_edt(~shape, sampling=scale)
    if width == 0:
        # Cells have an area: their edge is half a cell before the next one's center.
        inside = ndimage.distance_transform_edt(shape, sampling=scale)
        distance = np.where(shape, scale.mean() / 2 - inside, distance - scale.mean() / 2)
    fine = [(np.arange(n * _DRAW_SCALE) + 0.5) / _DRAW_SCALE - n / 2 for n in size]
    grid = [axis / s + c + r - 0.5 for axis, s, c, r in zip(fine, scale, center, reach, strict=True)]
    distance = ndimage.map_coordinates(
        distance, np.meshgrid(*grid, indexing="ij"), order=1, mode="constant", cval=width + 2
    )
    covered = np.clip((width / 2 - distance) * _DRAW_SCALE + 0.5, 0, 1)
    return covered.reshape(size[0], _DRAW_SCALE, size[1], _DRAW_SCALE).mean((1, 3))
