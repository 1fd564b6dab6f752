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
"""Anything a person draws with -> the one sketch convention: `[B, 1, H, W]`, -1 = stroke, +1 = paper."""

import functools
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import CONFIG_NAME, logging
from PIL import Image, ImageColor, ImageDraw, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.morphology import convex_hull_image, skeletonize

from diffsketching_pipeline.vector_sketch import VectorSketch, is_vector_file, read_vector_sketches


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

Sketch = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | VectorSketch
SketchInput = Sketch | Sequence[Sketch | Sequence[Sketch]]

# A file is judged by its header, before anything is decoded.
MAX_SKETCH_PIXELS = 64_000_000
MAX_SKETCH_SIDE = 16_384

# Raster formats only: Pillow hands others (EPS, say) to outside programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
_MEAN_OF_CHANNELS = (1 / 3, 1 / 3, 1 / 3, 0)

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
_MIN_SOURCE_EXTENT = 16.0
# The drawing is traced on a grid up to this many times finer than the output, and drawn on one this many times finer.
_TRACE_SCALE = 6
_DRAW_SCALE = 4
# In pixels. Thinner lines than this do not survive area averaging.
_MIN_LINE_WIDTH = 0.75
# Whiter than this in all channels is the paper under strokes of colour.
_PAPER_LEVEL = 250
# Area averaging leaves thin lines grey; this gives them a dark core.
_LINE_GAIN = 1.6


@dataclass(frozen=True)
class _Item:
    """A sketch as it was given. `signed`: its floats are in [-1, 1] rather than [0, 1]; `None` if it has no floats."""

    value: Any
    name: str
    signed: bool | None = None


@dataclass(frozen=True)
class _Options:
    """What to do with every sketch of one call; see [`SketchProcessor`]."""

    size: tuple[int, int]
    threshold: float | str
    invert: bool | None
    fit: str
    resize_mode: str
    margin: float
    line_width: float | None


