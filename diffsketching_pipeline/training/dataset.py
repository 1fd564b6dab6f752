# SPDX-License-Identifier: Apache-2.0
"""Photos and the drawings that a program can make of them: what every training script reads.

No human drawing is needed: one photo has several valid drawings (Li et al., "Photo-Sketching", WACV 2019), here
classical contours at several scales plus the outline of the object alone, which is what people mostly draw.
"""

import copy
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffsketching_pipeline.images.contours import (
    CONTOUR_NAMES,
    CONTOUR_SIZE,
    Box,
    check_contour_source,
    contour_distribution,
    contour_to_sketch,
)
from diffsketching_pipeline.images.free_hand import (
    STRAIGHTENED_SHARE,
    STRAIGHTENED_STRENGTH,
    check_stroke_deletion,
    delete_strokes,
    free_hand_distortion,
    half_size,
    maybe_straightened,
    render_jittered,
)
from diffsketching_pipeline.images.photo_files import IMAGE_ERRORS, MAX_SQUASH, decode_photo, list_images
from diffsketching_pipeline.splits import first_by_hash, normalize_name
from diffsketching_pipeline.training.cache import (
    DRAWING_ARRAYS,
    HED_CACHE_VERSION,
    CachedPhoto,
    cache_path,
    is_kept,
    keep_arrays,
    load_arrays,
    pack_contours,
    pack_photo,
    photo_cache_path,
    prepare_photo,
    unpack_contours,
    unpack_photo,
)


logger = logging.getLogger(__name__)

# Starting processes takes as long as reading some hundred photos.
_SECONDS_ALONE, _SECONDS_WORTH_PROCESSES = 3.0, 30.0


