# SPDX-License-Identifier: Apache-2.0
"""Photos as latents of an autoencoder, encoded once: what a UNet on latents is trained on.

Encoding a photo takes longer than a training step on it. So several crops of each photo, each also mirrored, are encoded
before training begins and kept in the cache, keyed by the photo's content and everything that the latents depend on: the
encoder's weights, its scaling, the size and the number of crops. Another decoder for the same encoder finds them again.
"""

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from tqdm.auto import tqdm

from diffsketching_pipeline import FoldedPixels
from diffsketching_pipeline.autoencoding import encode_photos, get_scale_factor
from diffsketching_pipeline.images.contours import Box
from diffsketching_pipeline.manifest import weights_sha256
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.training.cache import is_kept, keep_arrays, load_arrays
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.modules import load_pretrained


_LATENTS_VERSION = "latents-1"
_LATENT_ARRAYS = ("latents", "boxes")


def load_vae(name_or_path: str) -> Any:
    """
    Loads the autoencoder in a folder or repository, of a pipeline or alone, by the class that its config names; frozen.

    Raises:
        ValueError: its config names no autoencoder that photos can be encoded with.
    """
    name_or_path = find_checkpoint(name_or_path)
    is_alone = os.path.isfile(os.path.join(name_or_path, "config.json"))
    config = AutoencoderTiny.load_config(name_or_path, **({} if is_alone else {"subfolder": "vae"}))
    classes = {kind.__name__: kind for kind in (AutoencoderTiny, AutoencoderKL, FoldedPixels)}
    if config.get("_class_name") not in classes:
        raise ValueError(
            f"`pretrained_vae_model_name_or_path` must be one of {list(classes)}, but {name_or_path!r} is "
            f"{config.get('_class_name')!r}."
        )
    vae = load_pretrained(classes[config["_class_name"]], name_or_path, "vae").eval().requires_grad_(False)
    # Half of the time on a CPU: it is nearly all convolutions.
    return vae.to(memory_format=torch.channels_last)


def encoder_sha256(vae: Any) -> str:
    """
    The sha256 sum of all that latents depend on: the encoder's weights, in the half precision in which they are shared, and
    `shift_factor` and `scaling_factor`.
    """
    digest = hashlib.sha256()
    for part in (vae.encoder, getattr(vae, "quant_conv", None)):
        if part is not None:
            digest.update(weights_sha256(copy.deepcopy(part).half()).encode())
    digest.update(f"{vae.config.get('shift_factor') or 0.0!r}:{vae.config['scaling_factor']!r}".encode())
    return digest.hexdigest()


