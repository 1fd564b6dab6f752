# SPDX-License-Identifier: Apache-2.0
"""Anything a person draws with -> the one sketch convention: `[B, 1, H, W]`, -1 = stroke, +1 = paper."""

import itertools
import os
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import CONFIG_NAME, logging
from PIL import Image

from diffsketching_pipeline.images.reading import (
    GivenImage,
    LineDrawing,
    PictureDrawing,
    check_given_image,
    is_array,
    load_image,
    make_given_image,
    name_of_file,
    split_batch,
    to_gray,
)
from diffsketching_pipeline.images.strokes import (
    MIN_LINE_WIDTH,
    MIN_SOURCE_EXTENT,
    TRACE_SCALE,
    SketchOptions,
    center_lines,
    check_not_uniform,
    check_options,
    draw_lines,
    is_light_on_dark,
    place_drawing,
    trace,
    without_surround,
)
from diffsketching_pipeline.images.surround import find_sheet, keep_sheet


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

Sketch = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | LineDrawing
SketchInput = Sketch | Sequence[Sketch | Sequence[Sketch]]

_VECTOR_SUFFIXES = (".svg", ".ndjson")
# Area averaging leaves thin lines gray; this gives them a dark core.
_LINE_GAIN = 1.6


class SketchProcessor(ConfigMixin):
    """
    Turns what a person draws with (file, PIL image, NumPy array, tensor) into the sketch that the models take: a
    float32 tensor `[B, 1, H, W]` with -1 = stroke and +1 = paper.

    Strokes are separated from paper, traced to their center lines and redrawn at one width, so that a photographed
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
            `"content"` centers the drawing and scales it to `margin`; `"page"` keeps its place and size on the page.
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
        check_options(SketchOptions((resolution, resolution), threshold, invert, fit, resize_mode, margin, line_width))

    @staticmethod
    def load(path: str | os.PathLike) -> Image.Image:
        """
        Opens and decodes an image file, turned upright by its EXIF orientation.

        Raises:
            `ValueError`: naming the file, if it is missing, not an image, truncated, or larger than
            `MAX_SKETCH_PIXELS` pixels or `MAX_SKETCH_SIDE` pixels a side (told from the header, without decoding).
        """
        return load_image(path, f"sketch {os.fspath(path)!r}")

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
        max_drawings: int | None = None,
    ) -> torch.Tensor:
        """
        The sketches of `sketch` one after another, groups joined: float32 `[B, 1, height, width]` in [-1, 1], on the
        CPU whatever device a tensor came from.

        Arguments, rules and errors are those of [`~SketchProcessor.preprocess_groups`].
        """
        groups = self.preprocess_groups(
            sketch,
            height,
            width,
            invert=invert,
            threshold=threshold,
            fit=fit,
            resize_mode=resize_mode,
            max_drawings=max_drawings,
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
        max_drawings: int | None = None,
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
                An `.svg` file or a [`VectorSketch`] is one drawing, an `.ndjson` file of Quick, Draw! is a batch of them. An
                SVG is read as lines if it is plain strokes, and otherwise as the picture that a browser shows of it.
            height, width (`int`, *optional*):
                Size of the output in pixels, in [8, 4096]; `resolution` by default.
            invert, threshold, fit, resize_mode (*optional*):
                Override the configuration for this call.
            max_drawings (`int`, *optional*):
                Read no more than the first so many drawings of a file or an array that holds several.

        Raises:
            `ValueError`: naming the file or the index, if a sketch cannot be read, has the wrong type, shape or
            values, is too large, or holds no drawing (blank, all dark, or 0 everywhere, which means "no sketch").
        """
        config: Any = self.config
        options = SketchOptions(
            size=(config.resolution if height is None else height, config.resolution if width is None else width),
            threshold=config.threshold if threshold is None else threshold,
            invert=config.invert if invert is None else invert,
            fit=config.fit if fit is None else fit,
            resize_mode=config.resize_mode if resize_mode is None else resize_mode,
            margin=config.margin,
            line_width=config.line_width,
        )
        check_options(options)
        groups = _group_sketches(sketch, max_drawings)
        for item in itertools.chain(*groups):
            check_given_image(item)

        inverted: list[str] = []
        results = [torch.stack([_preprocess_item(item, options, inverted) for item in group]) for group in groups]
        if inverted:
            logger.warning(
                f"Light strokes on dark were found and inverted in {', '.join(inverted)}. Pass `invert=True` to"
                " confirm, or `invert=False` if the dark parts are the strokes."
            )
        return results


