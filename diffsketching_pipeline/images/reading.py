# SPDX-License-Identifier: Apache-2.0
"""Reads photos, masks and pictures of drawings that anybody may have made: limits, formats, types and ranges."""

import math
import numbers
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage

from diffsketching_pipeline.images.surround import thumbnail


# A file is judged by its header, before anything is decoded.
MAX_SKETCH_PIXELS = 64_000_000
MAX_SKETCH_SIDE = 16_384
# Raster formats only: Pillow hands others (EPS, say) to outside programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
# A drawing of more pixels is made smaller before it is traced: each step after it takes several times the memory.
_MAX_TRACED_PIXELS = 4096 * 4096
# Rows of the smaller picture that are made at a time.
_STRIP = 16
# Scans of a progressive JPEG, and pixels that an animation has in all its frames.
_MAX_SCANS = 100
_MAX_ANIMATION = 200_000_000
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# Decoders of these hold a picture several times over: they get this part of the pixels. So do scans of a JPEG.
_PARTS = {"WEBP": 4, "AVIF": 4}
_PARTS_OF_SCANS = 2
# Grey levels between the darkest and the lightest strokes from which on they are of several colours.
_SEVERAL_COLORS = 96
# What is not the path of a file. A drive of Windows has one letter; `pathlib` drops one of two slashes.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)
# Characters of a path that a message repeats.
_MAX_SHOWN = 300
_MEAN_OF_CHANNELS = (1 / 3, 1 / 3, 1 / 3, 0)


@runtime_checkable
class LineDrawing(Protocol):
    """A drawing as lines, [`VectorSketch`]; known by its method, so that what reads no files of vectors needs no class."""

    def rasterize(self, cells: int, fit: str) -> np.ndarray:
        """See [`VectorSketch.rasterize`]."""


@runtime_checkable
class PictureDrawing(Protocol):
    """A file of vectors that is more than lines, `SvgPicture`."""

    def draw(self, close: bool) -> tuple[np.ndarray, list[str]]:
        """See `SvgPicture.draw`."""


@dataclass(frozen=True)
class GivenImage:
    """A sketch as it was given. `signed`: its floats are in [-1, 1] rather than [0, 1]; `None` if it has no floats."""

    value: Any
    name: str
    signed: bool | None = None


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
    items: list[GivenImage] = []
    for i, entry in enumerate(entries):
        if is_array(entry) and entry.ndim == 4:
            items += split_batch(entry, "photo {}" if len(entries) == 1 else f"photo {i}, {{}}")
        else:
            items.append(make_given_image(entry, f"photo {i}"))
    return torch.stack([_preprocess_photo(item, (height, width)) for item in items])


def _preprocess_photo(item: GivenImage, size: tuple[int, int]) -> torch.Tensor:
    if item.signed is None:
        if is_array(item.value):
            _check_array(item)
            image = _array_to_pil(item)
        else:
            image = load_image(item.value, item.name)
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


def read_photo(image: Any, name: str) -> Image.Image:
    """
    One photo at its own size, upright, as 8-bit RGB, or RGBA where it has transparency.

    Args:
        image (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Arrays `[H, W, C]` and tensors `[C, H, W]`, C = 1, 3 or 4: uint8, or floats in [-1, 1] or [0, 1].

    Raises:
        ValueError: naming the photo that cannot be read, is empty or too large, or has another type or shape.
    """
    item = make_given_image(image, name)
    if not is_array(item.value):
        return _to_rgb_or_rgba(load_image(item.value, item.name), item.name)
    # Unlike a drawing, a photo or a mask may be 0 everywhere.
    _check_array(item, may_be_zero=True)
    return _to_rgb_or_rgba(_array_to_pil(item), item.name)