class LatentDataset(PhotoSketchDataset):
    """
    A [`PhotoSketchDataset`] whose samples hold latents in the place of pixels.

    A training sample is one of `crops_per_photo` crops of its photo, mirrored or not, with a drawing that is made anew each
    time; without `train` it is the middle of the photo.

    Args:
        root, split, resolution, seed, train, cache_dir, drawing_options: see [`PhotoSketchDataset`]; `resolution` is the
            photos' side in pixels.
        vae: the autoencoder, frozen; it is used on the device it is on, and not kept.
        crops_per_photo (`int`): crops of each photo, for training; a cache with fewer is added to.
        encode_batch_size (`int`, *optional*): crops encoded at once; one on a CPU, whose cache holds no more, else 16.

    Raises:
        ValueError: `resolution` is no multiple of the autoencoder's factor, or as [`PhotoSketchDataset`] does.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        vae: Any,
        resolution: int = 256,
        seed: int = 0,
        train: bool = True,
        cache_dir: str | Path | None = None,
        *,
        crops_per_photo: int = 4,
        encode_batch_size: int | None = None,
        **drawing_options: Any,
    ):
        factor = get_scale_factor(vae)
        if resolution % factor:
            raise ValueError(
                f"`resolution` must be a multiple of the autoencoder's factor {factor}, but got {resolution}."
            )
        super().__init__(root, split, resolution, seed, train, cache_dir, **drawing_options)
        self.crops_per_photo = crops_per_photo if train else 1
        key = f"{_LATENTS_VERSION}:{encoder_sha256(vae)}:{resolution}:{train}"
        self._latents_key = f"{key}:{self.zoom}:{self.color_jitter}"
        batch_size = encode_batch_size or (1 if vae.device.type == "cpu" else 16)
        self._latents: list[Path | dict[str, np.ndarray]] = []
        interval = {"mininterval": 10.0, "leave": False}
        for index in tqdm(range(len(self.files)), desc=f"Encoding {split} photos", unit="photo", **interval):
            self._latents.append(self._latents_entry(index, vae, batch_size))

    def _latents_entry(self, index: int, vae: Any, batch_size: int) -> Path | dict[str, np.ndarray]:
        content = self._read(self.files[index])
        photo_key = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        if self.cache_dir is None:
            return self._encode(index, photo_key, range(self.crops_per_photo), vae, batch_size)
        path = self._cache_path(f"{self._latents_key}:", content)
        # The small array tells how many there are: the latents of all photos need not be read to begin.
        counted = load_arrays(path, ("boxes",)) if is_kept(path) else None
        count = 0 if counted is None else len(counted["boxes"])
        if count < self.crops_per_photo:
            # Those of a run that was content with fewer are kept.
            kept = load_arrays(path, _LATENT_ARRAYS) if count else None
            count = 0 if kept is None else count
            made = self._encode(index, photo_key, range(count, self.crops_per_photo), vae, batch_size)
            joined = {n: np.concatenate([kept[n], made[n]]) if kept else made[n] for n in _LATENT_ARRAYS}
            return keep_arrays(path, joined)
        return path

    @torch.no_grad()
    def _encode(self, index: int, photo_key: int, crops: range, vae: Any, batch_size: int) -> dict[str, np.ndarray]:
        """`latents` float16 `[crops, 2, C, h, w]`, the second mirrored, and the `boxes` `[crops, 4]` they show."""
        photo = self.photo(index)
        boxes, pixels = [], []
        for crop in crops:
            rng = np.random.default_rng([crop, photo_key])
            boxes.append(self._crop_box(photo, rng))
            pixels.append(self._pixel_values(photo.image, boxes[-1], rng))
        views = torch.stack([view for crop in pixels for view in (crop, crop.flip(-1))])
        views = views.contiguous(memory_format=torch.channels_last)
        parts = [encode_photos(vae, part.to(vae.device)).cpu().half() for part in views.split(batch_size)]
        latents = torch.cat(parts)
        return {
            "latents": latents.reshape(len(crops), 2, *latents.shape[1:]).numpy(),
            "boxes": np.asarray(boxes, dtype=np.float64),
        }

    def latents(self, index: int, crop: int = 0, mirrored: bool = False) -> tuple[Tensor, Box]:
        """Latents float32 `[C, h, w]` of one crop, and the box of the photo that it shows (before it is mirrored)."""
        entry = self._latents[index]
        arrays = load_arrays(entry, _LATENT_ARRAYS) if isinstance(entry, Path) else entry
        if arrays is None:
            raise ValueError(f"{entry} of the cache is damaged: delete it and start again, it is then made anew.")
        left, top, right, bottom = arrays["boxes"][crop].tolist()
        return torch.from_numpy(arrays["latents"][crop, int(mirrored)]).float(), (left, top, right, bottom)

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """
        One sample.

        Returns:
            `dict`: `latents` float32 [C, R / f, R / f]; `sketch` float32 [1, R, R], -1 = stroke, +1 = paper, and
            `sketch_abstraction` float32 scalar in [0, 1], both left out with `contours="none"`; `class_label` int; `id`
            the file's stem.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        crop = int(rng.integers(self.crops_per_photo)) if self.train else 0
        mirrored = bool(self.train and rng.random() < 0.5)
        latents, box = self.latents(index, crop, mirrored)
        sample: dict[str, Any] = {"latents": latents}
        if self.contours != "none":
            drawn, abstraction = self._sketch(self.drawings(index), index, box, rng)
            sketch = torch.from_numpy(drawn)[None]
            sample["sketch"] = sketch.flip(-1) if mirrored else sketch
            sample["sketch_abstraction"] = torch.tensor(abstraction, dtype=torch.float32)
        return {**sample, "class_label": self.class_labels[index], "id": self.ids[index]}
