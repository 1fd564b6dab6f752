# SPDX-License-Identifier: Apache-2.0
"""Your drawing as every class the model knows, also those that contradict it, and as mixtures of them.

    python examples/matrix.py DRAWING [--class_label shirt --class_label "dress"] [--palette navy --palette "#c03020"]

One row per class, one column per seed: along a row only the noise differs, along a column only the class.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.registry import find_checkpoint


TILE, MARGIN = 128, 110


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawing", type=Path)
    parser.add_argument("--class_label", action="append", default=None, help="a row; all classes when left out")
    parser.add_argument("--palette", action="append", default=None, help="a color that the garment may have")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_inference_steps", type=int, default=None, help="fewer are faster and rougher")
    parser.add_argument("--model", default=None, help="folder or hub id; the bundled model when left out")
    args = parser.parse_args()

    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
    labels = args.class_label or list(pipe.id2label.values())
    rows = [*labels, {label: 1.0 for label in labels[:2]}]  # the last row is half the first class, half the second
    sheet = Image.new("RGB", (MARGIN + args.num_seeds * TILE, len(rows) * TILE), "white")
    for y, label in enumerate(rows):
        out = pipe(
            args.drawing,
            class_labels=label,
            num_images_per_sketch=args.num_seeds,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.num_seeds)],
            color_hint=args.palette,
        )
        ImageDraw.Draw(sheet).text(
            (4, y * TILE + TILE // 2), str(label) if isinstance(label, str) else "\n".join(label), fill="black"
        )
        for x, image in enumerate(out.images):
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (MARGIN + x * TILE, y * TILE))
    path = args.drawing.with_name(f"{args.drawing.stem}.matrix.png")
    sheet.save(path)
    print(f"{len(rows)} classes and mixtures x {args.num_seeds} seeds in {path}")


if __name__ == "__main__":
    main()
