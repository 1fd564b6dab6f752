# SPDX-License-Identifier: Apache-2.0
"""Measure what an autoencoder keeps of photos, compared with keeping all or a small copy; and what decoding costs.

    python benchmarks/autoencoder.py VAE PHOTO_DIR [--resolution 256] [--unet PIPELINE]

The middle squares of the photos below PHOTO_DIR/validation are compared as 8-bit images: PSNR, and the distance of colors and
textures (diffsketching_pipeline/images/patches.py). The first row is the photos themselves, the last one a bicubic reduction by the
autoencoder's factor and back. Times are of one photo at a time, the least of several; with `--unet` also as a ratio to one
pass of that pipeline's UNet.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.autoencoding import decode_latents, encode_photos, get_scale_factor
from diffsketching_pipeline.training.latents import load_vae
from diffsketching_pipeline.training.reconstruction import PhotoDataset, reconstruct, reconstruction_metrics


def shrunk_and_enlarged(photos: Tensor, factor: int) -> Tensor:
    """Photos `[N, 3, H, W]` reduced by `factor` and enlarged again, both bicubic."""
    small = F.interpolate(photos, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return F.interpolate(small, size=photos.shape[-2:], mode="bicubic").clamp(-1, 1)


def least_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The least time of `repeats` calls, after one that is not counted."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="folder of an autoencoder or of a pipeline that has one")
    parser.add_argument("photo_dir", type=Path, help="imagefolder with `validation`")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--unet", default=None, help="a pipeline folder, to compare its UNet's time with")
    args = parser.parse_args()

    vae = load_vae(args.vae)
    factor = get_scale_factor(vae)
    dataset = PhotoDataset(args.photo_dir, "validation", args.resolution, train=False)
    photos = torch.stack([dataset.sample(i)["pixel_values"] for i in range(len(dataset))])
    print(
        f"{len(photos)} photos, {args.resolution} x {args.resolution}, {vae.config.latent_channels} channels, f = {factor}"
    )
    print("| | PSNR dB | patch distance |")
    print("| --- | --- | --- |")
    for name, found in (
        ("photos themselves", photos),
        ("autoencoder", reconstruct(vae, photos, batch_size=1)),
        (f"bicubic, 1/{factor} and back", shrunk_and_enlarged(photos, factor)),
    ):
        metrics = reconstruction_metrics(found, photos)
        psnr = "∞" if name == "photos themselves" else f"{metrics['psnr']:.2f}"
        print(f"| {name} | {psnr} | {metrics['patch_distance']:.3f} |", flush=True)

    with torch.no_grad():
        latents = encode_photos(vae, photos[:1])
    times = {
        "encode": least_seconds(lambda: encode_photos(vae, photos[:1])),
        "decode": least_seconds(lambda: decode_latents(vae, latents)),
    }
    if args.unet is not None:
        unet = DiffSketchingPipeline.from_pretrained(args.unet).unet
        size = unet.config.sample_size
        inputs = torch.zeros(1, unet.config.in_channels, size, size)
        label = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
        times["one pass of the UNet"] = least_seconds(lambda: unet(inputs, 500, label))
    print(f"{torch.get_num_threads()} thread(s), ms: " + ", ".join(f"{n} {1000 * t:.0f}" for n, t in times.items()))
    if args.unet is not None:
        print(f"decoding is {times['decode'] / times['one pass of the UNet']:.2f} passes of the UNet")


if __name__ == "__main__":
    main()
