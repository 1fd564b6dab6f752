# SPDX-License-Identifier: Apache-2.0
"""Changes a part of your photo into what you draw on it.

    python examples/edit.py PHOTO DRAWING [--class_label hoodie] [--strength 0.9]

DRAWING has the photo's proportions and holds the new lines only, dark on white (draw on a white layer over the photo, and
save that layer). What they enclose may change, everything else stays as it is, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffsketching_pipeline import DiffSketchingEditPipeline
from diffsketching_pipeline.registry import find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("drawing", type=Path)
    parser.add_argument("--class_label", default=None, help="what it becomes; guessed when left out")
    parser.add_argument("--strength", type=float, default=0.9, help="near 0: a small change; 1: something new")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="fewer are faster and rougher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="folder or hub id; the bundled model when left out")
    args = parser.parse_args()

    pipe = DiffSketchingEditPipeline.from_pretrained(find_checkpoint(args.model))
    photo = Image.open(args.photo)
    mask = pipe.prepare_mask_image(photo, sketch=args.drawing)
    out = pipe(
        photo,
        mask,
        args.drawing,
        class_labels=args.class_label,
        strength=args.strength,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    path = args.photo.with_name(f"{args.photo.stem}.edited.png")
    out.images[0].save(path)
    print(f"{mask.getbbox()} of the photo became: {out.class_labels[0]}. The result is in {path}")


if __name__ == "__main__":
    main()
