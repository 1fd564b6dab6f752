# SPDX-License-Identifier: Apache-2.0
"""Photos with drawings that people made of them, in the layouts that people have them in.

- Two folders, `photo` and `sketch`, matched by file name: `photo/<class>/<id>.jpg` with `sketch/<class>/<id>-<k>.png`
  (Sketchy's layout), or just `photo/<id>.jpg` with `sketch/<id>.png`.
- A dataset of the `datasets` library, local or on the Hub, with a column of photos and one of drawings.
- Webdataset shards, see `shards.py`.

A photo may have any number of drawings; each covers the photo's frame. Splits are made by photo, never by drawing.
"""

import hashlib
import io
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffsketching_pipeline import SketchProcessor
from diffsketching_pipeline.images.contours import CONTOUR_SIZE, Box, bounding_box, resized_to_short_side
from diffsketching_pipeline.images.photo_files import IMAGE_ERRORS, IMAGE_SUFFIXES, decode_photo
from diffsketching_pipeline.splits import normalize_name, validation_names
from diffsketching_pipeline.training.cache import CachedPhoto, photo_to_keep
from diffsketching_pipeline.training.dataset import PhotoSketchDataset


logger = logging.getLogger(__name__)

_PAIR_VERSION = "pair-1"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class PhotoSketchPair:
    """
    A photo and its drawings, read when they are needed.

    Attributes:
        stem: a name that no other photo has.
        label: the name of its class, or None.
        photo, sketches: return the content of an image file.
    """

    stem: str
    label: str | None
    photo: Callable[[], bytes]
    sketches: tuple[Callable[[], bytes], ...]

    @property
    def name(self) -> str:
        """The name by which a message calls it."""
        return self.stem


def split_pairs(pairs: Sequence[PhotoSketchPair]) -> dict[str, list[PhotoSketchPair]]:
    """
    `train` and `validation`, each with at least one photo.

    Raises:
        ValueError: there are fewer than two photos.
    """
    if len(pairs) < 2:
        raise ValueError(
            f"at least two photos with drawings are needed, one of them to validate, but got {len(pairs)}."
        )
    chosen = validation_names([pair.stem for pair in pairs])
    return {
        "train": [pair for pair in pairs if pair.stem not in chosen],
        "validation": [pair for pair in pairs if pair.stem in chosen],
    }


def _report(problems: dict[str, list[str]], total: int, shown: int = 10) -> None:
    """One warning per kind of problem: how many, and the first names."""
    for problem, names in problems.items():
        if names:
            rest = f" and {len(names) - shown} more" if len(names) > shown else ""
            logger.warning("%d of %d %s: %s%s", len(names), total, problem, ", ".join(sorted(names)[:shown]), rest)


def _images_by_stem(folder: Path, what: str) -> tuple[dict[str, Path], list[str]]:
    """Image files by their path without suffix, and those whose name another file has taken."""
    if not folder.is_dir():
        raise ValueError(f"the folder of {what} is missing: {folder}.")
    found: dict[str, Path] = {}
    doubled = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        stem = normalize_name(path.relative_to(folder).with_suffix("").as_posix())
        if stem in found:
            doubled.append(path.name)
        found.setdefault(stem, path)
    if not found:
        raise ValueError(f"there are no images in {folder} ({', '.join(IMAGE_SUFFIXES)}).")
    return found, doubled


