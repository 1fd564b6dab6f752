# SPDX-License-Identifier: Apache-2.0
"""Drawings as vectors: Quick, Draw! strokes and the lines of SVG files, read with limits because anybody may have made them."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np


VECTOR_SUFFIXES = (".svg", ".ndjson")
MAX_VECTOR_BYTES = 4_000_000
MAX_VECTOR_POINTS = 200_000
MAX_VECTOR_DRAWINGS = 1_000

_QUICKDRAW_PAGE = (255.0, 255.0)
_SEGMENTS_PER_CURVE = 16
# What these hold is not shown where it stands.
_HIDDEN_TAGS = {"defs", "clipPath", "mask", "pattern", "marker", "symbol", "linearGradient", "radialGradient"}


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
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"its drawing is not a list of strokes [x, y]: {error}.") from error
        within = all(((stroke >= 0) & (stroke <= 255)).all() for stroke in strokes)
        return cls(strokes, (0.0, 0.0, *_QUICKDRAW_PAGE) if within else None)

    @classmethod
    def from_svg(cls, text: str | bytes) -> "VectorSketch":
        """
        From the paths, lines, polylines, polygons, rectangles, circles and ellipses of an SVG file, fills as outlines.

        Text, pictures, `<use>` and style sheets are passed over.

        Raises:
            ValueError: if it is not SVG, declares entities, or as the constructor does.
        """
        # Here, so that a checkpoint that brings this code along does not need it for pictures.
        from fontTools.svgLib.path import parse_path

        root = _parse_xml(text)
        if _tag(root) != "svg":
            raise ValueError(f"it is <{_tag(root)}>, not <svg>.")
        pen = _PolylinePen()
        try:
            for path, transform in _svg_paths(root):
                pen.transform = transform
                parse_path(path, pen)
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            AssertionError,
            OverflowError,
            ZeroDivisionError,
        ) as error:
            if isinstance(error, _TooManyPoints):
                raise
            raise ValueError(f"a path or shape in it cannot be understood: {str(error)[:200]}.") from error
        return cls([np.array(stroke) for stroke in pen.strokes], _svg_page(root))


def is_vector_file(path: Any) -> bool:
    """Whether it is the path of a vector drawing, by its name."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(VECTOR_SUFFIXES)


def read_vector_sketches(path: str | os.PathLike) -> list[VectorSketch]:
    """
    The drawings of a file: one of an SVG, one per line of an ndjson.

    Raises:
        ValueError: if it cannot be read, is larger than `MAX_VECTOR_BYTES`, or has no or more than
            `MAX_VECTOR_DRAWINGS` drawings.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_VECTOR_BYTES:
            raise ValueError(f"it is too large: {size} bytes, more than {MAX_VECTOR_BYTES}.")
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            "it does not exist." if isinstance(error, FileNotFoundError) else f"{error.strerror}."
        ) from error
    if os.fspath(path).lower().endswith(".svg"):
        return [VectorSketch.from_svg(content)]
    lines = [line for line in content.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_VECTOR_DRAWINGS:
        raise ValueError(f"it has {len(lines)} drawings; there have to be between 1 and {MAX_VECTOR_DRAWINGS}.")
    return [_read_line(line, number) for number, line in enumerate(lines, 1)]


def _read_line(line: bytes, number: int) -> VectorSketch:
    try:
        return VectorSketch.from_quickdraw(json.loads(line)["drawing"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"line {number} cannot be read: {error}") from error


def _parse_xml(text: str | bytes) -> ElementTree.Element:
    """An element tree. Entities are refused: a few lines of them can stand for gigabytes, or for another file."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end

    def refuse(*_):
        raise ValueError("it declares entities, which are not read: save it as plain SVG.")

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
        return builder.close()
    except expat.ExpatError as error:
        raise ValueError(f"it is not XML: {error}.") from error


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _svg_page(root: ElementTree.Element) -> tuple[float, float, float, float] | None:
    try:
        left, top, width, height = map(float, re.split(r"[\s,]+", root.get("viewBox", "").strip()))
    except ValueError:
        try:
            left = top = 0.0
            width, height = (
                float(re.sub(r"(px|mm|cm|pt|in)$", "", root.get(side, "").strip())) for side in ("width", "height")
            )
        except ValueError:
            return None
    return (left, top, width, height) if min(width, height) > 0 else None


