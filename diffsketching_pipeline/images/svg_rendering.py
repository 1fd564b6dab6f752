# SPDX-License-Identifier: Apache-2.0
"""SVG files as pictures: what a browser shows of them, drawn by resvg in a process of its own."""

import functools
import importlib.util
import io
import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from diffsketching_pipeline.images.svg import (
    SVG_NAMESPACE,
    SvgDocument,
    SvgPage,
    TooManyPointsError,
    parse_length,
    svg_lines,
    svg_page,
    tag_of,
)


# Pixels along the longer side of a picture.
_PICTURE_SIDE = 1024
# A drawing that fills less than this share of its page is drawn once more at a larger scale.
_MIN_FILLED = 0.5
# What a drawing process may take: a few elements (filters, masks, rules of style) can ask for hours and gigabytes.
_MAX_SECONDS = 1
# Where processor time is counted, waiting on a busy machine costs a drawing nothing.
_MAX_WALL_SECONDS = 5 if os.name == "nt" else 60
_MAX_MEMORY = 300_000_000
# The page of a file that states none, as in browsers.
_DEFAULT_PAGE = (300.0, 150.0)
_LENGTHS = {
    "x",
    "y",
    "width",
    "height",
    "r",
    "rx",
    "ry",
    "cx",
    "cy",
    "x1",
    "y1",
    "x2",
    "y2",
    "stroke-width",
    "font-size",
}
_XLINK_HREF = "http://www.w3.org/1999/xlink}href"
_XML_SPACE = "http://www.w3.org/XML/1998/namespace}space"
_DROPPED_TAGS = {"script", "metadata", "title", "desc"}
# A browser shows these, or moves things by them; resvg does not.
_UNSHOWN_TAGS = {
    "foreignObject": "HTML",
    "animate": "an animation",
    "animateTransform": "an animation",
    "animateMotion": "an animation",
    "set": "an animation",
}
_EMBEDDED = re.compile(r"\s*data:image/(png|jpe?g|gif|webp|svg\+xml)[;,]", re.IGNORECASE)
# Log lines of resvg that tell of something a browser may show and the picture lacks.
_LOGGED = {
    "No match for": "a text (its font is not installed)",
    "rule is not supported": "a rule of a style sheet",
    "Selector skipped": "a rule of a style sheet",
    "Failed to parse fill value": "a fill that is not understood",
    "Failed to parse stroke value": "a stroke that is not understood",
    "Failed to parse transform value": "a transform that is not understood",
    "Failed to load": "a picture that cannot be read",
}

# Runs without the packages of the environment but resvg's, and without anything of ours. No line of it is an import
# statement of a package: loaders of a checkpoint's code look for those line by line, in strings too, and ask for them.
_DRAW = """
import os, sys
# What the renderer logs goes to the standard output, where only the picture belongs.
out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
site, width, height, has_text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
seconds, memory = int(sys.argv[5]), int(sys.argv[6])
try:
    resource = __import__("resource")
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, ValueError, OSError):
    pass
sys.path.insert(0, site)
resvg_py = __import__("resvg_py")
fonts = {}
if has_text:
    probe = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text y="9">M</text></svg>'
    blank = resvg_py.svg_to_bytes(svg_string=probe, skip_system_fonts=True)
    families = {
        "serif_family": ("Times New Roman", "Liberation Serif", "DejaVu Serif", "Noto Serif", "Times", "DejaVu Sans", "Noto Sans"),
        "sans_serif_family": ("Arial", "Liberation Sans", "DejaVu Sans", "Noto Sans", "Helvetica"),
        "monospace_family": ("Courier New", "Liberation Mono", "DejaVu Sans Mono", "Noto Sans Mono", "Courier"),
    }
    for kind, names in families.items():
        for name in names:
            if resvg_py.svg_to_bytes(svg_string=probe, serif_family=name) != blank:
                fonts[kind] = name
                break
picture = resvg_py.svg_to_bytes(
    svg_string=sys.stdin.buffer.read().decode("utf-8"), width=width, height=height, dpi=96, log_information=True,
    skip_system_fonts=not has_text, **fonts
)
out.write(picture)
out.close()
"""


