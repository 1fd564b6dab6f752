# SPDX-License-Identifier: Apache-2.0
"""The material that `evaluate.py` scores: drawings, sets of images and the files they come from."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm.auto import tqdm

from diffsketching_pipeline.files import staged_file, write_file
from diffsketching_pipeline.images.photo_files import IMAGE_ERRORS, IMAGE_SUFFIXES, MAX_SQUASH
from diffsketching_pipeline.splits import in_first_half, normalize_name


class Drawing(NamedTuple):
    """A drawing by name and class; `position` is its place among all drawings of the folder, whatever the split."""

    name: str
    label: str
    path: Path
    position: int


@dataclass
class ImageSet:
    """
    Images that are scored together, and what the evaluation network makes of them.

    Attributes:
        name: the system's name.
        pixels: uint8 `[N, 3, R, R]` at the evaluation network's resolution.
        labels: class of each image.
        groups: int `[N]`, what the bootstrap resamples: the drawing's position, or each photo by itself.
        files: where the images lie; none for noise.
        probabilities, features, mirrored_features: float32 `[N, num_classes]` and `[N, D]`.
        given_labels: the class each image was generated with, where that is known.
        costs: what each image took to make (see `systems.CostMeter`), where its file says so.
        memory: peak memory of a batch (see `systems.measure_memory`), where it was measured.
        conditions: what belongs into the name of every number about them.
    """

    name: str
    pixels: Tensor
    labels: list[str]
    groups: np.ndarray
    files: list[Path]
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    mirrored_features: Tensor = field(default_factory=lambda: torch.empty(0))
    given_labels: list[str | None] = field(default_factory=list)
    costs: list[dict[str, Any] | None] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    conditions: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "ImageSet":
        """Some of the images, under another name."""
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        tensors = {
            key: value[index] if len(value) else value
            for key in ("pixels", "probabilities", "features", "mirrored_features")
            for value in [getattr(self, key)]
        }
        labels, files = [self.labels[i] for i in indices], [self.files[i] for i in indices if self.files]
        return replace(self, name=name, labels=labels, files=files, groups=self.groups[index.numpy()], **tensors)

    def at(self, side: int) -> "ImageSet":
        """The images read again from their files at `side` pixels, without what a network made of them."""
        if side == self.pixels.shape[-1]:
            return self
        again = read_photos(list(zip(self.labels, self.files, strict=True)), self.name, side)
        nothing = torch.empty(0)
        return replace(self, pixels=again.pixels, probabilities=nothing, features=nothing, mirrored_features=nothing)

    def image(self, index: int) -> Image.Image:
        """The image as it was stored, upright."""
        if self.files:
            return open_image(self.files[index])
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image; `ValueError` naming the file where that fails."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or delete it.") from error


def squash(image: Image.Image, resolution: int) -> Image.Image:
    """The central part with sides of at most 4:3, resized to a square: what the training data look like."""
    width, height = image.size
    box_width, box_height = min(width, MAX_SQUASH * height), min(height, MAX_SQUASH * width)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def list_class_folders(folder: Path, name: str) -> list[tuple[str, Path]]:
    """`(class, file)` of the images of `folder/<class>/`, sorted; `ValueError` where there is none."""
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"`{name}` must hold images in one folder per class, but {str(folder)!r} holds none.")
    return [(normalize_name(path.parent.name), path) for path in files]


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings of a folder in a fixed order; `ValueError` for two of the same name in a class."""
    drawings = [
        Drawing(normalize_name(path.stem), label, path, i)
        for i, (label, path) in enumerate(list_class_folders(folder, "sketches"))
    ]
    twice = [key for key, count in Counter((d.label, d.name) for d in drawings).items() if count > 1]
    if twice:
        raise ValueError(f"`sketches` has two files for the drawing {'/'.join(twice[0])!r}: keep one.")
    return drawings


def select_drawings(drawings: list[Drawing], split: str) -> list[Drawing]:
    """The drawings of one half, told apart as `train_encoders.py` does; `ValueError` where there is none."""
    selected = [d for d in drawings if split == "all" or in_first_half(d.name) == (split == "tune")]
    if not selected:
        raise ValueError(f"`split` {split!r} has none of the {len(drawings)} drawings: use `all`.")
    return selected


