# SPDX-License-Identifier: Apache-2.0
"""Photos as an autoencoder learns them, and how well it gives them back."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffsketching_pipeline.autoencoding import decode_latents, encode_photos
from diffsketching_pipeline.images.patches import patch_distance, patch_projections, patch_quantiles, pyramid_levels
from diffsketching_pipeline.images.photo_files import IMAGE_ERRORS, decode_photo, list_images
from diffsketching_pipeline.splits import first_by_hash


MAX_SHRINK = 1.5
"""Crops are taken at the photo's own scale or scaled down by at most this factor."""


class PhotoDataset(Dataset):
    """
    Photos of an imagefolder `root/split/<class>/*.jpg` without drawings: random crops, or the middle of each.

    Every random choice of `sample(index, epoch)` comes from `np.random.default_rng([seed, epoch, index])`. Files that cannot
    be decoded are left out.

    Args:
        root (`str` or `Path`): the imagefolder.
        split (`str`): the name of the split's folder.
        resolution (`int`): side of the square samples in pixels.
        seed (`int`): first word of the random key.
        train (`bool`): crops, flipped for half of the draws, of a photo scaled down by up to `MAX_SHRINK`; else the
            largest square in the middle.
        max_samples (`int`, *optional*): read this many photos only, chosen by the hash of their names.

    Raises:
        ValueError: the folder is missing or holds no readable image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        resolution: int,
        seed: int = 0,
        train: bool = True,
        max_samples: int | None = None,
    ):
        self.resolution, self.seed, self.train = resolution, seed, train
        self.files: list[Path] = []
        self._contents: list[bytes] = []
        files = list_images(Path(root), split)[0]
        for index in first_by_hash([f"{file.parent.name}/{file.stem}" for file in files], max_samples):
            file = files[index]
            content = file.read_bytes()
            try:
                with Image.open(io.BytesIO(content)) as opened:
                    opened.verify()
            except IMAGE_ERRORS:
                continue
            self.files.append(file)
            self._contents.append(content)
        if not self.files:
            raise ValueError(f"`train_data_dir` has no readable photo in {split}.")

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """`pixel_values` float32 [3, R, R] in [-1, 1], and `id`, the file's stem."""
        photo = decode_photo(self._contents[index])
        rng = np.random.default_rng([self.seed, epoch, index])
        side = float(min(photo.size))
        if self.train:
            side = min(side, self.resolution * MAX_SHRINK ** rng.random())
        left, top = ((length - side) * (rng.random() if self.train else 0.5) for length in photo.size)
        box = (left, top, left + side, top + side)
        crop = photo.resize((self.resolution,) * 2, Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(crop, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        if self.train and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels.contiguous(), "id": self.files[index].stem}


@torch.no_grad()
def reconstruct(vae: Any, photos: Tensor, batch_size: int = 8) -> Tensor:
    """Photos `[N, 3, H, W]` in [-1, 1] after encoding and decoding, clamped, on the CPU."""
    parts = [decode_latents(vae, encode_photos(vae, part.to(vae.device))) for part in photos.split(batch_size)]
    return torch.cat([part.clamp(-1, 1).cpu() for part in parts])


def to_bytes(photos: Tensor) -> Tensor:
    """Photos in [-1, 1] as uint8."""
    return ((photos.clamp(-1, 1) + 1) * 127.5).round().byte()


def reconstruction_metrics(reconstructions: Tensor, photos: Tensor) -> dict[str, float]:
    """
    Compare reconstructions `[N, 3, H, W]` in [-1, 1] with photos: `psnr` in dB, the mean over photos, of 8-bit images, and
    `patch_distance` (see `images/patches.py`, on as many levels as photos of this side have: 5 at 256 pixels) of the two sets.
    """
    ours, theirs, levels = to_bytes(reconstructions), to_bytes(photos), pyramid_levels(photos.shape[-1])
    squared = (ours.float() - theirs.float()).square().flatten(1).mean(1)
    return {
        "psnr": float((10 * torch.log10(255**2 / squared.clamp_min(1e-3))).mean()),
        "patch_distance": patch_distance(
            patch_projections(ours, num_levels=levels), patch_quantiles(patch_projections(theirs, num_levels=levels))
        ),
    }
