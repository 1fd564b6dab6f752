# SPDX-License-Identifier: Apache-2.0
"""SVG files, read with limits because anybody may have made them: their elements, page and lines, and which are plain."""

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from PIL import ImageColor


MAX_VECTOR_BYTES = 4_000_000
MAX_VECTOR_POINTS = 200_000
MAX_SVG_ELEMENTS = 20_000
MAX_SVG_ATTRIBUTES = 1_000
MAX_SVG_DEPTH = 256
MAX_SVG_TRANSFORMS = 60_000
# What declared entities may stand for altogether, in characters, and how many there may be.
_MAX_ENTITY_TEXT = 65_536
_MAX_ENTITIES = 64

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}"
_ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "us-ascii", "iso-8859-1", "iso-8859-15", "windows-1252")
# What a path in absolute coordinates of pixels measures them in; CSS has 96 pixels in an inch.
_PIXELS_PER_UNIT = {"": 1.0, "px": 1.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "pt": 96 / 72, "pc": 16.0}
# The font's size of a page is 16 pixels where nothing says another.
_PIXELS_PER_UNIT |= {"q": 96 / 101.6, "rem": 16.0}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"

_SEGMENTS_PER_CURVE = 16
# What these hold is not shown where it stands.
_HIDDEN_TAGS = {"defs", "clipPath", "mask", "pattern", "marker", "symbol", "linearGradient", "radialGradient"}
_SILENT_TAGS = {"title", "desc", "metadata"}
_SHAPE_TAGS = {"path", "line", "polyline", "polygon", "rect", "circle", "ellipse"}
_INHERITED = ("fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "visibility", "color")
# A stroke with one of these, or another value than that, is seen as more or less than its line.
_PLAIN_VALUES = {
    "opacity": ("1", "100%"),
    "stroke-opacity": ("1", "100%"),
    "visibility": ("visible",),
    "stroke-dasharray": ("none",),
    "vector-effect": ("none",),
    "clip-path": ("none",),
    "clip": ("auto",),
    "mask": ("none",),
    "filter": ("none",),
    "marker": ("none",),
    "marker-start": ("none",),
    "marker-mid": ("none",),
    "marker-end": ("none",),
    "mix-blend-mode": ("normal",),
    "overflow": ("visible", "auto"),
}
# Properties of CSS that move or shape an element, and have no place among what is read as lines.
_LENGTH_ATTRIBUTES = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "ry", "width", "height"}
_NOT_PLAIN = _LENGTH_ATTRIBUTES | {
    "transform",
    "transform-origin",
    "translate",
    "rotate",
    "scale",
    "d",
    "color",
    "all",
}
_STYLE_ATTRIBUTES = {*_INHERITED, *_PLAIN_VALUES, "display"}
# The faintest stroke that is plain, and by how much plain strokes may differ, as shares of full contrast with paper.
_MIN_PLAIN_CONTRAST = 0.25
# The widest stroke that is plain, and how near to the page's border a line is part of a frame, as shares of the extent.
_MAX_PLAIN_WIDTH = 0.05
_FRAME_BAND = 0.015


@dataclass
class SvgDocument:
    """The elements of a file, and what of it no renderer of ours shows."""

    root: ElementTree.Element
    left_out: list[str]


@dataclass(frozen=True)
class SvgPage:
    """The part of the drawing's plane that is shown. `fitted`: its sides have the shape that the file's size asks for."""

    left: float
    top: float
    width: float
    height: float
    fitted: bool = True


@dataclass
class SvgLines:
    """All shapes of a file as lines `[N, 2]`, and whether a browser shows just these, as strokes."""

    strokes: list[np.ndarray]
    page: SvgPage | None
    are_plain: bool


def tag_of(element: ElementTree.Element) -> str:
    """Return an element's name if it is one of SVG, or has no namespace; otherwise ''."""
    namespace, _, name = element.tag.rpartition("}")
    return name if namespace in ("", SVG_NAMESPACE) else ""