def match_images(folder: Path, drawings: list[Drawing], selected: list[Drawing]) -> list[tuple[Drawing, Path]]:
    """
    Finds the images `<sketch>_<n>.png` of the selected drawings, in folders named after the class or flat.

    Raises:
        ValueError: the folder holds an image that belongs to no drawing or to several, or a drawing has no image.
    """
    by_name: dict[tuple[str | None, str], list[Drawing]] = {}
    for drawing in drawings:
        for label in (drawing.label, None):
            by_name.setdefault((label, drawing.name), []).append(drawing)
    found: list[tuple[int, int, Drawing, Path]] = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        match = re.fullmatch(r"(.+)_(\d+)", normalize_name(path.stem))
        label = None if path.parent == folder else normalize_name(path.parent.name)
        candidates = by_name.get((label, match[1]), []) if match else []
        if match is None or len(candidates) != 1:
            raise ValueError(_mismatch(path, label, len(candidates)))
        found.append((candidates[0].position, int(match[2]), candidates[0], path))
    wanted = {drawing.position for drawing in selected}
    images = [(drawing, path) for index, _, drawing, path in sorted(found) if index in wanted]
    missing = wanted - {drawing.position for drawing, _ in images}
    if missing:
        first = drawings[min(missing)]
        raise ValueError(
            f"`images` {str(folder)!r} has no image of {len(missing)} of {len(wanted)} drawings, for example"
            f" {first.label}/{first.name}_0.png."
        )
    return images


def _mismatch(path: Path, label: str | None, count: int) -> str:
    if count > 1:
        return f"`images` has {path}, which may be of {count} drawings: put images into folders named after the class."
    place = "" if label is None else f" of the class {label!r}"
    return f"`images` has {path}, which is not named `<sketch>_<n>` after any drawing{place} in `sketches`."


def check_labels(labels: Iterable[str], known: Iterable[str], name: str) -> None:
    """Raises `ValueError` for a class folder that the evaluation network does not know."""
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise ValueError(
            f"`{name}` has the classes {', '.join(unknown)}, which the `evaluator` does not know: {', '.join(known)}."
        )


def read_photos(files: list[tuple[str, Path]], name: str, resolution: int) -> ImageSet:
    """Reads photos of any size, squashed to a square."""
    pixels = torch.empty(len(files), 3, resolution, resolution, dtype=torch.uint8)
    for i, (_, path) in enumerate(tqdm(files, desc=f"Reading {name}", unit="image", leave=False)):
        pixels[i] = torch.from_numpy(np.array(squash(open_image(path), resolution))).permute(2, 0, 1)
    return ImageSet(name, pixels, [label for label, _ in files], np.arange(len(files)), [path for _, path in files])


def read_system(name: str, images: list[tuple[Drawing, Path]], resolution: int) -> ImageSet:
    """Reads the images of a system; `ValueError` for fewer than two, or for images of several sizes."""
    if len(images) < 2:
        raise ValueError(f"{name!r} has {len(images)} image: at least 2 are needed.")
    sizes: dict[tuple[int, int], Path] = {}
    given_labels, costs = [], []
    for _, path in images:
        image = open_image(path)
        sizes.setdefault(image.size, path)
        given_labels.append(image.info.get("class_label"))
        costs.append(_read_cost(image, path))
    if len(sizes) > 1:
        examples = " and ".join(f"{w} x {h} ({path})" for (w, h), path in list(sizes.items())[:2])
        raise ValueError(f"`images` of {name!r} must all have one size, but there are {examples}.")
    system = read_photos([(drawing.label, path) for drawing, path in images], name, resolution)
    system.groups = np.array([drawing.position for drawing, _ in images])
    system.given_labels, system.costs = given_labels, costs
    return system


def _read_cost(image: Image.Image, path: Path) -> dict[str, Any] | None:
    """The cost that a PNG's text chunk tells, if it does."""
    if "cost" not in image.info:
        return None
    try:
        cost = json.loads(image.info["cost"])
        return {**cost, "seconds": float(cost["seconds"]), "network_evaluations": dict(cost["network_evaluations"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has an unreadable `cost` ({error}): make it again.") from error


def save_png(image: Image.Image, path: Path, texts: dict[str, str] | None = None) -> None:
    """Writes a PNG with text chunks; it appears complete or not at all."""
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def write_text(text: str, path: Path) -> None:
    """Write a text file, and the folder that it is in; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)


def file_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def check_settings(settings: dict[str, Any], path: Path, what: str) -> None:
    """
    Writes what a folder's pictures depend on into `path`; `ValueError`, which begins with `what`, where pictures of other
    settings lie there already.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if not path.is_file():
        write_text(json.dumps(settings, indent=2) + "\n", path)
        return
    earlier = json.loads(path.read_text())
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise ValueError(f"{what} with another {', '.join(changed)}: take another folder, or delete {path.parent}.")
