# SPDX-License-Identifier: Apache-2.0
"""Drawings as vectors: Quick, Draw! strokes and the lines of SVG files, read with limits because anybody may have made them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffsketching_pipeline.images.svg import (
    MAX_VECTOR_BYTES,
    MAX_VECTOR_POINTS,
    SvgLines,
    TooManyPointsError,
    may_be_plain,
    parse_svg,
    svg_lines,
)
from diffsketching_pipeline.images.svg_rendering import SvgPicture


MAX_VECTOR_DRAWINGS = 1_000

_QUICKDRAW_PAGE = (255.0, 255.0)


@dataclass(frozen=True, eq=False)
class VectorSketch:
    """
    A drawing as lines, which [`SketchProcessor`] takes in the place of a picture and draws at the model's line width.

    Args:
        strokes (sequence of `np.ndarray` of shape `[N, 2]`):
            The points (x, y) of each line, y downwards.
        page (`tuple[float, float, float, float]`, *optional*):
            Left, top, width and height of the page, for `fit="page"`; by default the lines' bounding box.

    Raises:
        ValueError: if there is no line, a point is not finite, or there are more than `MAX_VECTOR_POINTS`.
    """

    strokes: Sequence[np.ndarray]
    page: tuple[float, float, float, float] | None = None

    def __post_init__(self):
        strokes = [np.asarray(stroke, dtype=np.float64) for stroke in self.strokes]
        if any(stroke.ndim != 2 or stroke.shape[1] != 2 for stroke in strokes):
            raise ValueError(f"`strokes` have to be [N, 2] but are {[stroke.shape for stroke in strokes]}.")
        strokes = [stroke for stroke in strokes if len(stroke)]
        count = sum(map(len, strokes))
        if count > MAX_VECTOR_POINTS:
            raise ValueError(f"the drawing has {count} points, more than {MAX_VECTOR_POINTS}: simplify it.")
        points = np.concatenate([np.empty((0, 2)), *strokes])
        if len(np.unique(points, axis=0)) < 2:
            raise ValueError("the drawing has no lines.")
        # Beyond this, differences of coordinates lose their precision.
        if not np.isfinite(points).all() or np.abs(points).max() > 1e9:
            raise ValueError("the drawing has a coordinate that is not finite or beyond 1e9.")
        object.__setattr__(self, "strokes", tuple(strokes))
        if self.page is None:
            low, high = points.min(0), points.max(0)
            object.__setattr__(self, "page", (*map(float, low), *map(float, high - low)))
        elif not (all(map(math.isfinite, self.page)) and min(self.page[2:]) > 0):
            raise ValueError(f"`page` has to have a finite place and a positive size but is {self.page}.")

    def rasterize(self, cells: int, fit: str) -> np.ndarray:
        """
        Draw the lines as a mask of strokes one cell wide, bool `[height, width]`; what leaves the page is cut off.

        Args:
            cells: the longer side of the mask.
            fit: `"content"` for a mask that the lines fill, `"page"` for one of the page.
        """
        assert self.page is not None
        points = np.concatenate(self.strokes)
        if fit == "page":
            origin, extent = np.array(self.page[:2]), np.array(self.page[2:])
        else:
            origin, extent = points.min(0), np.ptp(points, axis=0)
        scale = (cells - 1) / extent.max()
        width, height = np.ceil(extent * scale).astype(int) + 1
        canvas = Image.new("L", (int(width), int(height)))
        draw = ImageDraw.Draw(canvas)
        for stroke in self.strokes:
            # Pillow's integers overflow far outside of the page.
            line = np.clip((stroke - origin) * scale, -cells, 2 * cells).round()
            draw.line([(x, y) for x, y in line], fill=1) if len(line) > 1 else draw.point(tuple(line[0]), fill=1)
        return np.asarray(canvas, dtype=bool)

    @classmethod
    def from_quickdraw(cls, drawing: Any) -> "VectorSketch":
        """
        From the `drawing` of a line of Quick, Draw!, raw or simplified: a list of strokes `[x, y]` or `[x, y, t]`.

        Raises:
            ValueError: if it is something else, or as the constructor does.
        """
        try:
            strokes = [
                np.stack([np.asarray(axis, dtype=np.float64) for axis in stroke[:2]], axis=1) for stroke in drawing
            ]
        except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"its drawing is not a list of strokes [x, y]: {error}.") from error
        within = all(((stroke >= 0) & (stroke <= 255)).all() for stroke in strokes)
        return cls(strokes, (0.0, 0.0, *_QUICKDRAW_PAGE) if within else None)

    @classmethod
    def from_svg(cls, text: str | bytes) -> "VectorSketch":
        """
        From the paths, lines, polylines, polygons, rectangles, circles and ellipses of an SVG file, fills as outlines.

        Text, pictures, `<use>` and style sheets are passed over, hidden and covered parts are not told from others: a file
        that is given to [`SketchProcessor`] is drawn where these matter.

        Raises:
            ValueError: if it is not SVG, is beyond the limits of [`parse_svg`], or as the constructor does.
        """
        return cls._from_lines(svg_lines(parse_svg(text)))

    @classmethod
    def _from_lines(cls, lines: SvgLines) -> "VectorSketch":
        page = lines.page
        return cls(lines.strokes, None if page is None else (page.left, page.top, page.width, page.height))


def read_vector_sketches(path: str | os.PathLike, max_drawings: int | None = None) -> list[VectorSketch | SvgPicture]:
    """
    Read the drawings of a file: one of an SVG, one per line of an ndjson. An SVG that is more than plain strokes becomes a
    picture, which shows what a browser shows.

    Args:
        max_drawings (`int`, *optional*): read no more than the first so many of them, and nothing of the lines after.

    Raises:
        ValueError: if it cannot be read, is larger than `MAX_VECTOR_BYTES`, or has no or more than
            `MAX_VECTOR_DRAWINGS` drawings.
    """
    content = _read_content(path)
    if os.fspath(path).lower().endswith(".svg"):
        return [_read_svg(content)]
    lines = [line for line in content.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_VECTOR_DRAWINGS:
        raise ValueError(f"it has {len(lines)} drawings; there have to be between 1 and {MAX_VECTOR_DRAWINGS}.")
    return [_read_line(line, number) for number, line in enumerate(lines[:max_drawings], 1)]


def _read_content(path: str | os.PathLike) -> bytes:
    try:
        # What is no regular file, a pipe or a device, may be without an end.
        if not Path(path).is_file():
            raise ValueError("it is not a file." if Path(path).exists() else "it does not exist.")
        size = Path(path).stat().st_size
        if size > MAX_VECTOR_BYTES:
            raise ValueError(f"it is too large: {size} bytes, more than {MAX_VECTOR_BYTES}.")
        with open(path, "rb") as file:
            return file.read(MAX_VECTOR_BYTES)
    except OSError as error:
        raise ValueError(f"{error.strerror}.") from error


def _read_svg(content: bytes) -> VectorSketch | SvgPicture:
    document = parse_svg(content)
    if may_be_plain(document):
        try:
            lines = svg_lines(document)
            if lines.are_plain:
                return VectorSketch._from_lines(lines)
        except TooManyPointsError:
            raise
        except ValueError:
            # A browser shows what comes before the mistake.
            pass
    return SvgPicture(document)


def _read_line(line: bytes, number: int) -> VectorSketch:
    try:
        return VectorSketch.from_quickdraw(json.loads(line)["drawing"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"line {number} cannot be read: {error}") from error
