# SPDX-License-Identifier: Apache-2.0
"""Packs photos and their contours into one small file that travels to a machine with a GPU, and unpacks it there.

    python training/pack_training_set.py pack garments garments.tar --cache_dir CACHE
    python training/pack_training_set.py unpack garments.tar garments-packed
    accelerate launch training/train_unet.py CONFIG.yaml --train_data_dir garments-packed --cache_dir garments-packed/cache

Photos are kept at a short side of 256 pixels as WebP, in the best quality that fits into `--max_size` MiB, and the contours
that take the longest to make as bits of a lossless picture, exactly. `unpack` writes an imagefolder and fills its cache, so
that training begins at once; latents are encoded there, with the autoencoder that training is given.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.morphology import disk
from tqdm.auto import tqdm

from diffsketching_pipeline.files import staged_file
from diffsketching_pipeline.images.contours import CONTOUR_NAMES, CONTOUR_SIZE, resized_to_short_side
from diffsketching_pipeline.images.photo_files import decode_photo
from diffsketching_pipeline.manifest import is_inside
from diffsketching_pipeline.splits import normalize_name
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.cache import cache_photo
from diffsketching_pipeline.training.dataset import PhotoSketchDataset


FORMAT = "packed-photos-1"
QUALITIES = (90, 80, 70, 60, 50, 40, 30)
"""Qualities of WebP, the first that fits is taken."""

SAMPLE_SIZE = 48
"""Photos from which the size of all is estimated at each quality."""

_MAX_MEMBER_SIZE = 2**22
_BITS = 1 << np.arange(len(CONTOUR_NAMES), dtype=np.uint8)


def encode_photo(image: Image.Image, quality: int) -> bytes:
    """A photo at a short side of `CONTOUR_SIZE` pixels as WebP."""
    buffer = io.BytesIO()
    resized_to_short_side(image, CONTOUR_SIZE, 4 * CONTOUR_SIZE).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def encode_contours(contours: np.ndarray) -> bytes:
    """
    Contours bool `[5, H, W]` whose lines are dilated by a cross, as one lossless picture with a bit for each.

    They are eroded first, which makes them thin and loses nothing: dilating, eroding and dilating is dilating once.
    """
    padded = np.pad(contours, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    thin = np.stack([ndimage.binary_erosion(contour, disk(1)) for contour in padded])[:, 1:-1, 1:-1]
    codes = (thin * _BITS[:, None, None]).sum(0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(codes).save(buffer, "WEBP", lossless=True, quality=100, method=4, exact=True)
    return buffer.getvalue()


def decode_contours(content: bytes) -> np.ndarray:
    """Return the contours that [`encode_contours`] was given."""
    with Image.open(io.BytesIO(content)) as picture:
        codes = np.asarray(picture.convert("RGB"))[..., 0]
    return np.stack([ndimage.binary_dilation((codes & bit) > 0, disk(1)) for bit in _BITS])


def choose_quality(dataset: PhotoSketchDataset, budget: float) -> int:
    """
    The best of `QUALITIES` at which the photos take at most `budget` bytes each, on average over some of them.

    Raises:
        ValueError: not even the last of them fits.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(SAMPLE_SIZE, len(dataset))).astype(int)
    images = [decode_photo(dataset.files[i].read_bytes()) for i in chosen]
    for quality in QUALITIES:
        size = float(np.mean([len(encode_photo(image, quality)) for image in images]))
        if size <= budget:
            return quality
    raise ValueError(
        f"`max_size` must be larger: at quality {QUALITIES[-1]} photos take {size:.0f} bytes, {budget:.0f} are left."
    )


def pack(root: Path, target: Path, cache_dir: Path, max_size: float = 50.0, resolution: int = 256) -> int:
    """
    Writes the photos of `root/{train,validation}/<class>/` and their contours into one tar file.

    Args:
        root: the imagefolder.
        target: the file; it must not exist.
        cache_dir: where contours are, or are put when they are made.
        max_size: largest size of the file in MiB.
        resolution: of the training it is for, in pixels.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: `target` exists, or the photos do not fit.
    """
    if target.exists():
        raise ValueError(f"`target` {str(target)!r} exists: choose another file.")
    sets = {
        s: PhotoSketchDataset(root, s, resolution, train=False, cache_dir=cache_dir) for s in ("train", "validation")
    }
    count = sum(map(len, sets.values()))
    chosen = np.linspace(0, len(sets["train"]) - 1, min(SAMPLE_SIZE, len(sets["train"]))).astype(int)
    drawings = float(np.mean([len(encode_contours(sets["train"].drawings(int(i)))) for i in chosen]))
    # A tar pads each of its files, with a header before it, to blocks of 512 bytes: 768 on average. Estimates err a little.
    budget = 0.97 * max_size * 2**20 / count - drawings - 2 * 768
    quality = choose_quality(sets["train"], budget)
    boxes: dict[str, list[float]] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as temporary:
        with tarfile.open(temporary, "w") as archive:
            for name, dataset, index in tqdm(list(_photos(sets)), desc="Packing", unit="photo", mininterval=5):
                photo = dataset.photo(index)
                boxes[name] = list(photo.content_box)
                image = decode_photo(dataset.files[index].read_bytes())
                _add(archive, f"photos/{name}.webp", encode_photo(image, quality))
                _add(archive, f"contours/{name}.webp", encode_contours(photo.contours))
            index_file = {
                "format": FORMAT,
                "contours": list(CONTOUR_NAMES),
                "quality": quality,
                "content_boxes": boxes,
            }
            _add(archive, "index.json", json.dumps(index_file).encode())
        size = temporary.stat().st_size
        if size > max_size * 2**20:
            raise ValueError(
                f"`max_size` must be larger: the photos take {size / 2**20:.1f} MiB at quality {quality}."
            )
    return size


