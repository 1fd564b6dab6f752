# SPDX-License-Identifier: Apache-2.0
"""Photos and their drawings on the disk, keyed by what they are made of."""

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffsketching_pipeline.files import keep_file, write_file
from diffsketching_pipeline.images.contours import CONTOUR_SIZE, Box, contours_and_box, resized_to_short_side
from diffsketching_pipeline.images.photo_files import decode_photo


_CACHE_VERSION = "contours-3"
DRAWING_ARRAYS = ("contours", "width")
HED_CACHE_VERSION = "hed-contours-1"


class CachedPhoto(NamedTuple):
    """A decoded photo [h, w, 3] uint8, its drawings [N, H, W] bool (True = stroke), the box that holds the object."""

    image: np.ndarray
    contours: np.ndarray
    content_box: Box


def photo_to_keep(image: Image.Image, image_size: int) -> np.ndarray:
    """
    The pixels [h, w, 3] that are kept of a photo: a short side of `image_size`, at most four times as long.

    Above `CONTOUR_SIZE` pixels no photo is enlarged: that would cost disk and time, and add nothing.
    """
    if image_size > CONTOUR_SIZE:
        image_size = min(image_size, min(image.size))
    return np.asarray(resized_to_short_side(image, image_size, 4 * image_size))


def prepare_photo(content: bytes, image_size: int) -> CachedPhoto:
    """Decodes an image file, see `photo_to_keep`, and draws it; `OSError` where it is damaged."""
    image = decode_photo(content)
    contours, content_box = contours_and_box(image)
    return CachedPhoto(photo_to_keep(image, image_size), np.stack(contours), content_box)


def pack_contours(contours: np.ndarray) -> dict[str, Any]:
    return {"contours": np.packbits(contours, axis=-1), "width": np.asarray(contours.shape[-1])}


def unpack_contours(packed: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.unpackbits(packed["contours"], axis=-1, count=int(packed["width"])).view(bool)


def pack_photo(photo: CachedPhoto) -> dict[str, Any]:
    """Return what is kept of a photo in memory or in a file: contours with eight pixels per byte."""
    return {
        "image": photo.image,
        **pack_contours(photo.contours),
        "content_box": np.asarray(photo.content_box, dtype=np.float64),
    }


def unpack_photo(packed: Mapping[str, np.ndarray]) -> CachedPhoto:
    left, top, right, bottom = packed["content_box"].tolist()
    return CachedPhoto(packed["image"], unpack_contours(packed), (left, top, right, bottom))


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """
    Write an `.npz` file aside and rename it, so that a killed run or a second one at the same time never leaves half of it.

    Raises:
        OSError: the disk is full, or `path` may not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _npz(arrays))


def keep_arrays(path: Path, arrays: dict[str, Any]) -> Path | dict[str, Any]:
    """Write arrays to the cache and return `path`, or the arrays themselves where that fails: a run goes on without a cache."""
    return path if keep_file(path.parent.parent, path, _npz(arrays)) else arrays


def _npz(arrays: Mapping[str, Any]) -> bytes:
    content = io.BytesIO()  # a zip file that a full disk cuts off is closed with an error of its own
    np.savez(content, **arrays)
    return content.getvalue()


def is_kept(path: Path) -> bool:
    """Return whether the cache has a file, and may be looked into."""
    try:
        return path.exists()
    except OSError:
        return False


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays of these names and no others are read; None where the file is missing or damaged (it is then made again)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def cache_path(cache_dir: Path, made_with: str, content: bytes) -> Path:
    """The cache's file for what is made in the way `made_with` of a file with this content."""
    key = hashlib.sha256(made_with.encode() + content).hexdigest()[:40]
    return cache_dir / key[:2] / f"{key}.npz"


def photo_cache_path(cache_dir: Path, content: bytes, image_size: int) -> Path:
    """The cache's file for a photo, kept at a short side of `image_size`, and its classical contours."""
    # A size that no photo is enlarged to has entries of its own: see `photo_to_keep`.
    at_most = "at-most-" if image_size > CONTOUR_SIZE else ""
    return cache_path(cache_dir, f"{_CACHE_VERSION}:{at_most}{image_size}:{CONTOUR_SIZE}:", content)


def cache_photo(cache_dir: Path, content: bytes, image_size: int, contours: np.ndarray, content_box: Box) -> None:
    """Puts a photo into the cache with contours bool [N, H, W] that were made elsewhere, as if they were made of it here."""
    image = photo_to_keep(decode_photo(content), image_size)
    save_arrays(
        photo_cache_path(cache_dir, content, image_size), pack_photo(CachedPhoto(image, contours, content_box))
    )