class SketchProcessor(ConfigMixin):
    """
    Turns what a person draws with (file, PIL image, NumPy array, tensor) into the sketch that the models take: a
    float32 tensor `[B, 1, H, W]` with -1 = stroke and +1 = paper.

    Strokes are separated from paper, traced to their centre lines and redrawn at one width, so that a photographed
    pencil drawing and a one-pixel line on a 4096-pixel canvas come out alike. A filled shape becomes its outline.

    Args:
        resolution (`int`, defaults to 64):
            Height and width of the output in pixels, unless `preprocess` is given others.
        threshold (`float` or `"otsu"`, defaults to `"otsu"`):
            What is a stroke: pixels darker than this share of the brightness of the paper around them, in (0, 1).
            `"otsu"` finds the value for each sketch (Otsu, 1979) and stays clear of its noise. A lower value drops
            faint lines, such as those of ruled paper.
        invert (`bool`, *optional*):
            `True`: light strokes on dark; `False`: dark strokes on light. By default it is detected, and a sketch that
            is inverted is logged as a warning.
        fit (`"content"` or `"page"`, defaults to `"content"`):
            `"content"` centres the drawing and scales it to `margin`; `"page"` keeps its place and size on the page.
        resize_mode (`"pad"` or `"stretch"`, defaults to `"pad"`):
            `"pad"` keeps the aspect ratio and fills up with paper; `"stretch"` takes on that of the output.
        margin (`float`, defaults to 0.03):
            Share of the output left free on each side by `fit="content"`, in [0, 0.4].
        line_width (`float`, *optional*, defaults to 0.014):
            Width of the lines as a share of the output's shorter side (0.9 pixels of 64), in (0, 0.25]; never below
            0.75 pixels. `None` keeps widths and dark fills as they were drawn.
    """

    config_name = CONFIG_NAME  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        resolution: int = 64,
        threshold: float | str = "otsu",
        invert: bool | None = None,
        fit: str = "content",
        resize_mode: str = "pad",
        margin: float = 0.03,
        line_width: float | None = 0.014,
    ):
        super().__init__()
        _check_options(_Options((resolution, resolution), threshold, invert, fit, resize_mode, margin, line_width))

    @staticmethod
    def load(path: str | os.PathLike) -> Image.Image:
        """
        Opens and decodes an image file, turned upright by its EXIF orientation.

        Raises:
            `ValueError`: naming the file, if it is missing, not an image, truncated, or larger than
            `MAX_SKETCH_PIXELS` pixels or `MAX_SKETCH_SIDE` pixels a side (told from the header, without decoding).
        """
        return _load_image(path, f"sketch {os.fspath(path)!r}")

    def preprocess(
        self,
        sketch: SketchInput,
        height: int | None = None,
        width: int | None = None,
        *,
        invert: bool | None = None,
        threshold: float | str | None = None,
        fit: str | None = None,
        resize_mode: str | None = None,
    ) -> torch.Tensor:
        """
        The sketches of `sketch` one after another, groups joined: float32 `[B, 1, height, width]` in [-1, 1], on the
        CPU whatever device a tensor came from.

        Arguments, rules and errors are those of [`~SketchProcessor.preprocess_groups`].
        """
        groups = self.preprocess_groups(
            sketch, height, width, invert=invert, threshold=threshold, fit=fit, resize_mode=resize_mode
        )
        return torch.cat(groups)

    def preprocess_groups(
        self,
        sketch: SketchInput,
        height: int | None = None,
        width: int | None = None,
        *,
        invert: bool | None = None,
        threshold: float | str | None = None,
        fit: str | None = None,
        resize_mode: str | None = None,
    ) -> list[torch.Tensor]:
        """
        One entry per result, each the float32 tensor `[K_i, 1, height, width]` in [-1, 1] of its K_i drawings.

        Args:
            sketch:
                A path, PIL image of any mode, NumPy array, tensor, or a list of these: one result each. A list inside
                the list, or a 4-D tensor or array inside it, holds several drawings for one result. Tensors are
                `[H, W]`, `[C, H, W]` or `[B, C, H, W]` (B results), arrays `[H, W]`, `[H, W, C]` or `[B, H, W, C]`,
                with C = 1, 3 or 4 (alpha last). uint8 is 0-255 and uint16 0-65535; floats that contain a negative
                value are in [-1, 1], others in [0, 1]. A float tensor with a negative value, one channel and exactly
                the output's size already is in the convention: it is checked (and inverted if need be), not redrawn.
                An `.svg` file or a [`VectorSketch`] is one drawing, an `.ndjson` file of Quick, Draw! is a batch of them.
            height, width (`int`, *optional*):
                Size of the output in pixels, in [8, 4096]; `resolution` by default.
            invert, threshold, fit, resize_mode (*optional*):
                Override the configuration for this call.

        Raises:
            `ValueError`: naming the file or the index, if a sketch cannot be read, has the wrong type, shape or
            values, is too large, or holds no drawing (blank, all dark, or 0 everywhere, which means "no sketch").
        """
        config: Any = self.config
        options = _Options(
            size=(config.resolution if height is None else height, config.resolution if width is None else width),
            threshold=config.threshold if threshold is None else threshold,
            invert=config.invert if invert is None else invert,
            fit=config.fit if fit is None else fit,
            resize_mode=config.resize_mode if resize_mode is None else resize_mode,
            margin=config.margin,
            line_width=config.line_width,
        )
        _check_options(options)
        groups = _group_sketches(sketch)
        for item in itertools.chain(*groups):
            _check_item(item)

        inverted: list[str] = []
        results = [torch.stack([_preprocess_item(item, options, inverted) for item in group]) for group in groups]
        if inverted:
            logger.warning(
                f"Light strokes on dark were found and inverted in {', '.join(inverted)}. Pass `invert=True` to"
                " confirm, or `invert=False` if the dark parts are the strokes."
            )
        return results


def _preprocess_item(item: _Item, options: _Options, inverted: list[str]) -> torch.Tensor:
    """`[1, H, W]`; the name is added to `inverted` if light strokes on dark were detected, not asked for."""
    if isinstance(item.value, VectorSketch):
        mask, page, factor = _rasterize(item.value, options)
        if not mask.any():
            raise ValueError(f"{item.name} holds no drawing: its lines lie outside of its page.")
    else:
        gray = _to_gray(item, options.invert)
        _check_not_uniform(gray, item.name)
        invert = options.invert
        if invert is None:
            invert = _is_light_on_dark(gray)
            inverted += [item.name] if invert else []
        if _in_convention(item, options.size):
            sketch = item.value.detach().to("cpu", torch.float32).reshape(1, *options.size).clamp(-1, 1)
            return -sketch if invert else sketch
        mask, page, factor = _trace(_without_surround(255 - gray if invert else gray), options, item.name)
    width = max(_MIN_LINE_WIDTH, (options.line_width or 0.0) * min(options.size))
    scale, _ = _place_drawing(mask, page, factor, options)
    lines = _centre_lines(mask, gap=width / scale.max())
    placement = _place_drawing(lines, page, factor, options)
    coverage = _draw(lines, options.size, placement, width)
    if options.line_width is None:
        coverage = np.maximum(coverage, _draw(mask, options.size, placement, 0.0))
    sketch = 1 - 2 * np.clip(_LINE_GAIN * coverage, 0, 1)
    return torch.from_numpy(sketch.astype(np.float32))[None]