class SvgPicture:
    """
    An SVG file as a picture of what a browser shows.

    Args:
        document ([`SvgDocument`]): the file.
    """

    def __init__(self, document: SvgDocument) -> None:
        self._document = document
        self._page = svg_page(document.root) or _page_around(document)
        # Width and height in pixels.
        self.size = _size_of(document.root, self._page)

    def draw(self, close: bool = False) -> tuple[np.ndarray, list[str]]:
        """
        Draw it: brightness `[H, W]` uint8 on white paper, under strokes that are all white their cover, and the
        names of what a browser may show and this does not.

        Args:
            close: leave out empty margins of the page where the drawing is small on it.

        Raises:
            ValueError: if nothing of it is seen, or drawing it takes too long or too much memory.
        """
        root, left_out = _sanitize(self._document)
        picture, logged = _render(root, self.size, self._page)
        gray = _on_paper(picture)
        rows, columns = (np.flatnonzero((gray != gray[0, 0]).any(axis)) for axis in (1, 0))
        if len(rows) == 0 and gray[0, 0] in (0, 255) and not picture.getchannel("A").getbbox():
            # Says what is wrong with its shapes, if something is.
            if not svg_lines(self._document).strokes:
                raise ValueError("the drawing has no lines.")
            raise ValueError("nothing of it is seen: its lines are hidden, have no paint, or lie outside of its page.")
        extent = max(np.ptp(rows), np.ptp(columns)) + 1 if len(rows) else 0
        if close and 0 < extent < _MIN_FILLED * max(gray.shape):
            pad = 0.1 * extent + 2
            view = (columns[0] - pad, rows[0] - pad, np.ptp(columns) + 1 + 2 * pad, np.ptp(rows) + 1 + 2 * pad)
            picture, logged = _render(root, self.size, self._page, view)
            gray = _on_paper(picture)
        return gray, list(dict.fromkeys([*self._document.left_out, *left_out, *logged]))


def _page_around(document: SvgDocument) -> SvgPage:
    """The page of a file that states none: from its origin to beyond its shapes, as a window would show it."""
    try:
        strokes = svg_lines(document).strokes
    except TooManyPointsError:
        raise
    except ValueError:
        strokes = []
    reach = np.concatenate([np.array([_DEFAULT_PAGE]) / 1.1, *strokes]).max(0) * 1.1
    width, height = np.where(np.isfinite(reach) & (reach < 1e6), reach, _DEFAULT_PAGE).tolist()
    return SvgPage(0.0, 0.0, width, height)


def _size_of(root: ElementTree.Element, page: SvgPage) -> tuple[int, int]:
    """Width and height of the picture in pixels."""
    width, height = page.width, page.height
    if not page.fitted:
        width, height = (parse_length(root.get(side)) or 1.0 for side in ("width", "height"))
    scale = _PICTURE_SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _on_paper(picture: Image.Image) -> np.ndarray:
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    gray = np.asarray(white.convert("RGB").convert("L", (1 / 3, 1 / 3, 1 / 3, 0)))
    if int(gray.max()) - int(gray.min()) >= 16:
        return gray
    # White strokes on no paper, meant for a dark page.
    alpha = np.asarray(picture.getchannel("A"))
    return gray if alpha.min() == alpha.max() else 255 - alpha


def _sanitize(document: SvgDocument) -> tuple[ElementTree.Element, list[str]]:
    """A copy of SVG's own elements and attributes, without what leads out of the file, and the names of what that was."""
    # Here, so that plain strokes are read without the libraries of CSS.
    from diffsketching_pipeline.images.svg_styles import apply_styles

    left_out: list[str] = []
    root = ElementTree.Element("svg", {"xmlns": SVG_NAMESPACE})
    pending = [(document.root, root)]
    while pending:
        source, copy = pending.pop()
        tag = tag_of(source)
        copy.text = _plain_css(source.text or "") if tag == "style" else source.text
        _copy_attributes(source, copy)
        for child in source:
            name = tag_of(child)
            if name in _UNSHOWN_TAGS and tag != "switch":
                left_out.append(_UNSHOWN_TAGS[name])
            if name and name not in _DROPPED_TAGS and name not in _UNSHOWN_TAGS and _stays(child, name, left_out):
                kept = ElementTree.SubElement(copy, name)
                kept.tail = child.tail
                pending.append((child, kept))
            elif child.tail and len(copy):
                # The text after an element is its parent's.
                copy[-1].tail = (copy[-1].tail or "") + child.tail
            elif child.tail:
                copy.text = (copy.text or "") + child.tail
    left_out += apply_styles(root)
    _resolve_lengths(root)
    return root, left_out


def _resolve_lengths(root: ElementTree.Element) -> None:
    """Write lengths in pixels that the renderer would pass over: in units that it lacks, and a `<use>`'s shares of the page."""
    # Those within an `<svg>` of their own are shares of that.
    page = svg_page(root) if root.find(".//svg") is None else None
    for element in root.iter():
        for name in _LENGTHS.intersection(element.keys()):
            value = element.get(name, "").strip()
            pixels = parse_length(value) if value.lower().endswith(("q", "rem")) else None
            if value.endswith("%") and element.tag == "use" and page is not None:
                share = parse_length(value[:-1])
                side = page.width if name in ("x", "width") else page.height
                pixels = None if share is None else share / 100 * side
            if pixels is not None:
                element.set(name, str(pixels))


def _stays(element: ElementTree.Element, name: str, left_out: list[str]) -> bool:
    """Return whether an element shows something of this file."""
    if name == "style":
        medium = element.get("media", "all").strip().lower()
        return element.get("type", "text/css").strip().lower() == "text/css" and medium in ("", "all", "screen")
    if name not in ("use", "image", "feImage"):
        return True
    href = _href_of(element)
    if href.startswith("#") or (name != "use" and _EMBEDDED.match(href)):
        return True
    if href:
        left_out.append(f"<{name}> of another file ({href[:60]!r})")
    return False


