# SPDX-License-Identifier: Apache-2.0
"""Turns a checkout of the public Clothing dataset (CC0) into the imagefolder that the training scripts read.

    git clone https://github.com/alexeygrigorev/clothing-dataset
    python training/prepare_garments.py clothing-dataset garments

What is expected of the checkout, and checked: `images.csv` with the columns `image`, `label` (and others, not used), and
one file `images/<image>.jpg` per row. What comes out: `{train,validation,test}/<class>/<image>.jpg`, short side 128
pixels, aspect ratio kept. A photo's split follows from the SHA-256 of its id alone, so it never changes: `test` is kept
back, nothing is trained on it or tuned to it.

It may be stopped at any time: photos that are already there are not made again. The exit code is 0 if every photo of
the chosen classes was written or is named as unreadable, 2 if the checkout is not what is expected.
"""

import argparse
import csv
import hashlib
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from diffsketching_pipeline.files import staged_file
from diffsketching_pipeline.stopping import stoppable


JUNK_LABELS = ("Not sure", "Other", "Skip")
RENAMED_LABELS = {"body": "bodysuit"}
# fmt: off
GARMENT_CLASSES = (
    "blazer", "bodysuit", "dress", "hat", "hoodie", "longsleeve", "outwear", "pants", "polo", "shirt", "shoes", "shorts",
    "skirt", "t-shirt", "undershirt",
)
# fmt: on


def split_of(image_id: str) -> str:
    """`test` for 8 of 100 ids, `validation` for the next 8, `train` for the others, by the SHA-256 of the id."""
    bucket = int(hashlib.sha256(image_id.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 8 else "validation" if bucket < 16 else "train"


def class_name(label: str) -> str:
    """The class of a label as `images.csv` writes it: lower case, `Body` -> `bodysuit`."""
    return RENAMED_LABELS.get(label.lower(), label.lower())


def read_labels(folder: Path) -> dict[str, str]:
    """
    Image id -> label as written in `images.csv`.

    Raises:
        ValueError: the file or a column is missing, an id appears twice or is no plain file name.
    """
    path = folder / "images.csv"
    if not path.is_file():
        raise ValueError(f"`clothing_dataset_dir` must hold `images.csv`, but {path} is no file. Is it the checkout?")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"image", "label"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}, but {reader.fieldnames}.")
        labels: dict[str, str] = {}
        for row in reader:
            image_id, label = (row["image"] or "").strip(), (row["label"] or "").strip()
            if not image_id or not label or Path(image_id).name != image_id or image_id.startswith("."):
                raise ValueError(f"{path}, line {reader.line_num}: an image id and a label are needed, got {row}.")
            if image_id in labels:
                raise ValueError(f"{path}, line {reader.line_num}: the id {image_id} appears twice.")
            labels[image_id] = label
    if not (folder / "images").is_dir():
        raise ValueError(f"`clothing_dataset_dir` must hold a folder `images`, but {folder / 'images'} is none.")
    return labels


def choose_classes(labels: dict[str, str], min_photos: int) -> dict[str, int]:
    """Class -> number of photos, of the classes with at least `min_photos`; labels that mark junk are no class."""
    counts = Counter(class_name(label) for label in labels.values() if label not in JUNK_LABELS)
    classes = {name: counts[name] for name in sorted(counts) if counts[name] >= min_photos}
    if not classes:
        raise ValueError(
            f"`min_photos_per_class` {min_photos} leaves no class; the largest are {counts.most_common(3)}."
        )
    return classes


def resize_photo(source: Path, target: Path, short_side: int, quality: int) -> None:
    """
    Writes `source`, upright, with its short side at `short_side` pixels; `target` appears complete or not at all.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: the file cannot be decoded.
    """
    with Image.open(source) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = short_side / min(image.size)
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as temporary:
        image.resize(size, Image.Resampling.LANCZOS).save(temporary, format="JPEG", quality=quality)


def prepare(
    clothing_dataset_dir: Path,
    output_dir: Path,
    short_side: int = 128,
    jpeg_quality: int = 88,
    min_photos_per_class: int = 69,
) -> tuple[Counter, list[str]]:
    """
    Writes the imagefolder.

    Returns:
        `tuple[Counter, list[str]]`: the number of photos per split, and the ids that could not be read.

    Raises:
        ValueError: the checkout is not what is expected, or a value is out of range.
    """
    if short_side < 1 or not 1 <= jpeg_quality <= 95:
        raise ValueError(
            f"`short_side` must be at least 1 and `jpeg_quality` in 1 to 95, but they are {short_side}, {jpeg_quality}."
        )
    labels = read_labels(clothing_dataset_dir)
    classes = choose_classes(labels, min_photos_per_class)
    print(f"{len(classes)} classes: {', '.join(f'{name} {count}' for name, count in classes.items())}")
    if tuple(classes) != GARMENT_CLASSES:
        print(f"Note: these are not the {len(GARMENT_CLASSES)} classes of garments-64: {', '.join(GARMENT_CLASSES)}.")

    counts: Counter = Counter()
    unreadable = []
    wanted = {image_id: class_name(label) for image_id, label in labels.items() if label not in JUNK_LABELS}
    wanted = {image_id: name for image_id, name in sorted(wanted.items()) if name in classes}
    for image_id, name in tqdm(wanted.items(), unit="photo", mininterval=0.5 if sys.stderr.isatty() else 10):
        split = split_of(image_id)
        target = output_dir / split / name / f"{image_id}.jpg"
        try:
            if not target.exists():
                resize_photo(clothing_dataset_dir / "images" / f"{image_id}.jpg", target, short_side, jpeg_quality)
            counts[split] += 1
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            unreadable.append(image_id)
    if not counts:
        raise ValueError(f"`clothing_dataset_dir` has no readable photo in {clothing_dataset_dir / 'images'}.")
    return counts, unreadable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "clothing_dataset_dir", type=Path, help="checkout of github.com/alexeygrigorev/clothing-dataset"
    )
    parser.add_argument("output_dir", type=Path, help="the imagefolder to write")
    parser.add_argument("--short_side", type=int, default=128, help="short side of the photos in pixels")
    parser.add_argument("--jpeg_quality", type=int, default=88, help="JPEG quality, 1 to 95")
    parser.add_argument("--min_photos_per_class", type=int, default=69, help="classes with fewer photos are left out")
    args = parser.parse_args()
    try:
        counts, unreadable = prepare(**vars(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: " + ", ".join(f"{split} {counts[split]}" for split in ("train", "validation", "test")))
    if unreadable:
        print(f"{len(unreadable)} photos are missing or unreadable and left out: {', '.join(unreadable)}")
    return 0


if __name__ == "__main__":
    with stoppable(__file__):
        sys.exit(main())