def preprocess_photos(images: Any, height: int, width: int) -> torch.Tensor:
    """
    Photos as the models take them.

    Args:
        images (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
            Arrays `[H, W, 3]` and tensors `[3, H, W]`, or batches of them: uint8, or floats in [-1, 1] if one is negative
            and in [0, 1] otherwise. Files, images and uint8 arrays are scaled to cover the size and cropped around their
            centre, what is transparent is white; floats are never resampled and have to have that size.
        height, width (`int`): size of the result in pixels.

    Returns:
        `torch.Tensor`: float32 `[batch_size, 3, height, width]` in [-1, 1].

    Raises:
        ValueError: naming the photo that cannot be read, is empty or too large, is not finite or in range, or has
            another shape.
    """
    entries = images if isinstance(images, (list, tuple)) else [images]
    if len(entries) == 0:
        raise ValueError("`images` is an empty list; pass at least one photo.")
    items: list[_Item] = []
    for i, entry in enumerate(entries):
        if _is_array(entry) and entry.ndim == 4:
            items += _split_batch(entry, "photo {}" if len(entries) == 1 else f"photo {i}, {{}}")
        else:
            items.append(_make_item(entry, f"photo {i}"))
    return torch.stack([_preprocess_photo(item, (height, width)) for item in items])


def _preprocess_photo(item: _Item, size: tuple[int, int]) -> torch.Tensor:
    if item.signed is None:
        if _is_array(item.value):
            _check_array(item)
            image = _array_to_pil(item)
        else:
            image = _load_image(item.value, item.name)
        image = ImageOps.fit(_to_rgb(image, item.name), size[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    pixels = torch.as_tensor(_channels_last(item)).detach().to("cpu", torch.float32).permute(2, 0, 1)
    if tuple(pixels.shape) != (3, *size):
        raise ValueError(
            f"{item.name} has the shape {list(pixels.shape)}, but floats have to have {[3, *size]}: resize it first, or"
            " pass an image."
        )
    low, high = (float(bound) for bound in pixels.aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"{item.name} has floats in [{low:g}, {high:g}], but they have to be in [0, 1] or [-1, 1].")
    return pixels if item.signed else pixels * 2 - 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB, what is transparent laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_uint8(np.asarray(image), name))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode!r}; convert it to RGB. ({error})") from error


def read_photo(image: Any, name: str) -> Image.Image:
    """
    One photo at its own size, upright, as 8-bit RGB, or RGBA where it has transparency.

    Args:
        image (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Arrays `[H, W, C]` and tensors `[C, H, W]`, C = 1, 3 or 4: uint8, or floats in [-1, 1] or [0, 1].

    Raises:
        ValueError: naming the photo that cannot be read, is empty or too large, or has another type or shape.
    """
    opened = _open_any(image, name)
    return opened.convert("RGBA") if opened.has_transparency_data else _to_rgb(opened, name)


def preprocess_mask(mask: Any, name: str) -> Image.Image:
    """
    A mask as 8-bit grey at its own size: white is inside, and what is transparent is black.

    Args:
        mask (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Arrays and tensors as for [`read_photo`], or without channels; also bool.

    Raises:
        ValueError: naming the mask that cannot be read, or has another type or shape.
    """
    opened = _open_any(mask, name)
    if not opened.has_transparency_data:
        return _to_rgb(opened, name).convert("L")
    opened = opened.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opened.size, "black"), opened).convert("L")