def parse_svg(text: str | bytes) -> SvgDocument:
    """
    Parse a file into elements whose names and attributes are in expat's notation (`namespace}name`).

    Of declarations only literal entities are taken, as Illustrator writes them for namespaces: a few lines of others can
    stand for gigabytes, or for another file.

    Raises:
        ValueError: if it is no SVG, has more than `MAX_SVG_ELEMENTS` elements, `MAX_SVG_DEPTH` of them in one another or
            `MAX_SVG_ATTRIBUTES` of one, or declares what is not taken.
    """
    decoded = _decode_xml(text)
    reader = _SvgReader(decoded)
    try:
        root = reader.parse()
    except expat.ExpatError as error:
        raise ValueError(f"it is not XML: {error}.") from error
    if tag_of(root) != "svg":
        raise ValueError(f"it is <{root.tag.rpartition('}')[2][:50]}>, not <svg>.")
    return SvgDocument(root, reader.left_out)


def _decode_xml(text: str | bytes) -> str:
    """Decode, so that the parser asks no decoder of Python that a file names: some of those are slow, or no text at all."""
    if isinstance(text, str):
        return text
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        declared = re.match(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)["']""", text[:512])
        encoding = declared.group(1).decode("ascii", "replace").lower() if declared else "utf-8"
        if encoding == "utf-16":
            encoding = "utf-16-le" if text[1:2] == b"\0" else "utf-16-be" if text[:1] == b"\0" else "utf-8"
        encoding = {"ascii": "us-ascii", "latin1": "iso-8859-1", "utf8": "utf-8"}.get(encoding, encoding)
        if encoding not in _ENCODINGS:
            raise ValueError(f"it is in the encoding {encoding[:50]!r}: save it as UTF-8.")
    try:
        return text.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not XML: its text is not {encoding}.") from error


class _SvgReader:
    """One run of expat with the limits of [`parse_svg`]."""

    def __init__(self, text: str) -> None:
        self.left_out: list[str] = []
        self._text = text
        self._builder = ElementTree.TreeBuilder()
        self._count = self._depth = 0
        self._entities: dict[str, str] = {}
        parser = expat.ParserCreate(namespace_separator="}")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._builder.data
        parser.EntityDeclHandler = self._declare
        parser.EndDoctypeDeclHandler = self._end_of_declarations
        parser.AttlistDeclHandler = parser.NotationDeclHandler = _refuse_declaration
        parser.ProcessingInstructionHandler = self._instruct
        self._parser = parser

    def parse(self) -> ElementTree.Element:
        self._parser.Parse(self._text, True)
        return self._builder.close()

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        self._depth += 1
        if self._count > MAX_SVG_ELEMENTS:
            raise ValueError(f"it has more than {MAX_SVG_ELEMENTS} elements: simplify it.")
        if len(attributes) > MAX_SVG_ATTRIBUTES:
            raise ValueError(f"an element of it has more than {MAX_SVG_ATTRIBUTES} attributes: save it as plain SVG.")
        if self._depth > MAX_SVG_DEPTH:
            raise ValueError(f"its elements are more than {MAX_SVG_DEPTH} deep in one another: ungroup them.")
        self._builder.start(tag, attributes)

    def _end(self, tag: str) -> None:
        self._depth -= 1
        self._builder.end(tag)

    def _declare(self, name, is_parameter, value, base, system_id, public_id, notation) -> None:
        if is_parameter or value is None or "&" in value or len(self._entities) == _MAX_ENTITIES:
            _refuse_declaration()
        self._entities[name] = value

    def _end_of_declarations(self) -> None:
        size = sum(self._text.count(f"&{name};") * len(value) for name, value in self._entities.items())
        if size > _MAX_ENTITY_TEXT:
            raise ValueError(
                f"its entities stand for {size} characters, more than {_MAX_ENTITY_TEXT}: save it as plain SVG."
            )

    def _instruct(self, target: str, _: str) -> None:
        if target == "xml-stylesheet":
            self.left_out.append("a style sheet outside of the file")


def _refuse_declaration(*_: Any) -> None:
    raise ValueError("it declares entities or attributes that are not read: save it as plain SVG.")


