# SPDX-License-Identifier: Apache-2.0
"""Files of photos, in one folder per class."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from diffsketching_pipeline.splits import normalize_name, validation_names


MAX_SQUASH = 4 / 3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises for a file that is damaged or no image."""


def decode_photo(content: bytes) -> Image.Image:
    """The upright RGB photo of an image file; `OSError` where it is damaged."""
    with Image.open(io.BytesIO(content)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def list_images(root: Path, split: str) -> tuple[list[Path], list[str]]:
    """
    List the image files of one split, in a fixed order, and the class names of the whole set.

    Args:
        root: holds `train/<class>/` and the same of other splits; or `photo/<class>/`, as Sketchy does, or `<class>/` alone,
            where `train` and `validation` are told apart by the hash of a photo's path (see [`validation_names`]).
        split: which.

    Raises:
        ValueError: there are no such folders, or no photos in them.
    """
    if not (root / split).is_dir() and not (root / "train").is_dir():
        return _split_by_hash(root / "photo" if (root / "photo").is_dir() else root, split)
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
    files = _images_of(folder)
    if not files:
        raise ValueError(f"`root` has no images under {folder}/<class>/ ({', '.join(IMAGE_SUFFIXES)}).")
    return files, class_names


def _images_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _split_by_hash(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    files = _images_of(folder)
    if len(files) < 2:
        raise ValueError(
            f"`root` must hold at least two photos, one of them to validate, as <class>/<photo>, train/<class>/<photo> or "
            f"photo/<class>/<photo> ({', '.join(IMAGE_SUFFIXES)}), but {folder} holds {len(files)}."
        )
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    validation = validation_names(names)
    is_validation = split == "validation"
    chosen = [file for file, name in zip(files, names, strict=True) if (name in validation) == is_validation]
    return chosen, sorted({normalize_name(file.parent.name) for file in files})
