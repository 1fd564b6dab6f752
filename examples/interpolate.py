# SPDX-License-Identifier: Apache-2.0
"""A film from one of your drawings to the next.

    python examples/interpolate.py DRAWING DRAWING [DRAWING ...] [--num_frames 16] [--class_label t-shirt]

All frames start from the same noise, so that only what is drawn changes. Give `generator` one generator per drawing to
change colors and background on the way, too.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffsketching_pipeline import DiffSketchingInterpolationPipeline
from diffsketching_pipeline.registry import find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", nargs="+", type=Path)
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument(
        "--class_label", default=None, help="class of all frames; guessed for each drawing when left out"
    )
    parser.add_argument("--num_inference_steps", type=int, default=None, help="fewer are faster and rougher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="folder or hub id; the bundled model when left out")
    args = parser.parse_args()

    pipe = DiffSketchingInterpolationPipeline.from_pretrained(find_checkpoint(args.model))
    out = pipe(
        args.drawings,
        class_labels=args.class_label,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    frames = [image.resize((256, 256), Image.Resampling.LANCZOS) for image in out.images]
    # There and back, so that the film has no jump where it starts again.
    frames += frames[-2:0:-1]
    path = args.drawings[0].with_name("-".join(drawing.stem for drawing in args.drawings) + ".gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0)
    print(f"From {' to '.join(map(str, out.class_labels))} in {path}")


if __name__ == "__main__":
    main()