def parse_length(text: str | None) -> float | None:
    """Return a length in pixels; `None` for a share of something else, or what is no length."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([a-zA-Z]*)\s*", (text or "")[:100])
    if match is None or match.group(2).lower() not in _PIXELS_PER_UNIT:
        return None
    return float(match.group(1)) * _PIXELS_PER_UNIT[match.group(2).lower()]


def svg_page(root: ElementTree.Element) -> SvgPage | None:
    """Return the page in the drawing's own units, or `None` where the file states none."""
    sides = [parse_length(root.get(side)) for side in ("width", "height")]
    width, height = ((side if side is not None and 0 < side < math.inf else None) for side in sides)
    numbers = re.split(r"[\s,]+", root.get("viewBox", "")[:200].strip())
    try:
        left, top, box_width, box_height = map(float, numbers)
    except ValueError:
        left = top = box_width = box_height = 0.0
    if math.isfinite(left + top + box_width + box_height) and min(box_width, box_height) > 0:
        fitted = not (width and height) or abs(width * box_height / (height * box_width) - 1) < 0.01
        return SvgPage(left, top, box_width, box_height, fitted)
    return SvgPage(0.0, 0.0, width, height) if width and height else None


def svg_lines(document: SvgDocument) -> SvgLines:
    """
    Read the paths, lines, polylines, polygons, rectangles, circles and ellipses of a file as lines, fills as outlines;
    text, pictures, `<use>` and style sheets are passed over, and then the lines are not plain.

    Raises:
        ValueError: if a path or transform cannot be understood, or there are more than `MAX_VECTOR_POINTS`.
    """
    # Here, so that a checkpoint that brings this code along does not need it for pictures.
    from fontTools.svgLib.path import parse_path
    from fontTools.svgLib.path.shapes import PathBuilder

    pen = _PolylinePen()
    transforms = _Transforms()
    judge = _PlainJudge()
    numbers = re.compile(_NUMBER)
    try:
        for element, style, chain in _shown_elements(document.root):
            tag = tag_of(element)
            judge.meet(element, tag, style)
            if tag not in _SHAPE_TAGS:
                continue
            # No point takes more than two numbers: too many are told without a parse.
            written = sum(len(numbers.findall(element.get(name, ""))) for name in ("d", "points"))
            pen.count(written // 2)
            pen.transform = transforms.of(chain)
            # fontTools applies some transforms itself.
            geometry = {name: value for name, value in element.attrib.items() if name not in ("transform", "style")}
            shape = PathBuilder()
            shape.add_path_from_element(ElementTree.Element(tag, geometry))
            for path in shape.paths:
                parse_path(path, pen)
            judge.look_at(element, pen.transform, style)
    except TooManyPointsError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"a path or shape in it cannot be understood: {str(error)[:200]}.") from error
    page = svg_page(document.root)
    strokes = pen.finish()
    if not all(np.isfinite(stroke).all() and np.abs(stroke).max() <= 1e9 for stroke in strokes):
        raise ValueError("the drawing has a coordinate that is not finite or beyond 1e9.")
    return SvgLines(strokes, page, not document.left_out and judge.is_plain(strokes, page))


def may_be_plain(document: SvgDocument) -> bool:
    """Return whether [`svg_lines`] may find plain strokes, told from elements and paint without reading a path."""
    judge = _PlainJudge()
    for element, style, _ in _shown_elements(document.root):
        judge.meet(element, tag_of(element), style)
        if not judge.may_be_plain:
            return False
    return not document.left_out


def _shown_elements(
    root: ElementTree.Element,
) -> Iterator[tuple[ElementTree.Element, dict[str, str], tuple[str, ...]]]:
    """Each element outside of what is hidden, with its style, and the transforms that apply to it, outer ones first."""
    # A stack instead of recursion, which a file could exhaust.
    pending: list[tuple[ElementTree.Element, dict[str, str], tuple[str, ...]]] = [(root, {}, ())]
    while pending:
        element, inherited, chain = pending.pop()
        tag = tag_of(element)
        if tag in _HIDDEN_TAGS or tag in _SILENT_TAGS or not tag:
            continue
        style = style_of(element, inherited)
        if style.get("display") == "none":
            continue
        if "transform" in element.attrib:
            chain = (*chain, element.attrib["transform"])
        yield element, style, chain
        if len(element):
            passed_on = {name: style[name] for name in _INHERITED if name in style}
            pending += [(child, passed_on, chain) for child in reversed(element)]