def find_pair_files(photo_dir: Path, sketch_dir: Path) -> list[tuple[str, Path, list[Path]]]:
    """
    Pairs of two folders: `<name>.png` and `<name>-<k>.png` are drawings of `<name>.jpg`, in the same subfolder. Each is the
    photo's path without suffix below `photo_dir`, its file and those of its drawings.

    What has no partner, and photos that are there twice (under two names, by content, or with two suffixes), is left
    out, counted and named in a warning.

    Raises:
        ValueError: a folder is missing, has no images or is the root of several sets of them, or nothing matches.
    """
    for folder, what in ((photo_dir, "photos"), (sketch_dir, "drawings")):
        renderings = sorted(path.name for path in folder.glob("tx_*") if path.is_dir())
        if renderings:
            raise ValueError(
                f"{folder} holds Sketchy's {what} in {len(renderings)} renderings, {', '.join(renderings)}: choose one of them, "
                f"such as `{folder / renderings[0]}` for `--{'photo' if what == 'photos' else 'sketch'}_dir` of "
                "prepare_sketchy.py."
            )
    photos, doubled_photos = _images_by_stem(photo_dir, "photos")
    sketches, doubled_sketches = _images_by_stem(sketch_dir, "drawings")
    drawings, unmatched_sketches = _match_stems(photos, sketches)

    pairs, copies, seen = [], [], set()
    for stem in sorted(drawings):
        digest = hashlib.sha256(photos[stem].read_bytes()).digest()
        if digest in seen:
            copies.append(stem)
            continue
        seen.add(digest)
        pairs.append((stem, photos[stem], drawings[stem]))
    _report(
        {
            "photos have no drawing, left out": [stem for stem in photos if stem not in drawings],
            "photos share their name with another, left out": doubled_photos,
            "photos are copies of another, left out with their drawings": copies,
        },
        len(photos),
    )
    _report(
        {
            "drawings have no photo, left out": unmatched_sketches,
            "drawings share their name with another, left out": doubled_sketches,
        },
        len(sketches),
    )
    if not pairs:
        raise ValueError(
            f"no drawing in {sketch_dir} has the name of a photo in {photo_dir}: `dog/17.jpg` goes with `dog/17.png` or "
            "`dog/17-1.png`."
        )
    return pairs