def _svg_paths(root: ElementTree.Element):
    """The path of each shape that is shown, with what takes its coordinates to those of the page."""
    from fontTools.svgLib.path.shapes import PathBuilder

    # A stack in the place of recursion, which a file could exhaust.
    pending = [(root, np.eye(3))]
    while pending:
        element, transform = pending.pop()
        style = element.get("style", "").replace(" ", "")
        if _tag(element) in _HIDDEN_TAGS or element.get("display") == "none" or "display:none" in style:
            continue
        transform = transform @ _parse_transform(element.attrib.pop("transform", ""))
        shape = PathBuilder()
        if shape.add_path_from_element(element):
            yield from ((path, transform) for path in shape.paths)
        pending += [(child, transform) for child in reversed(element)]


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    return np.array([[a, c, e], [b, d, f], [0, 0, 1]])


def _rotation(angle: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return _affine(1, 0, 0, 1, x, y) @ _affine(cos, sin, -sin, cos, 0, 0) @ _affine(1, 0, 0, 1, -x, -y)


_TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
    "matrix": _affine,
    "translate": lambda x, y=0.0: _affine(1, 0, 0, 1, x, y),
    "scale": lambda x, y=None: _affine(x, 0, 0, x if y is None else y, 0, 0),
    "rotate": _rotation,
    "skewX": lambda angle: _affine(1, 0, math.tan(math.radians(angle)), 1, 0, 0),
    "skewY": lambda angle: _affine(1, math.tan(math.radians(angle)), 0, 1, 0, 0),
}


def _parse_transform(text: str) -> np.ndarray:
    transform = np.eye(3)
    for name, arguments in re.findall(r"(\w+)\s*\(([^)]*)\)", text):
        if name not in _TRANSFORMS:
            raise ValueError(f"unknown transform {name!r}")
        values = [float(value) for value in re.split(r"[\s,]+", arguments.strip())]
        transform = transform @ _TRANSFORMS[name](*values)
    return transform


class _TooManyPoints(ValueError):
    pass


class _PolylinePen:
    """A pen of fontTools that collects lines and curves as polylines, transformed."""

    def __init__(self) -> None:
        self.transform = np.eye(3)
        self.strokes: list[list[np.ndarray]] = []
        self._num_points = 0
        self._position = np.zeros(2)

    def _add(self, points: np.ndarray) -> None:
        self._num_points += len(points)
        if self._num_points > MAX_VECTOR_POINTS:
            raise _TooManyPoints(f"the drawing has more than {MAX_VECTOR_POINTS} points: simplify it.")
        self.strokes[-1] += list(points @ self.transform[:2, :2].T + self.transform[:2, 2])
        self._position = points[-1]

    def moveTo(self, point) -> None:
        self.strokes.append([])
        self._add(np.array([point]))

    def lineTo(self, point) -> None:
        self._add(np.array([point]))

    def curveTo(self, *controls) -> None:
        """A Bézier curve of any degree, by de Casteljau's method."""
        time = (np.arange(1, _SEGMENTS_PER_CURVE + 1) / _SEGMENTS_PER_CURVE)[:, None]
        points = [np.array(point, dtype=np.float64) for point in (self._position, *controls)]
        while len(points) > 1:
            points = [(1 - time) * a + time * b for a, b in zip(points, points[1:], strict=False)]
        self._add(points[0])

    qCurveTo = curveTo

    def closePath(self) -> None:
        """The line back has been drawn."""

    endPath = closePath