def style_of(element: ElementTree.Element, inherited: dict[str, str]) -> dict[str, str]:
    """Return what attributes and the `style` attribute say, over what is inherited; style sheets aside."""
    style = dict(inherited)
    own = {name: value for name, value in element.attrib.items() if name in _STYLE_ATTRIBUTES}
    for declaration in element.attrib["style"].split(";") if "style" in element.attrib else ():
        name, colon, value = declaration.partition(":")
        if colon:
            own[name.strip().lower()] = value.partition("!")[0]
    style.update({name: value.strip().lower() for name, value in own.items() if value.strip().lower() != "inherit"})
    return style


class _PlainJudge:
    """Finds out whether a browser shows a file as just its lines: opaque strokes of one darkness, no fill, nothing hidden."""

    def __init__(self) -> None:
        self.may_be_plain = True
        self._contrasts: list[float] = []
        self._widths: list[float] = []
        self._has_root = False

    def meet(self, element: ElementTree.Element, tag: str, style: dict[str, str]) -> None:
        """Take note of an element that is not hidden, and of its paint."""
        if not self.may_be_plain:
            return
        known = tag in _SHAPE_TAGS or tag in ("g", "a") or (tag == "svg" and not self._has_root)
        if not self._has_root and style.get("overflow") == "hidden":
            # As it is anyway.
            del style["overflow"]
        self._has_root = True
        odd = any(name in _PLAIN_VALUES and value not in _PLAIN_VALUES[name] for name, value in style.items())
        self.may_be_plain = (
            known and not odd and not (style.keys() & _NOT_PLAIN) and "transform-origin" not in element.attrib
        )
        if not self.may_be_plain or tag not in _SHAPE_TAGS:
            return
        filled = tag != "line" and style.get("fill", "black") not in ("none", "transparent")
        contrast = _contrast_of(style.get("stroke", "none"))
        units = any(
            not re.fullmatch(rf"\s*{_NUMBER}\s*", value[:100])
            for name, value in element.attrib.items()
            if name in _LENGTH_ATTRIBUTES
        )
        self.may_be_plain = not filled and not units and contrast is not None
        self._contrasts.append(contrast or 0.0)

    def look_at(self, element: ElementTree.Element, transform: np.ndarray, style: dict[str, str]) -> None:
        """Take note of how wide a shape's stroke is."""
        if self.may_be_plain:
            width = parse_length(style.get("stroke-width", "1"))
            self.may_be_plain = bool(width)
            a, b, c, d = transform[:2, :2].ravel().tolist()
            self._widths.append((width or 0.0) * math.sqrt(abs(a * d - b * c)))

    def is_plain(self, strokes: list[np.ndarray], page: SvgPage | None) -> bool:
        """Judge the whole, with its lines in sight."""
        if not (self.may_be_plain and self._contrasts and strokes):
            return False
        low, high = min(self._contrasts), max(self._contrasts)
        points = np.concatenate(strokes)
        if low < _MIN_PLAIN_CONTRAST or high - low > _MIN_PLAIN_CONTRAST or not np.isfinite(points).all():
            return False
        extent = np.ptp(points, axis=0).max()
        if max(self._widths) > _MAX_PLAIN_WIDTH * extent:
            return False
        return page is None or (page.fitted and _lie_inside(points, page) and not _make_a_frame(strokes, page))


def _contrast_of(paint: str) -> float | None:
    """Share of full contrast with white paper; `None` for what is no opaque colour."""
    try:
        color = ImageColor.getcolor("black" if paint == "currentcolor" else paint[:50], "RGBA")
    except ValueError:
        return None
    assert isinstance(color, tuple)
    return 1 - sum(color[:3]) / 765 if color[3] == 255 else None


def _lie_inside(points: np.ndarray, page: SvgPage) -> bool:
    slack = 0.005 * max(page.width, page.height)
    low = np.array([page.left, page.top]) - slack
    return bool((points >= low).all() and (points <= low + [page.width, page.height] + 2 * slack).all())


