# SPDX-License-Identifier: Apache-2.0
"""From Sketchy to pairs for `finetune_diffsketching.py`, with the ImageNet class of each photo.

    python training/prepare_sketchy.py --photo_dir sketchy/256x256/photo/tx_000000000000 \
        --sketch_dir sketchy/256x256/sketch/tx_000000000000 --output_dir sketchy-pairs

A network that was pretrained on ImageNet is told ImageNet's classes, and Sketchy's 125 categories are others ("songbird").
So each photo gets the class that an ImageNet classifier sees in it, by index: `output_dir/photo/<index>/<category>_<id>.jpg`
with `output_dir/sketch/<index>/<category>_<id>-<k>.png`. Files are linked where the disk allows it, else copied.

`classes.json` says how the categories were understood; look at it before training.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from diffsketching_pipeline.images.photo_files import decode_photo
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.pairs import find_pair_files
from diffsketching_pipeline.training.run_folder import write_folder


def read_exclusions(files: Iterable[Path]) -> set[str]:
    """Drawings that are to be left out, from lists with one `<category>/<id>-<k>` or `<id>-<k>` (or .png) per line."""
    names = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            name = line.strip().removesuffix(".png")
            if name and not name.startswith("#"):
                names.add(name.split("/")[-1])
    return names


@torch.no_grad()
def classify(photos: list[Path], model: torch.nn.Module, processor: object, batch_size: int) -> list[int]:
    """The most probable class of each photo, by index; -1 for a photo that cannot be read."""
    found: list[int] = []
    device = next(model.parameters()).device
    for first in tqdm(range(0, len(photos), batch_size), desc="Classifying photos", unit="batch"):
        images, places = [], []
        for place, path in enumerate(photos[first : first + batch_size], start=first):
            try:
                images.append(decode_photo(path.read_bytes()))
                places.append(place)
            except (OSError, ValueError):
                continue
        found += [-1] * min(batch_size, len(photos) - first)
        if images:
            inputs = processor(images=images, return_tensors="pt")  # type: ignore[operator]
            logits = model(inputs["pixel_values"].to(device)).logits
            for place, index in zip(places, logits.argmax(-1).tolist(), strict=True):
                found[place] = index
    return found


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy of it where that is not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"`output_dir` {args.output_dir!r} exists: choose another, or delete it.")
    excluded = read_exclusions(map(Path, args.exclude))
    pairs = find_pair_files(Path(args.photo_dir), Path(args.sketch_dir))
    kept = [
        (stem, photo, [sketch for sketch in sketches if sketch.stem not in excluded])
        for stem, photo, sketches in pairs
    ]
    kept = [entry for entry in kept if entry[2]]
    if not kept:
        raise ValueError("`exclude` leaves no drawing.")
    model = AutoModelForImageClassification.from_pretrained(args.classifier_name_or_path).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoImageProcessor.from_pretrained(args.classifier_name_or_path)
    classes = classify([photo for _, photo, _ in kept], model, processor, args.batch_size)

    if max(classes) < 0:
        raise ValueError(f"`photo_dir` {args.photo_dir!r} has no photo that can be read.")

    seen: dict[str, Counter[int]] = defaultdict(Counter)
    num_drawings = 0
    with write_folder(output_dir) as folder:
        for (stem, photo, sketches), index in zip(kept, classes, strict=True):
            if index < 0:
                print(f"{photo.name} cannot be read, left out", file=sys.stderr)
                continue
            category, name = stem.split("/")[0], stem.replace("/", "_")
            seen[category][index] += 1
            num_drawings += len(sketches)
            link(photo, folder / "photo" / str(index) / f"{name}{photo.suffix}")
            for k, sketch in enumerate(sketches, start=1):
                link(sketch, folder / "sketch" / str(index) / f"{name}-{k}{sketch.suffix}")
        names = model.config.id2label
        report = {
            category: {names[index]: count for index, count in counts.most_common()}
            for category, counts in sorted(seen.items())
        }
        (folder / "classes.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{output_dir}: {sum(sum(c.values()) for c in seen.values())} photos, {num_drawings} drawings")


if __name__ == "__main__":
    with stoppable(__file__):
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--photo_dir", required=True, help="`<category>/<id>.jpg`")
        parser.add_argument("--sketch_dir", required=True, help="`<category>/<id>-<k>.png`")
        parser.add_argument("--output_dir", required=True, help="the new folder with `photo` and `sketch`")
        parser.add_argument(
            "--exclude", nargs="*", default=[], help="lists of drawings to leave out, such as Sketchy's own"
        )
        parser.add_argument("--classifier_name_or_path", default="microsoft/resnet-50", help="folder or Hub id")
        parser.add_argument("--batch_size", type=int, default=64)
        try:
            main(parser.parse_args())
        except ValueError as error:
            sys.exit(f"prepare_sketchy.py: {error}")