def preprocess_mask(mask: Any, name: str) -> Image.Image:
    """
    A mask as 8-bit grey at its own size: white is inside, and what is transparent is black.

    Args:
        mask (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Arrays and tensors as for [`read_photo`], or without channels; also bool.

    Raises:
        ValueError: naming the mask that cannot be read, or has another type or shape.
    """
    opened = read_photo(mask, name)
    if opened.mode == "RGBA":
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "black"), opened)
    return opened.convert("L")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB, what is transparent laid on white."""
    image = _to_rgb_or_rgba(image, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_rgb_or_rgba(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB, or RGBA where it has transparency."""
    if _is_wide(image):
        values = np.asarray(image)
        gray, transparent = Image.fromarray(_scale_to_uint8(values, name)), image.info.get("transparency")
        if transparent is not None:
            # Of a grey PNG one level, before it is scaled.
            gray.putalpha(Image.fromarray(255 * (values != transparent).astype(np.uint8)))
        image = gray
    return _convert(image, "RGBA" if image.has_transparency_data else "RGB", name)


def _convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode!r}; convert it to RGB. ({error})") from error


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """Return whether a value is a number of that kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_array(value: Any) -> TypeGuard[np.ndarray | torch.Tensor]:
    return isinstance(value, (np.ndarray, torch.Tensor))


def make_given_image(value: Any, name: str) -> GivenImage:
    if isinstance(value, (str, os.PathLike)):
        name = name_of_file(value, name)
        if _ADDRESS.match(os.fspath(value)) and not os.path.exists(value):
            raise ValueError(f"{name} is an address, not a file: download it first, and pass the file's path.")
        return GivenImage(value, name)
    if isinstance(value, Image.Image):
        path = getattr(value, "filename", "")
        return GivenImage(value, name_of_file(path, name) if path else name)
    if isinstance(value, LineDrawing):
        return GivenImage(value, name)
    if is_array(value):
        return GivenImage(value[0] if value.ndim == 4 and value.shape[0] == 1 else value, name, _is_signed(value))
    raise ValueError(
        f"{name} has to be a path, PIL image, NumPy array or tensor (or a list of these) but is of type"
        f" {type(value).__name__}."
    )


def name_of_file(path: Any, name: str) -> str:
    text = os.fspath(path)
    return f"{name} ({text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'!r})"


def split_batch(batch: np.ndarray | torch.Tensor, name: str, max_drawings: int | None = None) -> list[GivenImage]:
    if batch.shape[0] == 0:
        raise ValueError(f"{name.format(0)} does not exist: the batch has shape {list(batch.shape)}.")
    signed = _is_signed(batch)
    return [GivenImage(value, name.format(i), signed) for i, value in enumerate(batch[:max_drawings])]


def _is_signed(value: np.ndarray | torch.Tensor) -> bool | None:
    if isinstance(value, torch.Tensor):
        is_float = value.is_floating_point()
    else:
        is_float = np.issubdtype(value.dtype, np.floating)
    return bool((value < 0).any()) if is_float else None


def check_given_image(item: GivenImage) -> None:
    if isinstance(item.value, (str, os.PathLike)):
        with _open_image(item.value, item.name) as image:
            _check_dimensions(image.size, item.name, _max_pixels(image))
    elif isinstance(item.value, Image.Image):
        _check_dimensions(item.value.size, item.name)
    elif is_array(item.value):
        _check_array(item)


def _max_pixels(image: Image.Image | None = None) -> int:
    """Return how many pixels a file may have. Pillow's own limit holds, too, where it is the lower one."""
    parts = 1
    if image is not None:
        parts = _PARTS.get(image.format or "", _PARTS_OF_SCANS if image.info.get("progressive") else 1)
    return min(MAX_SKETCH_PIXELS // parts, 2 * (Image.MAX_IMAGE_PIXELS or MAX_SKETCH_PIXELS))


def _check_dimensions(size: tuple[int, int], name: str, max_pixels: int = MAX_SKETCH_PIXELS) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has a side of 0 pixels: {width} x {height}.")
    if width * height > max_pixels or max(size) > MAX_SKETCH_SIDE:
        raise ValueError(_too_large(name, f"{width} x {height} pixels", max_pixels))


def _too_large(name: str, what: str, max_pixels: int) -> str:
    return (
        f"{name} is too large: {what}. The limit is {max_pixels // 10**6} megapixels in a file of its kind and"
        f" {MAX_SKETCH_SIDE} pixels a side; make it smaller."
    )


def _check_array(item: GivenImage, may_be_zero: bool = False) -> None:
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
    if low == high == 0 and not may_be_zero:
        raise ValueError(f"{item.name} is 0 everywhere, which stands for no sketch; pass `sketch=None` for that.")


def _channels_last(item: GivenImage) -> np.ndarray | torch.Tensor:
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


def _is_wide(image: Image.Image) -> bool:
    """Return whether a pixel has more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _open_image(path: str | os.PathLike, name: str) -> Image.Image:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            # A pipe or a device may be without an end.
            raise ValueError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(Path(path), formats=formats)
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, "it may be a decompression bomb", _max_pixels())) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image; save it as PNG or JPEG. ({error})") from error


def load_image(source: str | os.PathLike | Image.Image, name: str, max_pixels: int = MAX_SKETCH_PIXELS) -> Image.Image:
    """Decoded and upright, of an animation the frame that shows most; one of more than `max_pixels` is made smaller."""
    image = source if isinstance(source, Image.Image) else _open_image(source, name)
    try:
        _check_dimensions(image.size, name, MAX_SKETCH_PIXELS if image is source else _max_pixels(image))
        if image is source:
            return _decode(image, name)
        _check_passes(image, source, name)
        with _decoding(name):
            frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format in _ANIMATED:
            return _frame_that_shows_most(image, name)
        factor = _reduction(image, max_pixels)
        if factor > 1:
            # A JPEG is decoded at the smaller size.
            image.draft(None, (image.width // factor, image.height // factor))
        small = _reduce(image, max_pixels, name)
        return _decode(small, name, is_ours=small is not image)
    finally:
        if image is not source:
            image.close()


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Decoders raise whatever they like on damaged data."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated; save it again. ({error})") from error


def _check_passes(image: Image.Image, path: Any, name: str) -> None:
    """Refuse a JPEG of very many scans, each of which is decoded over the whole picture."""
    if image.format != "JPEG" or not image.info.get("progressive"):
        return
    with open(path, "rb") as file:
        # In entropy-coded data such a byte is followed by another.
        scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(1 << 20), b""))
    if scans > _MAX_SCANS:
        raise ValueError(f"{name} cannot be read as an image: it has {scans} scans; save it as PNG.")


def _frame_that_shows_most(image: Image.Image, name: str) -> Image.Image:
    """
    The first frame of an animation, or the last one where more is to be seen, as in a drawing's time-lapse.

    Raises:
        ValueError: if there are too many frames to come to the last one.
    """
    frames = getattr(image, "n_frames", 1)
    if frames * image.width * image.height > _MAX_ANIMATION:
        raise ValueError(
            f"{name} is an animation of {frames} frames, too long to be read: save the frame that is meant as PNG."
        )
    shown = []
    for number in (0, frames - 1):
        with _decoding(name):
            image.seek(number)
        frame = _decode(image, name).copy()
        levels = np.asarray(_to_rgb(frame, name).convert("L").reduce(max(1, max(frame.size) // 256)), dtype=np.float32)
        shown.append((float(np.abs(levels - np.median(levels)).mean()), frame))
    return shown[1][1] if shown[1][0] > 1.2 * shown[0][0] else shown[0][1]


def _reduction(image: Image.Image, max_pixels: int) -> int:
    """By how much both sides have to be divided for no more than so many pixels."""
    return math.ceil(math.sqrt(image.width * image.height / max_pixels))


def _reduce(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    """Made smaller by averages before anything else is done with it, where it has more than so many pixels."""
    if _reduction(image, max_pixels) <= 1:
        return image
    with _decoding(name):
        image.load()
        # Colour and alpha take four times the memory of brightness alone, beside the whole picture.
        factor = _reduction(image, max_pixels // 2 if image.has_transparency_data else max_pixels)
        exif = image.getexif()
        if image.mode in ("1", "P", "PA", "LA", "RGB", "RGBA") or image.mode.startswith("I;"):
            levels = "RGBA" if image.has_transparency_data else "I" if image.mode.startswith("I;") else "RGB"
            levels = "L" if image.mode == "1" else levels
            # In strips, which bounds what the pixels take in another mode, or multiplied with their alpha.
            rows = _STRIP * factor
            boxes = [(0, top, image.width, min(image.height, top + rows)) for top in range(0, image.height, rows)]
            small = Image.new(
                "L" if levels == "RGB" else levels, (-(-image.width // factor), -(-image.height // factor))
            )
            for number, box in enumerate(boxes):
                strip = image.crop(box).convert(levels).reduce(factor)
                small.paste(strip.convert("L", _MEAN_OF_CHANNELS) if levels == "RGB" else strip, (0, _STRIP * number))
        else:
            small = image.reduce(factor)
    small.getexif().update(exif)
    return small


def _decode(image: Image.Image, name: str, is_ours: bool = False) -> Image.Image:
    """Decoded and upright: the image itself if it `is_ours`, else a copy."""
    with _decoding(name):
        image.load()
        if is_ours:
            ImageOps.exif_transpose(image, in_place=True)
            return image
        return ImageOps.exif_transpose(image)


def to_gray(item: GivenImage, invert: bool | None) -> np.ndarray:
    """`[H, W]` uint8 brightness, transparency laid on paper."""
    image = _array_to_pil(item) if is_array(item.value) else load_image(item.value, item.name, _MAX_TRACED_PIXELS)
    if _is_wide(image):
        return _scale_to_uint8(np.asarray(image), item.name)
    has_alpha = image.has_transparency_data
    if image.mode not in ("1", "L") or has_alpha:
        image = _convert(image, "RGBA" if has_alpha else "RGB", item.name)
        if has_alpha:
            return _flatten_alpha(image, invert, item.name)
        image = image.convert("L", _MEAN_OF_CHANNELS)
    return np.asarray(image.convert("L"))


def _array_to_pil(item: GivenImage) -> Image.Image:
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


def _are_strokes(alpha: np.ndarray) -> bool:
    """Return whether what is opaque is thin lines on a page that is transparent elsewhere, and no filled shape."""
    opaque = thumbnail(alpha, 512) >= 128
    rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
    if not len(rows) or opaque.mean() > 0.5:
        return False
    depth = ndimage.distance_transform_edt(np.pad(opaque, 1)).max()
    return bool(depth < 0.04 * (1 + max(np.ptp(rows), np.ptp(columns))))


def _flatten_alpha(image: Image.Image, invert: bool | None, name: str) -> np.ndarray:
    """Transparency becomes paper: white, or black under strokes that are all light."""
    alpha = np.asarray(image.getchannel("A"))
    gray = np.asarray(image.convert("RGB").convert("L", _MEAN_OF_CHANNELS))
    if alpha.max() == 0:
        raise ValueError(f"{name} holds no drawing: it is fully transparent.")
    if invert is None:
        opaque = gray[alpha >= 0.9 * alpha.max()]
        if _are_strokes(alpha) and np.quantile(opaque, 0.98) - np.quantile(opaque, 0.02) > _SEVERAL_COLORS:
            # Whatever paper they were laid on, some of the strokes would be lost on it.
            return 255 - alpha
        invert = bool((opaque < 128).mean() < 0.001)
    # Rounded, in the least of types that holds it: there may be many pixels.
    laid = alpha.astype(np.uint16) * gray + (0 if invert else 255) * (255 - alpha).astype(np.uint16)
    return ((laid + 127) // 255).astype(np.uint8)