def _href_of(element: ElementTree.Element) -> str:
    return element.get("href", element.get(_XLINK_HREF, "")).strip()


def _copy_attributes(source: ElementTree.Element, copy: ElementTree.Element) -> None:
    for name, value in source.attrib.items():
        if "}" not in name and ":" not in name and name != "href":
            value = "currentColor" if value.strip().lower() == "currentcolor" else value
            copy.set(name, _plain_css(value) if name == "style" else value)
    if source.get(_XML_SPACE):
        copy.set("xml:space", source.attrib[_XML_SPACE])
    href = _href_of(source)
    if href.startswith("#") or _EMBEDDED.match(href):
        copy.set("href", href)


def _plain_css(text: str) -> str:
    """Style with the transforms of CSS in the numbers that attributes have, which are all that resvg reads."""

    def plain(match: re.Match[str]) -> str:
        value = re.sub(r"(?<=[\d.])px\b|(?<=[\d.])deg\b", "", match.group(2))
        value = re.sub(r"([-+\d.e]+)rad\b", lambda m: _in_degrees(m, 57.29577951308232), value)
        value = re.sub(r"([-+\d.e]+)turn\b", lambda m: _in_degrees(m, 360.0), value)
        value = re.sub(r"\btranslateX\(", "translate(", value)
        value = re.sub(r"\btranslateY\(", "translate(0,", value)
        value = re.sub(r"\bscaleX\(([^()]*)\)", r"scale(\1,1)", value)
        value = re.sub(r"\bscaleY\(", "scale(1,", value)
        value = re.sub(r"\bskew\(([^(),]*),([^(),]*)\)", _skew, value)
        return match.group(1) + value

    return re.sub(r"(\btransform\s?:)([^;}]{1,1000})", plain, text)


def _skew(match: re.Match[str]) -> str:
    """The skew of CSS by two angles, which is not one after the other."""
    try:
        x, y = (math.tan(math.radians(float(angle))) for angle in match.groups())
    except ValueError:
        return match.group(0)
    return f"matrix(1,{y!r},{x!r},1,0,0)"


def _in_degrees(match: re.Match[str], factor: float) -> str:
    try:
        return repr(float(match.group(1)) * factor)
    except ValueError:
        return match.group(0)


def _render(
    root: ElementTree.Element,
    size: tuple[int, int],
    page: SvgPage,
    view: tuple[float, float, float, float] | None = None,
) -> tuple[Image.Image, list[str]]:
    """
    The picture, RGBA, and what the log names.

    Args:
        view: left, top, width and height of the part to draw, in pixels of the whole; `None` draws that.
    """
    if root.get("viewBox") is None or page.fitted:
        root.set("viewBox", f"{page.left!r} {page.top!r} {page.width!r} {page.height!r}")
    root.set("width", str(size[0]))
    root.set("height", str(size[1]))
    has_text = next(root.iter("text"), None) is not None
    text = ElementTree.tostring(root, encoding="unicode")
    if view is not None:
        scale = _PICTURE_SIDE / max(view[2:])
        size = (max(1, round(view[2] * scale)), max(1, round(view[3] * scale)))
        box = " ".join(repr(float(value)) for value in view)
        text = f'<svg xmlns="{SVG_NAMESPACE}" viewBox="{box}" width="{size[0]}" height="{size[1]}">{text}</svg>'
    content, log = _draw(text, *size, has_text)
    picture = Image.open(io.BytesIO(content), formats=["PNG"])
    return picture.convert("RGBA"), [name for part, name in _LOGGED.items() if part in log]


# A command reads a drawing twice: before its model is loaded, and at the model's size.
@functools.lru_cache(maxsize=16)
def _draw(text: str, width: int, height: int, has_text: bool) -> tuple[bytes, str]:
    """The content of a PNG file of so many pixels, and what drawing it in a process of its own logs."""
    found = importlib.util.find_spec("resvg_py")
    if found is None or not found.submodule_search_locations:
        raise ValueError("it is more than plain strokes, and to draw it `resvg-py` has to be installed.")
    if not sys.executable:
        raise ValueError("it is more than plain strokes, and here no process can be started to draw it.")
    site = os.path.dirname(next(iter(found.submodule_search_locations)))
    numbers = (width, height, int(has_text), _MAX_SECONDS, _MAX_MEMORY)
    command = [sys.executable, "-I", "-S", "-B", "-c", _DRAW, site, *map(str, numbers)]
    try:
        done = subprocess.run(
            command,
            input=text.encode("utf-8", "replace"),
            capture_output=True,
            timeout=_MAX_WALL_SECONDS,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError("it takes too long to draw: simplify it.") from error
    if done.returncode != 0:
        raise ValueError(_failure(done))
    return done.stdout, done.stderr.decode("utf-8", "replace")


def _failure(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a drawing process ended without a picture."""
    last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if done.returncode > 0 and "ValueError" in last:
        return f"it cannot be drawn: {last.partition(': ')[2][:200]}."
    return "it takes too much time or memory to draw: simplify it, or save it as PNG."