def _open_any(value: Any, name: str) -> Image.Image:
    item = _make_item(value, name)
    if not _is_array(item.value):
        return _load_image(item.value, item.name)
    # Unlike a drawing, a mask may be 0 everywhere as far as reading it goes.
    if item.signed is not None or item.value.dtype not in (np.bool_, torch.bool):
        _check_array(item)
    return _array_to_pil(item)


def parse_palette(colours: Any) -> torch.Tensor | None:
    """
    `[num_colours, 3, 1, 1]` in [-1, 1] of a list of CSS colours or (r, g, b) of 0 to 255; `None` for anything else.

    Raises:
        ValueError: for an empty list, or a colour that is none.
    """
    if not isinstance(colours, (list, tuple)):
        return None
    if not colours:
        raise ValueError("`colour_hint` is an empty list: give at least one colour, or None.")
    parsed = []
    for colour in colours:
        try:
            rgb = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(colour)
        except (ValueError, TypeError):
            rgb = ()
        if len(rgb) != 3 or not all(_is_number(value) and 0 <= value <= 255 for value in rgb):
            raise ValueError(
                f"`colour_hint` has {colour!r}, which is no colour: use names or codes such as 'navy' and '#803010', or (r, g,"
                " b) of 0 to 255."
            )
        parsed.append(rgb)
    return torch.tensor(parsed, dtype=torch.float32)[:, :, None, None] / 127.5 - 1


