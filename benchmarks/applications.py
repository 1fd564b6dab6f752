# SPDX-License-Identifier: Apache-2.0
"""Measure what editing, interpolation and fine control are worth, on real photos and drawings by people.

    python benchmarks/applications.py edit | retrieve | interpolate | matrix --photos DIR --sketches DIR [--model DIR]
        [--output_dir applications] [--dtype bfloat16] [--num_inference_steps 25] [--num_drawings N]

`--photos` and `--sketches` hold one folder per class. Only the *report* half of the drawings is used (see
`diffsketching_pipeline/evaluation/image_sets.py`). Each part writes its pictures and `<part>.json` to `--output_dir`, and prints the numbers:

- `edit`: six edits of photos of the Clothing dataset's validation part, drawn here.
- `retrieve`: each drawing put into a photo; R@1 of the crop around the mask among all drawings of the half.
- `interpolate`: three, between drawings, photos and classes; distances between neighboring frames.
- `matrix`: 15 drawings in each class of the model; agreement of the evaluation network with the class asked for.

Seam energy is the mean difference, in gray levels, between two neighboring pixels, beside that of the photo at the same
pixels. At the border of the mask one is outside and one inside: this follows from the feather, which gives the outermost
pixels about 1% of the result, and only shows that it works. In the blended band both are within the feather's width inside
of the mask: this is what tells whether the result fits into its surroundings.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from diffsketching_pipeline import (
    DiffSketchingEditPipeline,
    DiffSketchingInterpolationPipeline,
    DiffSketchingPipeline,
)
from diffsketching_pipeline.evaluation.extractors import Evaluator
from diffsketching_pipeline.evaluation.image_sets import Drawing, read_drawings, select_drawings, squash
from diffsketching_pipeline.evaluation.metrics import CONTOUR_RESOLUTION, contour_distances, edge_map, retrieval_ranks
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.images.sketch_processor import SketchProcessor
from diffsketching_pipeline.registry import find_checkpoint


EVALUATOR = Path(__file__).resolve().parents[1] / "training" / "evaluators" / "garments-64"
FEATHER = 0.05
CROP_MARGIN = 0.5
# Photo, class asked for, box that may change (or what the strokes span) and strokes, as shares of width and height.
EDITS: dict[str, tuple[str, str, tuple[float, ...] | None, list[list[tuple[float, float]]]]] = {
    "add a hood": (
        "longsleeve/0098b1c0-bd39-41c2-a172-17066bc9fd26.jpg",
        "hoodie",
        None,
        [[(0.40, 0.17), (0.36, 0.08), (0.42, 0.02), (0.5, 0.01), (0.58, 0.02), (0.64, 0.08), (0.6, 0.17)]],
    ),
    "lengthen the sleeves": (
        "t-shirt/3fc85a3e-04b3-4671-8829-f734902df41a.jpg",
        "longsleeve",
        None,
        [
            [(0.04, 0.35), (0.02, 0.78), (0.13, 0.79), (0.20, 0.46)],
            [(0.95, 0.35), (0.97, 0.78), (0.86, 0.79), (0.79, 0.46)],
        ],
    ),
    "shorts to trousers": (
        "shorts/2ce832eb-750f-4753-a00b-4bf9dee8b88e.jpg",
        "pants",
        None,
        [
            [(0.03, 0.56), (0.14, 0.98), (0.36, 0.98), (0.48, 0.72)],
            [(0.97, 0.56), (0.88, 0.98), (0.64, 0.98), (0.52, 0.72)],
        ],
    ),
    "trousers to shorts": (
        "pants/3979fe73-7315-4caa-bcce-7612ea948f04.jpg",
        "shorts",
        (0.08, 0.62, 0.98, 1.0),
        [[(0.14, 0.66), (0.40, 0.69)], [(0.62, 0.69), (0.90, 0.66)]],
    ),
    "add sleeves to a dress": (
        "dress/0b5f7f85-fa44-4406-91ed-6b730e4b6fa1.jpg",
        "dress",
        None,
        [
            [(0.30, 0.17), (0.08, 0.38), (0.17, 0.46), (0.25, 0.36)],
            [(0.66, 0.17), (0.88, 0.38), (0.80, 0.46), (0.72, 0.36)],
        ],
    ),
    "add a collar": (
        "t-shirt/4617d065-8091-438c-9c7c-e6c53896aab0.jpg",
        "polo",
        None,
        [[(0.41, 0.23), (0.34, 0.34), (0.49, 0.31), (0.64, 0.34), (0.58, 0.23)], [(0.49, 0.31), (0.49, 0.46)]],
    ),
}
PHOTO_PAIR = ("dress/0b5f7f85-fa44-4406-91ed-6b730e4b6fa1.jpg", "t-shirt/4617d065-8091-438c-9c7c-e6c53896aab0.jpg")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seam_energy(image: np.ndarray, mask: np.ndarray, feather: float) -> dict[str, float]:
    """See the head of this file; `image` uint8 `[H, W, 3]`, `mask` bool `[H, W]`, `feather` in pixels."""
    band = mask & (ndimage.distance_transform_edt(mask) <= feather)
    across: list[np.ndarray] = []
    within: list[np.ndarray] = []
    for axis in (0, 1):
        difference = np.abs(np.diff(image.astype(float), axis=axis)).mean(axis=2)
        first, second = (np.delete(mask, index, axis=axis) for index in (-1, 0))
        across.append(difference[first != second])
        first, second = (np.delete(band, index, axis=axis) for index in (-1, 0))
        within.append(difference[first & second])
    return {"border": float(np.concatenate(across).mean()), "band": float(np.concatenate(within).mean())}


def compare(
    pipe: DiffSketchingEditPipeline, photo: Image.Image, edited: Image.Image, mask: Image.Image
) -> dict[str, Any]:
    """Largest difference outside the mask, and seam energy of the result and of the photo at the same pixels."""
    before, after, inside = np.asarray(photo), np.asarray(edited), np.asarray(mask) > 127
    feather = FEATHER * max(pipe.prepare_region(photo, mask, CROP_MARGIN).size)
    outside = np.abs(before.astype(int) - after)[~inside]
    return {
        "outside": int(outside.max()) if outside.size else 0,
        "seam": seam_energy(after, inside, feather),
        "seam_of_photo": seam_energy(before, inside, feather),
    }


def mean_seams(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "largest difference outside": max(result["outside"] for result in results),
        **{
            f"{key}, {where}": round(float(np.mean([result[key][where] for result in results])), 2)
            for key in ("seam", "seam_of_photo")
            for where in ("border", "band")
        },
    }


def measure_edits(pipe: DiffSketchingEditPipeline, args: argparse.Namespace) -> dict[str, Any]:
    results, rows = {}, []
    for name, (file, label, box, strokes) in EDITS.items():
        photo = Image.open(args.photos / file).convert("RGB")
        page = Image.new("L", (4 * photo.width, 4 * photo.height), 255)
        for stroke in strokes:
            ImageDraw.Draw(page).line([(x * page.width, y * page.height) for x, y in stroke], fill=0, width=8)
        pixels = None if box is None else tuple(round(share * photo.size[i % 2]) for i, share in enumerate(box))
        mask = pipe.prepare_mask_image(photo, pixels, page)
        edited = pipe(
            *(photo, pixels, page, label),
            num_images_per_sketch=2,
            crop_margin=CROP_MARGIN,
            feather=FEATHER,
            generator=[seeded(0), seeded(1)],
        ).images
        results[name] = compare(pipe, photo, edited[0], mask)
        rows.append([photo, page, mask, *edited])
        print(name, results[name], flush=True)
    save_sheet(rows, args.output_dir / "edit.png")
    return {**mean_seams(list(results.values())), "edits": results}


def measure_retrieval(pipe: DiffSketchingEditPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Each drawing in the middle of a photo, from noise: is it told from the other drawings by the edited crop?"""
    drawings = report_half(args.sketches)
    gallery = SketchProcessor(CONTOUR_RESOLUTION).preprocess([str(drawing.path) for drawing in drawings])
    photos = sorted(args.photos.glob("*/*.jpg"))
    chosen = list(range(len(drawings)))[:: max(1, len(drawings) // args.num_drawings)]
    results, edges, rows = [], [], []
    for index in chosen:
        drawing = drawings[index]
        photo = Image.open(photos[index * len(photos) // len(drawings)]).convert("RGB")
        side = round(0.9 * min(photo.size))
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        box = (left, top, left + side, top + side)
        page = Image.new("L", (3 * photo.width, 3 * photo.height), 255)
        lines = Image.fromarray(((gallery[index, 0].numpy() + 1) * 127.5).astype(np.uint8))
        page.paste(lines.resize((3 * side, 3 * side), Image.Resampling.LANCZOS), (3 * left, 3 * top))
        mask = pipe.prepare_mask_image(photo, box)
        edited = pipe(
            *(photo, box, page, drawing.label),
            strength=1.0,
            crop_margin=CROP_MARGIN,
            feather=FEATHER,
            generator=seeded(index),
        ).images[0]
        results.append(compare(pipe, photo, edited, mask))
        edges.append(edge_map(edited.crop(box)))
        rows.append([photo, page, edited])
        ranks = retrieval_ranks(
            contour_distances(np.stack(edges), gallery[:, 0].numpy() < 0), np.array(chosen[: len(edges)])
        )
        print(
            f"{len(edges)} of {len(chosen)}: R@1 {np.mean(ranks == 0):.2f}, R@5 {np.mean(ranks < 5):.2f}", flush=True
        )
    save_sheet([sum(rows[i : i + 3], []) for i in range(0, len(rows), 3)], args.output_dir / "retrieve.png")
    return {
        "R@1": round(float(np.mean(ranks == 0)), 3),
        "R@5": round(float(np.mean(ranks < 5)), 3),
        "edits": len(edges),
        "among": len(drawings),
        **mean_seams(results),
    }


def interpolations(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    first = {drawing.label: str(drawing.path) for drawing in reversed(report_half(args.sketches))}
    yield "drawings", {"sketches": [first["t-shirt"], first["longsleeve"]], "generator": seeded(0)}
    yield "photos", {"images": [str(args.photos / name) for name in PHOTO_PAIR]}
    yield (
        "classes",
        {"sketches": first["longsleeve"], "class_labels": ["hoodie", "longsleeve"], "generator": seeded(1)},
    )


def measure_interpolations(pipe: DiffSketchingInterpolationPipeline, args: argparse.Namespace) -> dict[str, Any]:
    evaluator = Evaluator(str(EVALUATOR))
    plain = DiffSketchingPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    results, rows = {}, []
    for name, keys in interpolations(args):
        frames = pipe(num_frames=args.num_frames, **keys).images
        features = evaluator(pixels_of(frames, evaluator.resolution), 16)[1].double()
        unit = torch.nn.functional.normalize(features, dim=1)
        distances = (unit[1:] - unit[:-1]).norm(dim=1)
        ends = [plain_result(plain, keys, key) for key in (0, -1)]
        difference = max(
            int(np.abs(np.asarray(frame).astype(int) - np.asarray(end)).max())
            for frame, end in zip((frames[0], frames[-1]), ends, strict=True)
        )
        results[name] = {
            "mean distance": round(float(distances.mean()), 3),
            "largest over mean": round(float(distances.max() / distances.mean()), 2),
            "ends differ by at most": difference,
        }
        rows.append(frames)
        print(name, results[name], flush=True)
    save_sheet(rows, args.output_dir / "interpolate.png")
    return results


def plain_result(pipe: DiffSketchingPipeline, keys: dict[str, Any], key: int) -> Image.Image:
    """Return what the plain pipeline makes of one key."""
    if "images" in keys:
        noise = pipe.invert(keys["images"][key])
        return pipe(None, None, 1, latents=noise, clip_sample=False).images[0]
    sketch = keys["sketches"] if isinstance(keys["sketches"], str) else keys["sketches"][key]
    label = keys["class_labels"][key] if "class_labels" in keys else None
    return pipe(sketch, label, 1, generator=seeded(keys["generator"].initial_seed())).images[0]


def measure_matrix(pipe: DiffSketchingPipeline, args: argparse.Namespace) -> dict[str, Any]:
    evaluator = Evaluator(str(EVALUATOR))
    labels = list(pipe.id2label.values())
    half = report_half(args.sketches)
    drawings = [half[i * len(half) // 15] for i in range(15)]
    rows, agreed, matching = [], [], []
    for index, drawing in enumerate(drawings):
        generators = [seeded(index) for _ in labels]
        images = pipe([str(drawing.path)] * len(labels), labels, 1, generator=generators).images
        predicted = evaluator(pixels_of(images, evaluator.resolution), 16)[0].argmax(dim=1).tolist()
        agreed += [evaluator.labels[guess] == label for guess, label in zip(predicted, labels, strict=True)]
        matching += [label == drawing.label for label in labels]
        rows.append([Image.open(drawing.path), *images])
        print(f"{index + 1} of 15, {drawing.label}: {sum(agreed[-len(labels) :])} of {len(labels)} agree", flush=True)
        save_sheet(rows, args.output_dir / "matrix.png", side=72)
    hits, match = np.array(agreed), np.array(matching)
    per_class = {label: round(float(hits[i :: len(labels)].mean()), 2) for i, label in enumerate(labels)}
    return {
        "agreement, matching classes": round(float(hits[match].mean()), 3),
        "agreement, contradicting classes": round(float(hits[~match].mean()), 3),
        "images, matching and contradicting": [int(match.sum()), int((~match).sum())],
        "agreement by class": per_class,
        "drawings": [f"{drawing.label}/{drawing.name}" for drawing in drawings],
    }


def report_half(folder: Path) -> list[Drawing]:
    return select_drawings(read_drawings(folder), "report")


def pixels_of(images: list[Image.Image], resolution: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(squash(image, resolution))).permute(2, 0, 1) for image in images])


def save_sheet(rows: list[list[Image.Image]], path: Path, side: int = 160) -> None:
    height = max(round(side * image.height / image.width) for row in rows for image in row)
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + 4), len(rows) * (height + 4)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            size = (side, round(side * image.height / image.width))
            tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * (side + 4), y * (height + 4)))
    sheet.save(path)


PARTS: dict[str, tuple[Any, Any]] = {
    "edit": (DiffSketchingEditPipeline, measure_edits),
    "retrieve": (DiffSketchingEditPipeline, measure_retrieval),
    "interpolate": (DiffSketchingInterpolationPipeline, measure_interpolations),
    "matrix": (DiffSketchingPipeline, measure_matrix),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--sketches", type=Path, required=True)
    parser.add_argument("--model", default=None, help="pipeline folder or Hub id; the bundled one when left out")
    parser.add_argument("--output_dir", type=Path, default=Path("applications"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--num_drawings", type=int, default=1000, help="of `retrieve`: at most about this many")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=None, help="the model's recommendation if left out")
    args = parser.parse_args()

    cls, measure = PARTS[args.part]
    pipe = cls.from_pretrained(find_checkpoint(args.model))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.num_inference_steps is not None:
        pipe.recommended["num_inference_steps"] = args.num_inference_steps
    steps = pipe.resolve_num_inference_steps(None)
    found = {"dtype": args.dtype, "num_inference_steps": steps, **measure(pipe, args)}
    path = args.output_dir / f"{args.part}.json"
    write_file(path, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