def _match_stems(photos: Mapping[str, Path], sketches: Mapping[str, Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """The drawings of each photo that has any, and the stems of drawings without a photo."""
    drawings: dict[str, list[Path]] = defaultdict(list)
    unmatched = []
    for stem, path in sketches.items():
        numbered = re.fullmatch(r"(.+)-\d+", stem)
        owner = stem if stem in photos else numbered[1] if numbered and numbered[1] in photos else None
        if owner is None:
            unmatched.append(stem)
        else:
            drawings[owner].append(path)
    return drawings, unmatched


def find_pairs(photo_dir: Path, sketch_dir: Path) -> list[PhotoSketchPair]:
    """The pairs of [`find_pair_files`]; the first subfolder, if there is one, is the class."""
    return [
        PhotoSketchPair(
            stem,
            stem.split("/")[0] if "/" in stem else None,
            photo.read_bytes,
            tuple(sketch.read_bytes for sketch in sketches),
        )
        for stem, photo, sketches in find_pair_files(photo_dir, sketch_dir)
    ]


def _encoded(value: Any) -> bytes:
    """The file behind one value of an undecoded image column."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _read_cell(rows: Any, row: int, column: str, position: int | None = None) -> bytes:
    value = rows[row][column]
    return _encoded(value if position is None else value[position])


def _undecoded(rows: Any, argument: str, column: str, may_be_list: bool) -> Any:
    """`rows` with a column of images left as files; `ValueError` where the column is missing or holds something else."""
    import datasets

    list_type = getattr(datasets, "List", datasets.Sequence)  # the name until datasets 3 and from 4 on
    if column not in rows.column_names:
        raise ValueError(f"`{argument}` must be one of the columns {rows.column_names}, but is {column!r}.")
    feature, encoded = rows.features[column], datasets.Image(decode=False)
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, encoded)
    if may_be_list and isinstance(feature, list_type) and isinstance(feature.feature, datasets.Image):
        return rows.cast_column(column, list_type(encoded))
    raise ValueError(f"`{argument}` must be a column of images, but {column!r} holds {feature}.")


def _class_names(rows: Any, column: str | None) -> list[str | None]:
    """The class of each row, None where the column is not there."""
    if column is None or column not in rows.column_names:
        return [None] * len(rows)
    feature = rows.features[column]
    # `datasets` writes -1 for a `ClassLabel` that is missing, and pandas NaN, which is not equal to itself.
    missing = [value is None or value == -1 or value != value or str(value).strip() == "" for value in rows[column]]
    to_name = feature.int2str if hasattr(feature, "int2str") else str
    return [
        None if is_missing else normalize_name(to_name(value))
        for value, is_missing in zip(rows[column], missing, strict=True)
    ]


def load_dataset_pairs(
    name_or_path: str,
    image_column: str = "image",
    conditioning_image_column: str = "sketch",
    label_column: str | None = "label",
    split: str = "train",
    cache_dir: str | None = None,
) -> list[PhotoSketchPair]:
    """
    Pairs of a dataset that `datasets.load_dataset` loads.

    Args:
        name_or_path: a dataset on the Hub, or a folder.
        image_column: photos.
        conditioning_image_column: drawings, one or a list of them per row; rows with the same photo are joined.
        label_column:
            class names or a `ClassLabel`; None, a column that is not there, or a row without a value mean no class.
        split: which split is read; validation photos are taken from it by hash.
        cache_dir: where `datasets` keeps what it downloads.

    Raises:
        ValueError: a column is missing or is not one of images, or no photo has a drawing.
    """
    import datasets

    rows = datasets.load_dataset(name_or_path, split=split, cache_dir=cache_dir)
    rows = _undecoded(rows, "image_column", image_column, may_be_list=False)
    rows = _undecoded(rows, "conditioning_image_column", conditioning_image_column, may_be_list=True)
    labels = _class_names(rows, label_column)
    by_photo: dict[str, list[int]] = defaultdict(list)
    without_photo = []
    for row, value in enumerate(rows.select_columns([image_column])):
        try:
            by_photo[hashlib.sha256(_encoded(value[image_column])).hexdigest()].append(row)
        except (OSError, TypeError):
            without_photo.append(f"row {row}")
    _report({"rows have no photo, left out": without_photo}, len(rows))

    pairs = []
    for digest, members in by_photo.items():
        sketches = []
        for row in members:
            value = rows[row][conditioning_image_column]
            cells = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            positions = [position for position, cell in cells if cell is not None]
            sketches += [partial(_read_cell, rows, row, conditioning_image_column, k) for k in positions]
        if sketches:
            photo = partial(_read_cell, rows, members[0], image_column)
            label = next((labels[row] for row in members if labels[row] is not None), None)
            pairs.append(PhotoSketchPair(digest[:16], label, photo, tuple(sketches)))
    if len(pairs) < len(by_photo):
        logger.warning("%d of %d photos have no drawing, left out", len(by_photo) - len(pairs), len(by_photo))
    if not pairs:
        raise ValueError(f"no photo of {name_or_path!r} has a drawing in the column {conditioning_image_column!r}.")
    return pairs


class PairedPhotoDataset(PhotoSketchDataset):
    """
    A `PhotoSketchDataset` of [`PhotoSketchPair`]s: in the place of contours it has the drawings, traced to lines of one
    width on the photo's frame by `SketchProcessor`.

    Args:
        pairs: the photos of one split. Photos and drawings that cannot be decoded, and photos that have no drawing left,
            are left out, counted and named once.
        class_names: all classes, in the order of their indices.
        null_class: the index of photos without a class; where there is none they are left out and named.

    Raises:
        ValueError: a class that is not among `class_names`, no photo that has a class where there is no `null_class`, or no
            pair that can be read.
    """

    def __init__(
        self,
        pairs: Sequence[PhotoSketchPair],
        class_names: Sequence[str],
        resolution: int = 64,
        seed: int = 0,
        train: bool = True,
        cache_dir: str | Path | None = None,
        *,
        null_class: int | None = None,
        split: str = "train",
        max_samples: int | None = None,
    ):
        unknown = sorted({pair.label for pair in pairs if pair.label is not None} - set(class_names))
        if unknown:
            raise ValueError(
                f"the data has classes that the model lacks: {', '.join(unknown)}. It has {list(class_names)}."
            )
        without_class = [pair.stem for pair in pairs if pair.label is None and null_class is None]
        if without_class:
            if len(without_class) == len(pairs):
                raise ValueError("the photos have no class, and the model has no 'no class': sort them into folders.")
            _report({f"photos of {split} have no class, which the model needs, left out": without_class}, len(pairs))
            pairs = [pair for pair in pairs if pair.label is not None]
        self.null_class = null_class
        self.class_names = list(class_names)
        self.sketch_processor = SketchProcessor(resolution=CONTOUR_SIZE, fit="page", resize_mode="stretch")
        self.unreadable_sketches: list[str] = []
        super().__init__(pairs, split, resolution, seed, train, cache_dir, max_samples=max_samples)  # type: ignore[arg-type]
        total = sum(len(pair.sketches) for pair in pairs)
        _report({f"drawings of {split} unreadable or empty, left out": self.unreadable_sketches}, total)

    def _list(self, root: Any, split: str) -> tuple[list[PhotoSketchPair], list[str]]:
        return list(root), self.class_names

    def _class_label(self, file: PhotoSketchPair) -> int:
        return int(self.null_class) if file.label is None else self.label2id[file.label]  # type: ignore[arg-type]

    def _read(self, file: PhotoSketchPair) -> bytes:
        contents = [_PAIR_VERSION.encode(), file.photo(), *(read() for read in file.sketches)]
        return b"".join(len(content).to_bytes(_LENGTH_BYTES, "big") + content for content in contents)

    def _cache_entry(self, file: PhotoSketchPair) -> Path | dict[str, np.ndarray]:
        self._reading = file.stem
        return super()._cache_entry(file)

    def _make(self, content: bytes) -> CachedPhoto:
        parts = []
        while content:
            end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "big")
            parts.append(content[_LENGTH_BYTES:end])
            content = content[end:]
        _, photo, *sketches = parts
        image = decode_photo(photo)
        frame = resized_to_short_side(image, CONTOUR_SIZE, 4 * CONTOUR_SIZE).size
        inks = []
        for k, sketch in enumerate(sketches):
            try:
                with Image.open(io.BytesIO(sketch)) as opened:
                    drawn = self.sketch_processor.preprocess(opened, height=frame[1], width=frame[0])
            except IMAGE_ERRORS as error:
                logger.debug("%s, drawing %d: %s", self._reading, k, error)
                self.unreadable_sketches.append(f"{self._reading} (drawing {k})")
                continue
            inks.append(drawn[0, 0].numpy() < 0)
        if not inks:
            raise ValueError("it has no drawing that can be read")
        return CachedPhoto(photo_to_keep(image, self.image_size), np.stack(inks), bounding_box(np.any(inks, axis=0)))

    def _choose_contour(self, contours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return contours[rng.integers(len(contours))]


class PairReader(PairedPhotoDataset):
    """
    A reader that does what a [`PairedPhotoDataset`] does, for pairs that come one by one and are not kept.

    Args:
        class_names, resolution, null_class: see [`PairedPhotoDataset`].
    """

    def __init__(self, class_names: Sequence[str], resolution: int = 64, null_class: int | None = None):
        super().__init__((), class_names, resolution, train=False, null_class=null_class)

    def _prepare(self, files: list[Any], split: str) -> None:
        """There are none."""

    def read(self, pair: PhotoSketchPair) -> tuple[tuple[Tensor, np.ndarray, Box], int]:
        """
        The view of a pair (see [`PhotoSketchDataset.view`]) and the index of its class.

        Raises:
            OSError, ValueError: the photo or all its drawings cannot be read, or the class is unknown or missing.
        """
        if pair.label is None and self.null_class is None:
            raise ValueError("it has no class, and the model has no 'no class'")
        if pair.label is not None and pair.label not in self.label2id:
            raise ValueError(f"the model lacks the class {pair.label!r}")
        self._reading = pair.stem
        self.unreadable_sketches.clear()
        return self.view_of(self._make(self._read(pair))), self._class_label(pair)