def _make_a_frame(strokes: list[np.ndarray], page: SvgPage) -> bool:
    """Return whether lines run along half of the page's border like a frame's, which a picture's border is cleared of."""
    band, length = _FRAME_BAND * max(page.width, page.height), 0.0
    for stroke in strokes:
        start, end = stroke[:-1], stroke[1:]
        for axis, near, far in ((0, page.left, page.left + page.width), (1, page.top, page.top + page.height)):
            for side in (near, far):
                along = (np.abs(start[:, axis] - side) < band) & (np.abs(end[:, axis] - side) < band)
                length += float(np.abs(end - start)[along, 1 - axis].sum())
    return length > page.width + page.height


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    return np.array([[a, c, e], [b, d, f], [0, 0, 1]])


def _rotation(angle: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return _affine(1, 0, 0, 1, x, y) @ _affine(cos, sin, -sin, cos, 0, 0) @ _affine(1, 0, 0, 1, -x, -y)


_TRANSFORMS: dict[str, Any] = {
    "matrix": _affine,
    "translate": lambda x, y=0.0: _affine(1, 0, 0, 1, x, y),
    "scale": lambda x, y=None: _affine(x, 0, 0, x if y is None else y, 0, 0),
    "rotate": _rotation,
    "skewX": lambda angle: _affine(1, 0, math.tan(math.radians(angle)), 1, 0, 0),
    "skewY": lambda angle: _affine(1, math.tan(math.radians(angle)), 0, 1, 0, 0),
}


class _Transforms:
    """Parses the transforms of one file, of which there may be `MAX_SVG_TRANSFORMS`."""

    def __init__(self) -> None:
        self._count = 0
        self._known: dict[tuple[str, ...], np.ndarray] = {(): np.eye(3)}

    def of(self, chain: tuple[str, ...]) -> np.ndarray:
        """Return the matrix that applies all of a chain, the last first."""
        if chain not in self._known:
            self._known[chain] = self.of(chain[:-1]) @ self._parse(chain[-1])
        return self._known[chain]

    def _parse(self, text: str) -> np.ndarray:
        transform = np.eye(3)
        # A name of bounded length and arguments without parentheses: the search is linear in the text whatever it is.
        for match in re.finditer(r"(\w{1,20})\s?\(([^()]*)\)", text):
            self._count += 1
            if self._count > MAX_SVG_TRANSFORMS:
                raise TooManyPointsError(f"it has more than {MAX_SVG_TRANSFORMS} transforms: simplify it.")
            name, arguments = match.groups()
            if name not in _TRANSFORMS:
                raise ValueError(f"unknown transform {name!r}")
            values = [float(value) for value in re.split(r"[\s,]+", arguments.strip())]
            transform = transform @ _TRANSFORMS[name](*values)
        return transform


class TooManyPointsError(ValueError):
    """More of something than is read."""


class _PolylinePen:
    """A pen of fontTools that collects lines and curves as polylines, transformed."""

    def __init__(self) -> None:
        self.transform = np.eye(3)
        self._strokes: list[tuple[list[Any], np.ndarray]] = []
        self._num_points = 0

    def count(self, number: int) -> None:
        """Raise if so many points more were too many."""
        if self._num_points + number > MAX_VECTOR_POINTS:
            raise TooManyPointsError(f"the drawing has more than {MAX_VECTOR_POINTS} points: simplify it.")

    def finish(self) -> list[np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            return [np.array(points, dtype=np.float64) @ t[:2, :2].T + t[:2, 2] for points, t in self._strokes]

    def moveTo(self, point) -> None:
        self._strokes.append(([], self.transform))
        self.lineTo(point)

    def lineTo(self, point) -> None:
        self.count(1)
        self._num_points += 1
        self._strokes[-1][0].append(point)

    def curveTo(self, *controls) -> None:
        """A Bézier curve of any degree, by de Casteljau's method."""
        self.count(_SEGMENTS_PER_CURVE)
        self._num_points += _SEGMENTS_PER_CURVE
        time = (np.arange(1, _SEGMENTS_PER_CURVE + 1) / _SEGMENTS_PER_CURVE)[:, None]
        points = np.array([self._strokes[-1][0][-1], *controls], dtype=np.float64)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            while len(points) > 1:
                points = (1 - time) * points[:-1] + time * points[1:]
        self._strokes[-1][0].extend(points[0].tolist())

    qCurveTo = curveTo

    def closePath(self) -> None:
        """The line back has been drawn."""

    endPath = closePath