def _photos(sets: dict[str, PhotoSketchDataset]) -> Iterator[tuple[str, PhotoSketchDataset, int]]:
    """`<split>/<class>/<stem>`, dataset and index of every photo."""
    for split, dataset in sets.items():
        for index, file in enumerate(dataset.files):
            yield normalize_name(f"{split}/{file.parent.name}/{file.stem}"), dataset, index


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def unpack(source: Path, target: Path, resolution: int = 256) -> int:
    """
    Writes the photos of a packed file into an imagefolder, and their contours into the cache `target/cache`.

    Args:
        source: a file that [`pack`] made.
        target: the imagefolder; what it holds already is written again.
        resolution: of the training, in pixels.

    Returns:
        The number of photos.

    Raises:
        ValueError: `source` is damaged, no packed file, or has names that lead out of `target`.
    """
    try:
        with tarfile.open(source) as archive:
            return _unpack(archive, target, resolution)
    except (tarfile.TarError, OSError, KeyError, SyntaxError, json.JSONDecodeError) as error:
        raise ValueError(f"`source` {str(source)!r} is no packed training set, or damaged: {error}") from error


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(name)
    file = archive.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_SIZE else None
    if file is None:
        raise ValueError(f"`source` has {name}, which is no file of at most {_MAX_MEMBER_SIZE >> 20} MiB.")
    return file.read()


def _unpack(archive: tarfile.TarFile, target: Path, resolution: int) -> int:
    index: dict[str, Any] = json.loads(_read(archive, "index.json"))
    if index.get("format") != FORMAT or index.get("contours") != list(CONTOUR_NAMES):
        raise ValueError(
            f"`source` must be of the format {FORMAT} with contours {CONTOUR_NAMES}, but is {index.get('format')!r}."
        )
    boxes = index["content_boxes"]
    for name, box in tqdm(boxes.items(), desc="Unpacking", unit="photo", mininterval=5):
        if not is_inside(f"{name}.webp"):
            raise ValueError(f"`source` has the photo {name!r}, which leads out of its folder.")
        content = _read(archive, f"photos/{name}.webp")
        contours = decode_contours(_read(archive, f"contours/{name}.webp"))
        path = target / f"{name}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        left, top, right, bottom = (float(edge) for edge in box)
        cache_photo(target / "cache", content, 2 * resolution, contours, (left, top, right, bottom))
    return len(boxes)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="photos and contours into one file")
    packing.add_argument("root", type=Path, help="imagefolder with `train` and `validation`")
    packing.add_argument("target", type=Path, help="the file to write, .tar")
    packing.add_argument("--cache_dir", type=Path, required=True, help="where contours are, or are put")
    packing.add_argument("--max_size", type=float, default=50.0, help="largest size in MiB (default 50)")
    unpacking = commands.add_parser("unpack", help="an imagefolder with a filled cache out of that file")
    unpacking.add_argument("source", type=Path, help="the file to read")
    unpacking.add_argument("target", type=Path, help="the folder to write")
    for command in (packing, unpacking):
        command.add_argument("--resolution", type=int, default=256, help="of the training (default 256)")
    parsed = parser.parse_args(args)
    try:
        if parsed.command == "pack":
            size = pack(parsed.root, parsed.target, parsed.cache_dir, parsed.max_size, parsed.resolution)
            print(f"{parsed.target}: {size / 2**20:.1f} MiB")
        else:
            print(f"{parsed.target}: {unpack(parsed.source, parsed.target, parsed.resolution)} photos")
    except ValueError as error:
        sys.exit(f"pack_training_set.py: {error}")


if __name__ == "__main__":
    with stoppable(__file__):
        main()
