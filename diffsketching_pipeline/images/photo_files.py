# SPDX-License-Identifier: Apache-2.0
"""Files of photos, in one folder per class."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from diffsketching_pipeline.splits import normalize_name


MAX_SQUASH = 4 / 3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises for a file that is damaged or no image."""


def decode_photo(content: bytes) -> Image.Image:
    """The upright RGB photo of an image file; `OSError` where it is damaged."""
    with Image.open(io.BytesIO(content)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def list_images(root: Path, split: str) -> tuple[list[Path], list[str]]:
    """Image files of `root/split/<class>/` in a fixed order, and the class names of the whole set."""
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"`root` must hold a folder {split!r} with a folder of photos per class, but it has none.")
    class_root = root / "train" if (root / "train").is_dir() else folder
    class_names, names = (
        sorted({normalize_name(path.name) for path in parent.iterdir() if path.is_dir()})
        for parent in (class_root, folder)
    )
    unknown = sorted(set(names) - set(class_names))
    if unknown:
        raise ValueError(f"`split` {split!r} has classes that the training photos lack: {', '.join(unknown)}.")
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"`root` has no images under {folder}/<class>/ ({', '.join(IMAGE_SUFFIXES)}).")
    return files, class_names
