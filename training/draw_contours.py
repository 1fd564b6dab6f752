# SPDX-License-Identifier: Apache-2.0
"""Draws contours of photos, to be evaluated on like human drawings: the difference is the free-hand gap.

    python training/draw_contours.py --reference PHOTOS/validation --like DRAWINGS --output_dir CONTOURS
    python training/evaluate.py --sketches CONTOURS --output_dir on_contours ...
    python training/evaluate.py --sketches DRAWINGS --contour_metrics on_contours/metrics.json ...

Of each class and each half (tune, report) as many photos are drawn as `--like` has drawings, chosen by a hash of the photo's
name, or as many as there are. A second call makes only what is missing.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from diffsketching_pipeline.command_line import argument, parse_arguments, required, user_errors
from diffsketching_pipeline.evaluation.image_sets import (
    Drawing,
    check_settings,
    list_class_folders,
    open_image,
    read_drawings,
    save_png,
)
from diffsketching_pipeline.images.contours import CONTOUR_NAMES, CONTOUR_SIZE, photo_to_contours
from diffsketching_pipeline.splits import in_first_half
from diffsketching_pipeline.stopping import stoppable


MIN_INK = CONTOUR_SIZE
"""A contour of fewer pixels, at `CONTOUR_SIZE`, shows nothing: the next photo takes its place."""

SETTINGS_NAME = "contours.json"


@dataclass
class ContourArguments:
    """Arguments for the photos that are drawn, and how."""

    reference: str = required("photos, `<class>/<photo>.jpg`; the validation photos")
    like: str = required("drawings, `<class>/<sketch>.png`, of whose classes as many contours are made")
    output_dir: str = argument("contours", "where `<class>/<photo>.png` is written")
    contour: Literal["fine", "medium", "coarse", "object", "silhouette"] = argument(
        "object", "which of the drawings of `photo_to_contours`; `object` is the nearest to what people draw"
    )


def draw_contour(path: Path, contour: str) -> Image.Image | None:
    """One named contour of a photo, black on white; None where the photo has next to no edges."""
    ink = photo_to_contours(open_image(path))[CONTOUR_NAMES.index(contour)]
    return Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)) if ink.sum() >= MIN_INK else None


def choose_photos(photos: list[tuple[str, Path]], drawings: list[Drawing]) -> dict[tuple[str, bool], list[Path]]:
    """
    The photos of the drawings' classes by class and half, in the order of a hash of their names: another set of photos with
    some in common draws the same ones first.
    """
    groups: dict[tuple[str, bool], list[Path]] = {}
    wanted = {drawing.label for drawing in drawings}
    for label, path in sorted(photos, key=lambda photo: hashlib.sha256(photo[1].stem.encode()).hexdigest()):
        if label in wanted:
            groups.setdefault((label, in_first_half(path.stem)), []).append(path)
    return groups


def contour_settings(args: ContourArguments, counts: Counter, photos: list[tuple[str, Path]]) -> dict[str, Any]:
    """Return what the contours depend on."""
    digest = hashlib.sha256()
    for label, path in photos:
        digest.update(f"{label}/{path.name}:{path.stat().st_size}\n".encode())
    halves = {f"{label}/{'tune' if half else 'report'}": n for (label, half), n in sorted(counts.items())}
    return {"contour": args.contour, "photos": digest.hexdigest(), "counts": halves}


def main(args: ContourArguments) -> int:
    """Draws what is missing; returns how many contours there are."""
    for name in ("reference", "like"):
        if not Path(getattr(args, name)).is_dir():
            raise ValueError(f"`{name}` must be a folder, but {getattr(args, name)!r} is none.")
    drawings = read_drawings(Path(args.like))
    photos = list_class_folders(Path(args.reference), "reference")
    groups = choose_photos(photos, drawings)
    if not groups:
        raise ValueError(f"`reference` {args.reference!r} has no photo of a class of the drawings.")
    counts = Counter((drawing.label, in_first_half(drawing.name)) for drawing in drawings)
    settings = contour_settings(args, counts, photos)
    check_settings(settings, Path(args.output_dir) / SETTINGS_NAME, "`output_dir` holds contours made")
    total = 0
    for key, wanted in tqdm(sorted(counts.items()), desc="Drawing contours", unit="class"):
        made = 0
        for photo in groups.get(key, []):
            if made == wanted:
                break
            path = Path(args.output_dir) / key[0] / f"{photo.stem}.png"
            drawn = None if path.is_file() else draw_contour(photo, args.contour)
            if drawn is not None:
                save_png(drawn, path)
            made += path.is_file()
        total += made
    return total


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    with user_errors(__file__):
        args = parse_arguments(ContourArguments, __doc__)
        total = main(args)
    print(f"{args.output_dir}: {total} contours")


if __name__ == "__main__":
    with stoppable(__file__):
        run()