class PhotoSketchDataset(Dataset):
    """
    Photos of an imagefolder `root/split/<class>/*.jpg`, each with drawings made of it.

    Every random choice of `sample(index, epoch)` comes from `np.random.default_rng([seed, epoch, index])`, so a
    resumed run and any number of workers or processes see the same samples. Without `train` nothing is random: the
    photo's whole height or width (squashed by at most 4:3), contour `index % N`, the middle line gain.

    Files that cannot be decoded are left out, counted and named once in a warning.

    Args:
        root (`str` or `Path`): the imagefolder.
        split (`str`): the name of the split's folder.
        resolution (`int`): side of the square samples.
        seed (`int`): first word of the random key.
        train (`bool`): whether to augment.
        cache_dir (`str` or `Path`, *optional*): where decoded photos and contours are kept, keyed by the files'
            content; safe to share between runs and to kill. Without it, or where it cannot be written to, they are kept in
            memory.
        contours (`"one"`, `"all"` or `"none"`): which drawings a sample holds. "all" adds `sketches` [N, 1, R, R] (N
            fixed, no jitter, middle gain) to `sketch`, "none" leaves both out.
        contour_probabilities (`Sequence[float]`): how often each of `CONTOUR_NAMES` is drawn.
        line_gain (`tuple[float, float]`): range of the darkness of lines, see `contour_to_sketch`.
        jitter (`float`): free-hand jitter of the sketch relative to the photo: at most 1.5 `jitter` pixels at 64.
        free_hand_share (`float`): share of the drawings that are redrawn as an unskilled hand would, half of them
            straightened first, so that they are only roughly where the photo's contours are.
        free_hand_strength (`float`): largest strength of that, see `free_hand_distortion`.
        stroke_deletion_share (`float`): share of the drawings that are half made, see `delete_strokes`.
        max_stroke_deletion (`float`): largest share of the strokes that these lack.
        color_jitter (`float`): range of brightness and contrast changes; above 0.2 the hue changes, too.
        zoom (`float`): up to this share of both sides is cut away, as far as the object stays whole.
        contour_source (`"classical"`, `"hed"` or `"both"`): who draws the contours. HED's are cached beside the
            classical ones, by the photo's content and the hash of the weights, and take seconds a photo, once.
        hed_weights (`str` or `Path`, *optional*): file for `hed_contours.HEDNetwork.from_file`.
        keep (`Callable[[str], bool]`, *optional*): takes a file's stem, tells whether the photo is in the dataset.
        max_samples (`int`, *optional*): read this many photos only, chosen by the hash of their names.
        class_names (`Sequence[str]`, *optional*): all classes in the order of their indices, if there are more than folders.
        num_readers (`int`): processes that read and draw photos which are not in the cache, if there are many.

    Raises:
        ValueError: the folder is missing, holds no readable image, or has a class that `train` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        resolution: int = 64,
        seed: int = 0,
        train: bool = True,
        cache_dir: str | Path | None = None,
        *,
        contours: Literal["one", "all", "none"] = "one",
        contour_probabilities: Sequence[float] = (0.12, 0.18, 0.2, 0.2, 0.3),
        line_gain: tuple[float, float] = (1.0, 2.6),
        jitter: float = 1.0,
        free_hand_share: float = 0.0,
        free_hand_strength: float = 1.0,
        stroke_deletion_share: float = 0.0,
        max_stroke_deletion: float = 0.9,
        color_jitter: float = 0.1,
        zoom: float = 0.12,
        contour_source: Literal["classical", "hed", "both"] = "classical",
        hed_weights: str | Path | None = None,
        keep: Callable[[str], bool] | None = None,
        max_samples: int | None = None,
        class_names: Sequence[str] | None = None,
        num_readers: int = 1,
    ):
        if len(contour_probabilities) != len(CONTOUR_NAMES):
            raise ValueError(
                f"`contour_probabilities` needs {len(CONTOUR_NAMES)} values, but has {len(contour_probabilities)}."
            )
        self.resolution, self.seed, self.train, self.num_readers = resolution, seed, train, num_readers
        self.contours, self.line_gain, self.jitter = contours, line_gain, jitter
        check_stroke_deletion(stroke_deletion_share, max_stroke_deletion)
        self.free_hand_share, self.free_hand_strength = free_hand_share, free_hand_strength
        self.stroke_deletion_share, self.max_stroke_deletion = stroke_deletion_share, max_stroke_deletion
        self.color_jitter, self.zoom = color_jitter, zoom
        check_contour_source(contour_source, hed_weights)
        self.contour_source, self.hed_weights = contour_source, hed_weights
        self.contour_probabilities = contour_distribution(contour_probabilities, contour_source)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.image_size = 2 * resolution

        files, found = self._list(root, split)
        self.id2label = dict(enumerate(found if class_names is None else class_names))
        self.label2id = {label: index for index, label in self.id2label.items()}
        files = [file for file in files if keep is None or keep(file.stem)]
        chosen = first_by_hash([f"{self._class_label(file)}/{file.stem}" for file in files], max_samples)
        files = [files[index] for index in chosen]
        self.files: list[Any] = []
        self.corrupt_files: list[Any] = []
        self._cached: list[Path | dict[str, np.ndarray]] = []
        self._hed_cached: list[Path | dict[str, np.ndarray]] = []
        self._hed_network: Any = None
        if contour_source == "classical":
            self._prepare(files, split)
        else:
            self._load_hed()  # first: bad weights are told before any photo is drawn
            self._prepare(files, split)
            self._prepare_hed(split)
        self.class_labels = [self._class_label(file) for file in self.files]
        self.ids = [file.stem for file in self.files]

    # What a dataset of other files changes: which there are, their classes, how they are read and drawn.

    def _list(self, root: Any, split: str) -> tuple[list[Any], list[str]]:
        return list_images(Path(root), split)

    def _class_label(self, file: Any) -> int:
        return self.label2id[normalize_name(file.parent.name)]

    def _read(self, file: Any) -> bytes:
        """Everything that the photo and its drawings are made of."""
        return file.read_bytes()

    def _make(self, content: bytes) -> CachedPhoto:
        return prepare_photo(content, self.image_size)

    def _choose_contour(self, contours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return contours[rng.choice(len(contours), p=self.contour_probabilities)]

    def _prepare(self, files: list[Any], split: str) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10
        shown = {"desc": f"Reading {split} photos", "unit": "photo", "mininterval": interval, "leave": False}
        for file, entry in zip(files, tqdm(self._entries(files), total=len(files), **shown), strict=True):
            if isinstance(entry, Exception):
                logger.debug("%s: %s", file, entry)
                self.corrupt_files.append(file)
            else:
                self.files.append(file)
                self._cached.append(entry)
        if self.corrupt_files:
            names = ", ".join(file.name for file in self.corrupt_files)
            logger.warning("%d of %d files unreadable, left out: %s", len(self.corrupt_files), len(files), names)
        if not self.files:
            raise ValueError(f"`split` {split!r} has no readable photo left of {len(files)} files.")

    def _entries(self, files: list[Any]) -> Iterator[Path | dict[str, np.ndarray] | Exception]:
        """Yield what [`_cache_entry`] makes of each file, or its error; in several processes if that is worth their start."""
        start = time.monotonic()
        for done, file in enumerate(files):
            seconds = time.monotonic() - start
            left = seconds / max(1, done) * (len(files) - done)
            if self.num_readers > 1 and seconds > _SECONDS_ALONE and left > _SECONDS_WORTH_PROCESSES:
                reader = copy.copy(self)  # without what was read so far, which may be large
                reader.files, reader._cached, reader.corrupt_files = [], [], []
                # Spawned, because a fork of a process with threads may hang.
                with ProcessPoolExecutor(self.num_readers, mp_context=get_context("spawn")) as pool:
                    yield from pool.map(reader._entry_or_error, files[done:], chunksize=8)
                return
            yield self._entry_or_error(file)

    def _entry_or_error(self, file: Any) -> Path | dict[str, np.ndarray] | Exception:
        try:
            return self._cache_entry(file)
        except IMAGE_ERRORS as error:
            return error

    def _cache_entry(self, file: Any) -> Path | dict[str, np.ndarray]:
        content = self._read(file)
        if self.cache_dir is None:
            return pack_photo(self._make(content))
        path = photo_cache_path(self.cache_dir, content, self.image_size)
        return path if is_kept(path) else keep_arrays(path, pack_photo(self._make(content)))

    def _load_hed(self) -> None:
        from diffsketching_pipeline.training.hed_contours import HEDNetwork, hash_weights  # it imports this module

        assert self.hed_weights is not None
        self._hed_network = HEDNetwork.from_file(self.hed_weights)
        self._hed_hash = hash_weights(self.hed_weights)

    def _prepare_hed(self, split: str) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10
        names = tqdm(self.files, desc=f"HED draws {split} photos", unit="photo", mininterval=interval, leave=False)
        self._hed_cached = [self._hed_entry(file) for file in names]
        self._hed_network = None  # 59 MB that no sample needs

    def _hed_entry(self, file: Any) -> Path | dict[str, np.ndarray]:
        content = self._read(file)
        if self.cache_dir is None:
            return pack_contours(self._make_hed(content))
        path = self._cache_path(f"{HED_CACHE_VERSION}:{self._hed_hash}:{CONTOUR_SIZE}:", content)
        return path if is_kept(path) else keep_arrays(path, pack_contours(self._make_hed(content)))

    def _make_hed(self, content: bytes) -> np.ndarray:
        from diffsketching_pipeline.training.hed_contours import photo_to_hed_contours

        if self._hed_network is None:
            self._load_hed()
        return np.stack(photo_to_hed_contours(decode_photo(content), self._hed_network))

    def _hed_contours(self, index: int) -> np.ndarray:
        entry = self._hed_cached[index]
        if not isinstance(entry, Path):
            return unpack_contours(entry)
        packed = load_arrays(entry, DRAWING_ARRAYS)
        if packed is None:
            packed = pack_contours(self._make_hed(self._read(self.files[index])))
            keep_arrays(entry, packed)
        return unpack_contours(packed)

    def _cache_path(self, made_with: str, content: bytes) -> Path:
        assert self.cache_dir is not None
        return cache_path(self.cache_dir, made_with, content)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """`dataset[index]` is epoch 0; a sampler that yields `(epoch, index)` gets that epoch's augmentation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(index, epoch)

    def photo(self, index: int) -> CachedPhoto:
        """The decoded photo, its contours and its content box, before any augmentation."""
        photo = self._classical_photo(index)
        return photo if self.contour_source == "classical" else photo._replace(contours=self.drawings(index))

    def _classical_photo(self, index: int) -> CachedPhoto:
        entry = self._cached[index]
        if not isinstance(entry, Path):
            return unpack_photo(entry)
        packed = load_arrays(entry, ("image", *DRAWING_ARRAYS, "content_box"))
        if packed is None:
            photo = self._make(self._read(self.files[index]))
            keep_arrays(entry, pack_photo(photo))
            return photo
        return unpack_photo(packed)

    def drawings(self, index: int) -> np.ndarray:
        """The contours of [`PhotoSketchDataset.photo`] alone, bool [N, H, W]: the photo itself is not read."""
        if self.contour_source == "hed":
            return self._hed_contours(index)
        entry = self._cached[index]
        packed = load_arrays(entry, DRAWING_ARRAYS) if isinstance(entry, Path) else entry
        classical = self._classical_photo(index).contours if packed is None else unpack_contours(packed)
        if self.contour_source == "classical":
            return classical
        return np.concatenate([classical, self._hed_contours(index)])

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """
        One augmented sample.

        Returns:
            `dict`: `pixel_values` float32 [3, R, R] in [-1, 1]; `sketch` float32 [1, R, R], -1 = stroke, +1 = paper;
            `sketches` [N, 1, R, R] with `contours="all"`; `sketch_abstraction` float32 scalar in [0, 1], how freely
            `sketch` is drawn (0: it traces the photo); `class_label` int; `id` the file's stem.
        """
        photo = self.photo(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        box = self._crop_box(photo, rng)
        flip = self.train and rng.random() < 0.5
        sample: dict[str, Any] = {"pixel_values": self._pixel_values(photo.image, box, rng)}
        conditions = {}
        if self.contours != "none":
            sketch, abstraction = self._sketch(photo.contours, index, box, rng)
            sample["sketch"] = torch.from_numpy(sketch)[None]
            conditions["sketch_abstraction"] = torch.tensor(abstraction, dtype=torch.float32)
        if self.contours == "all":
            drawings = [contour_to_sketch(contour, self.resolution, box) for contour in photo.contours]
            sample["sketches"] = torch.from_numpy(np.stack(drawings))[:, None]
        if flip:
            sample = {name: value.flip(-1) for name, value in sample.items()}
        return {**sample, **conditions, "class_label": self.class_labels[index], "id": self.ids[index]}

    def view(self, index: int) -> tuple[torch.Tensor, np.ndarray, Box]:
        """
        A photo as it is without augmentation, and what can be drawn of it; the same at every call.

        Returns:
            `tuple`: float32 [3, R, R] in [-1, 1], all contours bool [N, H, W], and the box of the contours that the photo
            shows, see `contour_to_sketch`.
        """
        return self.view_of(self.photo(index))

    def view_of(self, photo: CachedPhoto) -> tuple[torch.Tensor, np.ndarray, Box]:
        """[`PhotoSketchDataset.view`] of any photo, if it is in the dataset or not."""
        if self.train:
            raise ValueError("`view` needs a dataset with `train=False`.")
        rng = np.random.default_rng(0)
        box = self._crop_box(photo, rng)
        return self._pixel_values(photo.image, box, rng), photo.contours, box

    def _crop_box(self, photo: CachedPhoto, rng: np.random.Generator) -> Box:
        """
        A box whose sides differ by at most 4:3, between the whole photo and the object with a thin margin.

        Users' drawings are recentered and scaled to a margin, so the object must be seen at that scale, too.
        """
        height, width = photo.image.shape[:2]
        short = min(height, width)
        largest = (min(width, MAX_SQUASH * short), min(height, MAX_SQUASH * short))
        left, top, right, bottom = photo.content_box
        margin = 1.04 + rng.random() * 0.2
        needed = max((right - left) * width, (bottom - top) * height) * margin
        tightness, shrink = (rng.random(), 1 - self.zoom * rng.random()) if self.train else (0.0, 1.0)
        box: list[tuple[float, float]] = []
        for side, limit, low, high in ((width, largest[0], left, right), (height, largest[1], top, bottom)):
            tight = min(limit, max(needed, short * (1 - 3 * self.zoom)))
            length = max(min(limit, needed), (limit + (tight - limit) * tightness) * shrink)
            first, last = high * side - length, low * side
            first, last = max(0.0, min(first, last)), min(side - length, max(first, last))
            start = min(max(first + (last - first) * (rng.random() if self.train else 0.5), 0.0), side - length)
            box.append((start / side, (start + length) / side))
        return (box[0][0], box[1][0], box[0][1], box[1][1])

    def _pixel_values(self, image: np.ndarray, box: Box, rng: np.random.Generator) -> torch.Tensor:
        height, width = image.shape[:2]
        pixel_box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        resized = Image.fromarray(image).resize((self.resolution,) * 2, Image.Resampling.BICUBIC, box=pixel_box)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        if not self.train or self.color_jitter == 0:
            return pixels.contiguous()
        brightness, contrast = rng.uniform(-1, 1, 2) * self.color_jitter
        pixels = pixels * (1 + contrast) + brightness
        if self.color_jitter > 0.2:
            saturation, *tint = rng.uniform(-1, 1, 4) * self.color_jitter
            gray = pixels.mean(0, keepdim=True)
            pixels = gray + (pixels - gray) * (1 + saturation) + torch.tensor(tint).float().view(3, 1, 1) / 2
        return pixels.clamp(-1, 1).contiguous()

    def _sketch(
        self, contours: np.ndarray, index: int, box: Box, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """
        A drawing of a photo, and how freely it is drawn.

        Args:
            contours (`np.ndarray`): all drawings of the photo, bool [N, H, W].
            index (`int`): of the photo; it alone chooses the drawing without `train`.
            box (`Box`): the part of the photo to draw.
            rng (`np.random.Generator`): the only source of randomness.

        Returns:
            `tuple[np.ndarray, float]`: float32 [R, R], -1 = stroke, +1 = paper, and the abstraction in [0, 1]: 0 for what
            traces the photo, jitter aside; else the strength of the free-hand distortion over `free_hand_strength`, the
            largest. A straightened outline counts as a strength of at least `STRAIGHTENED_STRENGTH`. Deleted strokes
            count nothing: what is drawn is where it should be.
        """
        if not self.train:
            return contour_to_sketch(
                contours[index % len(contours)], self.resolution, box, sum(self.line_gain) / 2
            ), 0.0
        contour = self._choose_contour(contours, rng)
        gain = rng.uniform(*self.line_gain)
        if self.free_hand_share > 0 and rng.random() < self.free_hand_share:
            contour = half_size(contour)
            ink = maybe_straightened(contour, rng, STRAIGHTENED_SHARE)
            least = 0.0 if ink is contour else STRAIGHTENED_STRENGTH
            ink = self._half_made(ink, box, rng)
            strength = self.free_hand_strength * rng.random()
            drawn = free_hand_distortion(ink, rng, strength)
            largest = self.free_hand_strength or STRAIGHTENED_STRENGTH
            return contour_to_sketch(drawn, self.resolution, box, gain), min(1.0, max(strength, least) / largest)
        contour = self._half_made(contour, box, rng)
        if self.jitter == 0:
            return contour_to_sketch(contour, self.resolution, box, gain), 0.0
        jitter = self.jitter * self.resolution / 64
        return render_jittered(contour, self.resolution, box, gain, jitter, rng), 0.0

    def _half_made(self, ink: np.ndarray, box: Box, rng: np.random.Generator) -> np.ndarray:
        """Deletes strokes of a share of the drawings, within `box` only: something stays where it can be seen."""
        if self.stroke_deletion_share == 0 or rng.random() >= self.stroke_deletion_share:
            return ink
        height, width = ink.shape
        rows = slice(math.floor(box[1] * height), math.ceil(box[3] * height))
        columns = slice(math.floor(box[0] * width), math.ceil(box[2] * width))
        ink = ink.copy()
        ink[rows, columns] = delete_strokes(ink[rows, columns], rng, self.max_stroke_deletion * rng.random())
        return ink
