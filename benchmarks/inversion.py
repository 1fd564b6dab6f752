# SPDX-License-Identifier: Apache-2.0
"""Round trip photo -> x_T -> photo: how close it comes, over the number of fixed-point iterations of the inversion.

    python benchmarks/inversion.py PHOTO... [--model DIR] [--num_inference_steps 50] [--iterations 0 1 3 5]

Photos whose folder is named after a class of the model are given that class. Prints the peak signal-to-noise ratio of
what comes back (photos in [-1, 1], mean over photos), the network evaluations of the inversion, and its time relative to
the first row. `--textbook_steps N` adds the textbook method (0 iterations) at N steps there and back.
"""

import argparse
import time
from pathlib import Path

import torch

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.images.reading import preprocess_photos
from diffsketching_pipeline.registry import find_checkpoint


def psnr(found: torch.Tensor, images: torch.Tensor, peak: float = 2.0) -> torch.Tensor:
    """10 log10(peak² / mean squared error) of each photo `[batch_size, channels, H, W]`, in dB; 2 is the range of [-1, 1]."""
    return 10 * torch.log10(peak**2 / (found - images).square().mean(dim=(1, 2, 3)))


def round_trip(
    pipe: DiffSketchingPipeline, images: torch.Tensor, labels: list[str | None], steps: int, iterations: int
) -> tuple[torch.Tensor, float]:
    """PSNR of each photo (of its latents, with four of their standard deviations as the peak), and the inversion's seconds."""
    start = time.perf_counter()
    noise = pipe.invert(images, labels, num_inference_steps=steps, num_fixed_point_iterations=iterations)
    seconds = time.perf_counter() - start
    # Nothing that a checkpoint recommends beside the plain chain.
    off = {
        "sketch_guidance_scale": 1.0,
        "classifier_guidance_scale": 0.0,
        "perceptual_guidance_scale": 0.0,
        "eta": 0.0,
    }
    found = pipe(None, labels, 1, steps, latents=noise, clip_sample=False, output_type="latent", **off).images
    given = pipe.encode_photos(images.to(found.device))
    peak = 2.0 if pipe.vae is None else 4 * float(given.std())
    return psnr(found, given, peak).cpu(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", default=None, help="pipeline folder or Hub id; the bundled one when left out")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 1, 3, 5])
    parser.add_argument("--textbook_steps", type=int, default=None)
    args = parser.parse_args()

    pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    images = preprocess_photos(args.photos, pipe.height, pipe.width)
    known = set(pipe.id2label.values())
    labels = [photo.parent.name if photo.parent.name in known else None for photo in args.photos]

    runs = [(args.num_inference_steps, iterations) for iterations in args.iterations]
    runs += [(args.textbook_steps, 0)] if args.textbook_steps is not None else []
    print(f"{len(images)} photos, {pipe.height}x{pipe.width}, {pipe.device.type}")
    print("| steps | iterations | PSNR dB, mean (least) | network evaluations | time |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for steps, iterations in runs:
        values, seconds = round_trip(pipe, images, labels, steps, iterations)
        first = first if first is not None else seconds
        evaluations = steps * (iterations + 1)
        shown = f"{values.mean():.1f} ({values.min():.1f})"
        print(f"| {steps} | {iterations} | {shown} | {evaluations} | {seconds / first:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
