# SPDX-License-Identifier: Apache-2.0
"""The noise from which your photo comes back, and what the same noise becomes with a drawing.

    python examples/invert.py PHOTO DRAWING [--class_label dress]

Writes three pictures side by side: the photo at the model's size, the photo that comes back from its noise, and the drawing
made from that noise.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.images.reading import preprocess_photos
from diffsketching_pipeline.registry import find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("drawing", type=Path)
    parser.add_argument("--class_label", default=None, help="class of both")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps there and back; more lose less")
    parser.add_argument("--model", default=None, help="folder or hub id; the bundled model when left out")
    args = parser.parse_args()

    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
    photo = preprocess_photos(args.photo, pipe.height, pipe.width)
    noise = pipe.invert(photo, args.class_label, num_inference_steps=args.num_inference_steps)
    common = {"num_inference_steps": args.num_inference_steps, "latents": noise, "output_type": "latent"}
    # Without clipping and without guidance, which cannot be inverted, this is the way back.
    back = pipe(None, args.class_label, 1, clip_sample=False, **common).images
    drawn = pipe(args.drawing, args.class_label, 1, **common).images

    # As the network is given it: what the way through an autoencoder loses is no loss of the inversion.
    photo = pipe.decode_photos(pipe.encode_photos(photo))
    back, drawn = pipe.decode_photos(back), pipe.decode_photos(drawn)
    row = torch.cat([photo, back, drawn], dim=3).clamp(-1, 1)
    image = pipe.image_processor.postprocess(row, output_type="pil")[0]
    path = args.photo.with_name(f"{args.photo.stem}.inverted.png")
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(path)
    psnr = 10 * torch.log10(4 / (back - photo).square().mean())
    print(f"The photo comes back at {psnr:.1f} dB, see {path}")


if __name__ == "__main__":
    main()