def preprocess_colour_strokes(image: Any, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coarse strokes of colour on a page of any size: their colours `[3, height, width]` in [-1, 1], on paper that of the
    nearest stroke, and the share of each pixel that they cover `[1, height, width]`. Paper is what is transparent or, in an
    opaque image, white.

    Raises:
        ValueError: if the image cannot be read, or holds no stroke.
    """
    page = read_photo(image, "`colour_hint`")
    rgb = np.asarray(page.convert("RGB"))
    alpha = np.asarray(page.getchannel("A")) if page.mode == "RGBA" else 255 * (rgb.min(axis=2) < _PAPER_LEVEL)
    if not alpha.any():
        raise ValueError("`colour_hint` holds no colour: it is white or transparent everywhere.")
    # Premultiplied, so that paper does not bleed into the strokes where the page is made smaller.
    layers = [channel * (alpha / 255.0) for channel in (*rgb.transpose(2, 0, 1), np.full(alpha.shape, 255.0))]
    fitted = [
        np.asarray(ImageOps.pad(Image.fromarray(layer.astype(np.float32)), (width, height), Image.Resampling.BOX))
        for layer in layers
    ]
    cover = fitted[3] / 255
    nearest = ndimage.distance_transform_edt(cover == 0, return_distances=False, return_indices=True)
    colours = (np.stack(fitted[:3]) / np.maximum(cover, 1e-6))[:, nearest[0], nearest[1]]
    return torch.from_numpy(colours / 127.5 - 1).float(), torch.from_numpy(cover)[None]


def enclosed_area(sketch: torch.Tensor) -> torch.Tensor:
    """
    What drawings `[K, 1, height, width]` of one result enclose together, `[1, height, width]` of 0 and 1: what a line
    shuts off from the border or, where outlines have gaps, the convex hull of the lines.
    """
    lines = (sketch.amin(dim=(0, 1)) < 0).cpu().numpy()
    filled, hull = ndimage.binary_fill_holes(lines), convex_hull_image(lines)
    area = filled if filled.sum() > 0.5 * hull.sum() else hull
    return torch.from_numpy(area)[None].float()


# What was given: checks that need no decoding


def _is_number(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _check_options(options: _Options) -> None:
    for side in options.size:
        if not (_is_number(side, (int,)) and 8 <= side <= 4096):
            raise ValueError(
                f"`resolution`, `height` and `width` have to be integers in [8, 4096] but one is {side!r}."
            )
    if options.threshold != "otsu" and not (_is_number(options.threshold) and 0 < float(options.threshold) < 1):
        raise ValueError(f'`threshold` has to be "otsu" or a float in (0, 1) but is {options.threshold!r}.')
    if options.invert not in (None, True, False):
        raise ValueError(f"`invert` has to be True, False or None but is {options.invert!r}.")
    if options.fit not in ("content", "page"):
        raise ValueError(f'`fit` has to be "content" or "page" but is {options.fit!r}.')
    if options.resize_mode not in ("pad", "stretch"):
        raise ValueError(f'`resize_mode` has to be "pad" or "stretch" but is {options.resize_mode!r}.')
    if not (_is_number(options.margin) and 0 <= options.margin <= 0.4):
        raise ValueError(f"`margin` has to be in [0, 0.4] but is {options.margin!r}.")
    if options.line_width is not None and not (_is_number(options.line_width) and 0 < options.line_width <= 0.25):
        raise ValueError(f"`line_width` has to be None or in (0, 0.25] but is {options.line_width!r}.")


def _is_array(value: Any) -> TypeGuard[np.ndarray | torch.Tensor]:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _group_sketches(sketch: SketchInput) -> list[list[_Item]]:
    """One list of items per result."""
    if not isinstance(sketch, (list, tuple)):
        if _is_batch(sketch):
            return [[item] for item in _split_batch(sketch, "sketch {}")]
        return [[_make_item(sketch, "sketch 0")]]
    if len(sketch) == 0:
        raise ValueError("`sketch` is an empty list; pass at least one drawing, or `None` for none.")
    groups = []
    for i, entry in enumerate(sketch):
        if _is_batch(entry):
            groups.append(_split_batch(entry, f"sketch {i}, drawing {{}}"))
        elif isinstance(entry, (list, tuple)):
            if len(entry) == 0:
                raise ValueError(f"sketch {i} is an empty list; every result needs at least one drawing.")
            groups.append([_make_item(value, f"sketch {i}, drawing {k}") for k, value in enumerate(entry)])
        else:
            groups.append([_make_item(entry, f"sketch {i}")])
    return groups


def _is_batch(value: Any) -> TypeGuard[np.ndarray | torch.Tensor | str | os.PathLike]:
    return is_vector_file(value) or (_is_array(value) and value.ndim == 4)


def _split_batch(batch: np.ndarray | torch.Tensor | str | os.PathLike, name: str) -> list[_Item]:
    if isinstance(batch, (str, os.PathLike)):
        path = os.fspath(batch)
        try:
            return [
                _Item(value, f"{name.format(i)} ({path!r})") for i, value in enumerate(read_vector_sketches(batch))
            ]
        except ValueError as error:
            raise ValueError(f"{name.format(0)} ({path!r}) cannot be used: {error}") from error
    if batch.shape[0] == 0:
        raise ValueError(f"{name.format(0)} does not exist: the batch has shape {list(batch.shape)}.")
    signed = _is_signed(batch)
    return [_Item(value, name.format(i), signed) for i, value in enumerate(batch)]


def _make_item(value: Any, name: str) -> _Item:
    if isinstance(value, (str, os.PathLike)):
        return _Item(value, f"{name} ({os.fspath(value)!r})")
    if isinstance(value, Image.Image):
        path = getattr(value, "filename", "")
        return _Item(value, f"{name} ({path!r})" if path else name)
    if isinstance(value, VectorSketch):
        return _Item(value, name)
    if _is_array(value):
        return _Item(value[0] if value.ndim == 4 and value.shape[0] == 1 else value, name, _is_signed(value))
    raise ValueError(
        f"{name} has to be a path, PIL image, NumPy array or tensor (or a list of these) but is of type"
        f" {type(value).__name__}."
    )


def _is_signed(value: np.ndarray | torch.Tensor) -> bool | None:
    if isinstance(value, torch.Tensor):
        is_float = value.is_floating_point()
    else:
        is_float = np.issubdtype(value.dtype, np.floating)
    return bool((value < 0).any()) if is_float else None


def _in_convention(item: _Item, size: tuple[int, int]) -> bool:
    return (
        isinstance(item.value, torch.Tensor) and item.signed is True and tuple(item.value.shape) in (size, (1, *size))
    )


def _check_item(item: _Item) -> None:
    if isinstance(item.value, (str, os.PathLike)):
        with _open_image(item.value, item.name) as image:
            _check_dimensions(image.size, item.name)
    elif isinstance(item.value, Image.Image):
        _check_dimensions(item.value.size, item.name)
    elif _is_array(item.value):
        _check_array(item)


def _check_dimensions(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has a side of 0 pixels: {width} x {height}.")
    if width * height > MAX_SKETCH_PIXELS or max(size) > MAX_SKETCH_SIDE:
        raise ValueError(_too_large(name, f"{width} x {height} pixels"))


def _too_large(name: str, what: str) -> str:
    return (
        f"{name} is too large: {what}. The limit is {MAX_SKETCH_PIXELS // 10**6} megapixels and {MAX_SKETCH_SIDE}"
        " pixels a side; make it smaller."
    )


def _channels_last(item: _Item) -> np.ndarray | torch.Tensor:
    """View of an array or tensor as `[H, W, C]`, C = 1, 3 or 4."""
    value, shape = item.value, tuple(item.value.shape)
    is_tensor = isinstance(value, torch.Tensor)
    if value.ndim == 2:
        return value[..., None]
    if value.ndim == 3:
        if not is_tensor and shape[2] in (1, 3, 4):
            return value
        if shape[0] in (1, 3, 4):
            return value.permute(1, 2, 0) if is_tensor else value.transpose(1, 2, 0)
    kind, one, batch = ("tensor", "[C, H, W]", "[B, C, H, W]") if is_tensor else ("array", "[H, W, C]", "[B, H, W, C]")
    raise ValueError(
        f"{item.name} has shape {list(shape)}, but one {kind} has to be [H, W] or {one} with C = 1, 3 or 4; several are"
        f" {batch}."
    )


def _check_array(item: _Item) -> None:
    height, width, _ = _channels_last(item).shape
    _check_dimensions((width, height), item.name)
    if item.signed is None:
        dtype = str(item.value.dtype).removeprefix("torch.")
        if dtype not in ("uint8", "uint16", "bool"):
            raise ValueError(f"{item.name} has dtype {dtype}, but has to be uint8, uint16, bool or floating point.")
        return
    low, high = float(item.value.min()), float(item.value.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{item.name} contains NaN or infinite values.")
    if low < -1.001 or high > 1.001:
        raise ValueError(
            f"{item.name} has floats in [{low:g}, {high:g}], but they have to be in [0, 1] or [-1, 1]; pass values of"
            " 0 to 255 as uint8."
        )
    if low == high == 0:
        raise ValueError(f"{item.name} is 0 everywhere, which stands for no sketch; pass `sketch=None` for that.")


# Decoding


def _open_image(path: str | os.PathLike, name: str) -> Image.Image:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(Path(path), formats=formats)
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, "it may be a decompression bomb")) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image; save it as PNG or JPEG. ({error})") from error


def _load_image(source: str | os.PathLike | Image.Image, name: str) -> Image.Image:
    """Decoded and upright."""
    image = source if isinstance(source, Image.Image) else _open_image(source, name)
    try:
        _check_dimensions(image.size, name)
        return _decode(image, name)
    finally:
        if image is not source:
            image.close()


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise ValueError(f"{name} is damaged or truncated; save it again. ({error})") from error


def _to_gray(item: _Item, invert: bool | None) -> np.ndarray:
    """`[H, W]` uint8 brightness, transparency laid on paper."""
    image = _array_to_pil(item) if _is_array(item.value) else _load_image(item.value, item.name)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_uint8(np.asarray(image), item.name)
    has_alpha = image.has_transparency_data
    if image.mode not in ("1", "L") or has_alpha:
        try:
            image = image.convert("RGBA" if has_alpha else "RGB")
        except ValueError as error:
            raise ValueError(f"{item.name} has mode {image.mode!r}; convert it to RGB. ({error})") from error
        if has_alpha:
            return _flatten_alpha(image, invert, item.name)
        image = image.convert("L", _MEAN_OF_CHANNELS)
    return np.asarray(image.convert("L"))


def _array_to_pil(item: _Item) -> Image.Image:
    value = _channels_last(item)
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    if item.signed is not None:
        value = value.astype(np.float32)
        value = np.clip(np.rint(255 * ((value + 1) / 2 if item.signed else value)), 0, 255).astype(np.uint8)
    elif value.dtype == np.uint16:
        value = np.rint(value / 257).astype(np.uint8)
    elif value.dtype == bool:
        value = 255 * value.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(value[..., 0] if value.shape[2] == 1 else value))


def _scale_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """From PIL's wide modes (I, I;16, F), which do not state their range: the least of 1, 255 and 65535 that fits."""
    tops = (1, 255, 65535) if np.issubdtype(values.dtype, np.floating) else (255, 65535)
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contains NaN or infinite values.")
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has values in [{low:g}, {high:g}]; save it with 8 or 16 bits per pixel.")
    top = next(top for top in tops if high <= top)
    return np.rint(values * (255 / top)).astype(np.uint8)


def _flatten_alpha(image: Image.Image, invert: bool | None, name: str) -> np.ndarray:
    """Transparency becomes paper: white, or black under strokes that are all light."""
    alpha = np.asarray(image.getchannel("A"))
    gray = np.asarray(image.convert("RGB").convert("L", _MEAN_OF_CHANNELS))
    if alpha.max() == 0:
        raise ValueError(f"{name} holds no drawing: it is fully transparent.")
    if invert is None:
        opaque = gray[alpha >= 0.9 * alpha.max()]
        invert = bool((opaque < 128).mean() < 0.001)
    paper = 0.0 if invert else 255.0
    return np.rint(paper + alpha.astype(np.float32) / 255 * (gray - paper)).astype(np.uint8)


# From brightness to strokes


def _thumbnail(gray: np.ndarray, side: int) -> np.ndarray:
    factor = math.ceil(max(gray.shape) / side)
    return np.asarray(Image.fromarray(gray).reduce(factor)) if factor > 1 else gray


def _dark_part(gray: np.ndarray) -> tuple[np.ndarray, float, float] | None:
    """
    Of a page that falls into two brightnesses, the thumbnail of its dark part, and that part's share of the border and
    of the interior. `None` where it does not: shading swamps the strokes.
    """
    thumb = _thumbnail(gray, 256).astype(np.float32)
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


def _is_light_on_dark(gray: np.ndarray) -> bool:
    """Paper is what touches the border and fills much of the page; failing that, strokes are what stands out."""
    part = _dark_part(gray)
    if part is None:
        thumb = _thumbnail(gray, 256).astype(np.float32)
        return bool(((thumb - ndimage.gaussian_filter(thumb, 4)) ** 3).mean() > 0)
    _, border, interior = part
    return border > 0.5 and interior > 0.25


def _without_surround(gray: np.ndarray) -> np.ndarray:
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
    paper = Image.fromarray(_thumbnail(gray, 256)[tuple(nearest)]).resize(size, Image.Resampling.BILINEAR)
    surround = Image.fromarray(surround).resize(size, Image.Resampling.NEAREST)
    return np.where(np.asarray(surround), np.asarray(paper), gray)


def _check_not_uniform(gray: np.ndarray, name: str) -> None:
    low, high = int(gray.min()), int(gray.max())
    if high - low >= 255 * _MIN_CONTRAST:
        return
    kind = "all dark" if high < 128 else "blank"
    raise ValueError(
        f"{name} holds no drawing: it is {kind} (grey levels {low} to {high} of 255). Draw dark lines on light paper."
    )


def _trace(gray: np.ndarray, options: _Options, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Stroke mask, the page's height and width in cells of it, and cells per pixel of the source."""
    side = _TRACE_SCALE * max(options.size)
    mask, factor = _ink(gray, options.threshold, side)
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
        closer, closer_factor = _ink(gray, options.threshold, side)
        mask, factor = (closer, closer_factor) if closer.any() else (mask, factor)
    return mask, np.array(gray.shape) * factor, factor


def _rasterize(sketch: VectorSketch, options: _Options) -> tuple[np.ndarray, np.ndarray, float]:
    """The lines as a mask of one-cell strokes, and what [`_trace`] returns beside it; what leaves the page is cut off."""
    assert sketch.page is not None
    points = np.concatenate(sketch.strokes)
    if options.fit == "page":
        origin, extent = np.array(sketch.page[:2]), np.array(sketch.page[2:])
    else:
        origin, extent = points.min(0), np.ptp(points, axis=0)
    cells = _TRACE_SCALE * max(options.size)
    scale = (cells - 1) / extent.max()
    width, height = np.ceil(extent * scale).astype(int) + 1
    canvas = Image.new("L", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for stroke in sketch.strokes:
        # Pillow's integers overflow far outside of the page.
        line = np.clip((stroke - origin) * scale, -cells, 2 * cells).round()
        draw.line([(x, y) for x, y in line], fill=1) if len(line) > 1 else draw.point(tuple(line[0]), fill=1)
    mask = np.asarray(canvas, dtype=bool)
    # A line has no pixels: nothing that it spans is too small to be magnified.
    return mask, np.array(mask.shape), 1 / _MIN_SOURCE_EXTENT


def _occupied(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows and of the columns that are not empty."""
    return np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))


def _ink(gray: np.ndarray, threshold: float | str, side: int) -> tuple[np.ndarray, float]:
    """Stroke mask on a grid of about `side` cells, and its cells per pixel of `gray`."""
    is_photo = _is_photo(gray)
    gray, factor = _resample(gray, side, is_photo)
    background = _background(gray)
    darkness = 1 - gray / background
    if isinstance(threshold, str):
        floor = _noise_floor(darkness, background) if is_photo else _MIN_CONTRAST
        darkness = np.maximum(darkness, 0)
        high = threshold_otsu(darkness)
        mask = apply_hysteresis_threshold(darkness, np.maximum(floor, 0.6 * high), np.maximum(floor, high))
    else:
        mask = darkness > 1 - threshold
    if not is_photo:
        # In a photo such edges are those of shadows.
        mask |= _swallowed_edges(gray, background, mask)
    return _remove_specks(mask), factor


def _noise_floor(darkness: np.ndarray, background: np.ndarray) -> np.ndarray:
    """What noise of a constant size in grey levels explains, which in a shadow is a larger share of the paper."""
    level = np.median(darkness)
    # A quartile of the deviations, 0.3186 sigma of a normal distribution, is that of the paper even on a crowded page.
    noise = np.quantile(np.abs(darkness - level) * background, 0.25) / 0.3186
    return np.maximum(_MIN_CONTRAST, level + _NOISE_SIGMAS * noise / background)


def _is_photo(gray: np.ndarray) -> bool:
    """Whether no three neighbouring grey levels hold much of the page, as the paper of a digital drawing does."""
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
    small = _thumbnail(np.clip(gray, 0, 255).astype(np.uint8), 128).astype(np.float32)
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
    Sharp edges of the large grey or coloured fills that were taken for background, where no stroke runs along them.
    """
    paper = background.max()
    fill = gray < 0.9 * paper
    edge = fill & ~ndimage.binary_erosion(fill, border_value=1) & (background < 0.95 * paper)
    if not edge.any():
        return edge
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


def _centre_lines(mask: np.ndarray, gap: float) -> np.ndarray:
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


# From strokes to the output


def _place_drawing(
    drawing: np.ndarray, page: np.ndarray, factor: float, options: _Options
) -> tuple[np.ndarray, np.ndarray]:
    """Output pixels per cell, and the position in cells that comes to the output's centre; both as (y, x)."""
    if options.fit == "page":
        extent, centre, target = page, page / 2, np.array(options.size)
    else:
        index = _occupied(drawing)
        extent = np.maximum([np.ptp(i) for i in index], _MIN_SOURCE_EXTENT * factor)
        centre = np.array([(i[0] + i[-1] + 1) / 2 for i in index])
        target = (1 - 2 * options.margin) * np.array(options.size)
    scale = target / extent
    return (np.full(2, scale.min()) if options.resize_mode == "pad" else scale), centre


def _draw(
    shape: np.ndarray, size: tuple[int, int], placement: tuple[np.ndarray, np.ndarray], width: float
) -> np.ndarray:
    """Area coverage in [0, 1] of what lies within `width / 2` output pixels of `shape`, or for 0 of `shape` itself."""
    scale, centre = placement
    reach = np.ceil((width / 2 + 2) / scale).astype(int) + 1
    shape = np.pad(shape, [(r, r) for r in reach])
    distance = ndimage.distance_transform_edt(~shape, sampling=scale)
    if width == 0:
        # Cells have an area: their edge is half a cell before the next one's centre.
        inside = ndimage.distance_transform_edt(shape, sampling=scale)
        distance = np.where(shape, scale.mean() / 2 - inside, distance - scale.mean() / 2)
    fine = [(np.arange(n * _DRAW_SCALE) + 0.5) / _DRAW_SCALE - n / 2 for n in size]
    grid = [axis / s + c + r - 0.5 for axis, s, c, r in zip(fine, scale, centre, reach, strict=True)]
    distance = ndimage.map_coordinates(
        distance, np.meshgrid(*grid, indexing="ij"), order=1, mode="constant", cval=width + 2
    )
    covered = np.clip((width / 2 - distance) * _DRAW_SCALE + 0.5, 0, 1)
    return covered.reshape(size[0], _DRAW_SCALE, size[1], _DRAW_SCALE).mean((1, 3))