def _preprocess_item(item: GivenImage, options: SketchOptions, inverted: list[str]) -> torch.Tensor:
    """`[1, H, W]`; the name is added to `inverted` if light strokes on dark were detected, not asked for."""
    if isinstance(item.value, LineDrawing):
        mask = item.value.rasterize(TRACE_SCALE * max(options.size), options.fit)
        # A line has no pixels: nothing that it spans is too small to be magnified.
        page, factor = np.array(mask.shape), 1 / MIN_SOURCE_EXTENT
        if not mask.any():
            raise ValueError(f"{item.name} holds no drawing: its lines lie outside of its page.")
    else:
        gray = _brightness(item, options)
        check_not_uniform(gray, item.name)
        invert, sheet = options.invert, None if options.invert else find_sheet(gray)
        if invert is None:
            invert = sheet is None and is_light_on_dark(gray)
            inverted += [item.name] if invert else []
        if _in_convention(item, options.size):
            sketch = item.value.detach().to("cpu", torch.float32).reshape(1, *options.size).clamp(-1, 1)
            return -sketch if invert else sketch
        if sheet is not None:
            gray, region = keep_sheet(gray, sheet)
            mask, page, factor = trace(gray, options, item.name, region)
        else:
            mask, page, factor = trace(without_surround(255 - gray if invert else gray), options, item.name)
    width = max(MIN_LINE_WIDTH, (options.line_width or 0.0) * min(options.size))
    scale, _ = place_drawing(mask, page, factor, options)
    lines = center_lines(mask, gap=width / scale.max())
    placement = place_drawing(lines, page, factor, options)
    coverage = draw_lines(lines, options.size, placement, width)
    if options.line_width is None:
        coverage = np.maximum(coverage, draw_lines(mask, options.size, placement, 0.0))
    sketch = 1 - 2 * np.clip(_LINE_GAIN * coverage, 0, 1)
    return torch.from_numpy(sketch.astype(np.float32))[None]


def _brightness(item: GivenImage, options: SketchOptions) -> np.ndarray:
    """`[H, W]` uint8; what a drawing has that is not in it is logged as a warning."""
    if not isinstance(item.value, PictureDrawing):
        return to_gray(item, options.invert)
    try:
        gray, left_out = item.value.draw(close=options.fit == "content")
    except ValueError as error:
        raise ValueError(f"{item.name} cannot be used: {error}") from error
    if left_out:
        logger.warning(f"{item.name} was read without {', '.join(left_out)}: save it as PNG if that belongs to it.")
    return gray


def _group_sketches(sketch: SketchInput, max_drawings: int | None = None) -> list[list[GivenImage]]:
    """One list of items per result."""
    if not isinstance(sketch, (list, tuple)):
        if _is_vector_file(sketch):
            return [[item] for item in _read_vector_file(sketch, "sketch {}", max_drawings)]
        if _is_batch(sketch):
            return [[item] for item in split_batch(sketch, "sketch {}", max_drawings)]
        return [[make_given_image(sketch, "sketch 0")]]
    if len(sketch) == 0:
        raise ValueError("`sketch` is an empty list; pass at least one drawing, or `None` for none.")
    groups = []
    for i, entry in enumerate(sketch):
        if _is_vector_file(entry):
            groups.append(_read_vector_file(entry, f"sketch {i}, drawing {{}}", max_drawings))
        elif _is_batch(entry):
            groups.append(split_batch(entry, f"sketch {i}, drawing {{}}", max_drawings))
        elif isinstance(entry, (list, tuple)):
            if len(entry) == 0:
                raise ValueError(f"sketch {i} is an empty list; every result needs at least one drawing.")
            groups.append([make_given_image(value, f"sketch {i}, drawing {k}") for k, value in enumerate(entry)])
        else:
            groups.append([make_given_image(entry, f"sketch {i}")])
    return groups


def _is_vector_file(value: Any) -> TypeGuard[str | os.PathLike]:
    return isinstance(value, (str, os.PathLike)) and os.fspath(value).lower().endswith(_VECTOR_SUFFIXES)


def _read_vector_file(path: str | os.PathLike, name: str, max_drawings: int | None) -> list[GivenImage]:
    from diffsketching_pipeline.images.vector_sketch import read_vector_sketches

    # An address is refused here.
    first = make_given_image(path, name.format(0)).name
    try:
        values = read_vector_sketches(path, max_drawings)
    except ValueError as error:
        raise ValueError(f"{first} cannot be used: {error}") from error
    return [GivenImage(value, name_of_file(path, name.format(i))) for i, value in enumerate(values)]


def _is_batch(value: Any) -> TypeGuard[np.ndarray | torch.Tensor]:
    return is_array(value) and value.ndim == 4


def _in_convention(item: GivenImage, size: tuple[int, int]) -> bool:
    return (
        isinstance(item.value, torch.Tensor) and item.signed is True and tuple(item.value.shape) in (size, (1, *size))
    )
