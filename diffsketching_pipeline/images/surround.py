# SPDX-License-Identifier: Apache-2.0
"""Pages in surroundings: the table that a sheet lies on, the bars beside a screenshot, the dark edges of a scan."""

import math

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from skimage.filters import threshold_otsu


# A thumbnail's longer side in pixels at most.
_THUMBNAIL = 256
# Shares of the picture that a sheet covers at least and at most, and of a sheet that is light.
_MIN_SHEET, _MAX_SHEET = 0.2, 0.99
_MIN_LIGHT = 0.6
# How dark a surround is at most, as a share of the sheet's brightness: on all sides of a sheet, and on some. A shadow that
# falls on one side of a page is lighter than the latter.
_MAX_SURROUND, _MAX_SIDE = 0.65, 0.42
# Shares that a sheet has of its convex hull, and, where it can be seen whole, of the rectangle around it: a disc has 0.785.
_MIN_CONVEX, _MIN_RECTANGLE = 0.95, 0.85
# What is drawn on a sheet is darker than this share of it in some places.
_DRAWN = 0.8


def thumbnail(gray: np.ndarray, side: int = _THUMBNAIL) -> np.ndarray:
    """Averages of uint8 `[H, W]` with a longer side of at most `side` pixels."""
    factor = math.ceil(max(gray.shape) / side)
    return np.asarray(Image.fromarray(gray).reduce(factor)) if factor > 1 else gray


def find_sheet(gray: np.ndarray) -> np.ndarray | None:
    """
    Find the light sheet, with something drawn on it, that dark surroundings leave free.

    Args:
        gray (`np.ndarray`): uint8 `[H, W]`.

    Returns:
        `np.ndarray`: bool, of the shape of the thumbnail; `None` if the page is the whole picture.
    """
    thumb = thumbnail(gray).astype(np.float32)
    if min(thumb.shape) < 16 or np.ptp(thumb) < 64:
        return None
    for threshold in (threshold_otsu(thumb), 0.45 * float(np.quantile(thumb, 0.9))):
        sheet = _sheet_above(thumb, threshold)
        if sheet is not None and _is_drawn_on(gray, sheet):
            return sheet
    return None


def _sheet_above(thumb: np.ndarray, threshold: float) -> np.ndarray | None:
    """The largest light part, its strokes filled in, if it has the outline of a sheet."""
    light = thumb > threshold
    # Lines that leave the sheet do not divide it.
    labels, count = ndimage.label(ndimage.binary_opening(np.pad(light, 3, mode="edge"), np.ones((3, 3)))[3:-3, 3:-3])
    if count == 0:
        return None
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    sheet = ndimage.binary_fill_holes(
        ndimage.binary_closing(np.pad(largest, 8, mode="edge"), np.ones((5, 5)))[8:-8, 8:-8]
    )
    share = sheet.mean()
    if not _MIN_SHEET <= share <= _MAX_SHEET or light[sheet].mean() < _MIN_LIGHT or light[~sheet].mean() > 0.1:
        return None
    touches = sheet[0].any() or sheet[-1].any() or sheet[:, 0].any() or sheet[:, -1].any()
    convex, rectangle = _fullness(sheet)
    if convex < _MIN_CONVEX or (not touches and rectangle < _MIN_RECTANGLE):
        return None
    contrast = float(np.median(thumb[~sheet])) / max(1.0, float(np.median(thumb[sheet])))
    return sheet if contrast < (_MAX_SIDE if touches else _MAX_SURROUND) else None


def _fullness(sheet: np.ndarray) -> tuple[float, float]:
    """Shares that a shape has of its convex hull, and of the least rectangle around it."""
    rows, columns = np.nonzero(sheet & ~ndimage.binary_erosion(sheet))
    corners = np.concatenate([np.stack([rows + y, columns + x], 1) for y in (0, 1) for x in (0, 1)])
    try:
        hull = ConvexHull(corners)
    except QhullError:
        return 0.0, 0.0
    points = corners[hull.vertices].astype(np.float64)
    sides = np.roll(points, -1, 0) - points
    along = sides / np.linalg.norm(sides, axis=1, keepdims=True)
    across = along[:, ::-1] * [1, -1]
    rectangles = np.ptp(points @ along.T, axis=0) * np.ptp(points @ across.T, axis=0)
    return sheet.sum() / hull.volume, sheet.sum() / float(rectangles.min())


def _is_drawn_on(gray: np.ndarray, sheet: np.ndarray) -> bool:
    inner = ndimage.binary_erosion(sheet, np.ones((13, 13)))
    if not inner.any():
        return False
    levels = gray[enlarge(inner, gray.shape)]
    return bool(np.quantile(levels, 0.001) < _DRAWN * np.median(levels))


def enlarge(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A thumbnail's mask at the picture's own size."""
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def keep_sheet(gray: np.ndarray, sheet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Turn all outside of a sheet into its paper.

    Returns:
        the picture, and which of its pixels were left as they are.
    """
    margin = max(2, round(0.015 * max(sheet.shape)))
    kept = ndimage.binary_erosion(sheet, np.ones((1 + 2 * margin, 1 + 2 * margin)), border_value=1)
    if not kept.any():
        return gray, np.ones(gray.shape, dtype=bool)
    # Strokes near the sheet's edge are no paper.
    paper = ndimage.grey_closing(np.where(kept, thumbnail(gray), 0), 9)
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    size = (gray.shape[1], gray.shape[0])
    filled = Image.fromarray(paper[tuple(nearest)].astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    region = enlarge(kept, gray.shape)
    return np.where(region, gray, np.asarray(filled)), region
