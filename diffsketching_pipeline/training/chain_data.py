# SPDX-License-Identifier: Apache-2.0
"""The data that the chain starts from: inverted photos and the drawings that it is to follow."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save
from torch import Tensor

from diffsketching_pipeline import (
    DiffSketchingPipeline,
)
from diffsketching_pipeline.autoencoding import encode_photos
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import invert
from diffsketching_pipeline.files import keep_file
from diffsketching_pipeline.guidance import (
    GuidedPredictor,
)
from diffsketching_pipeline.images.contours import DEFAULT_LINE_GAIN, Box, contour_to_sketch
from diffsketching_pipeline.images.free_hand import free_hand_distortion, half_size
from diffsketching_pipeline.schedulers import sampling_scheduler
from diffsketching_pipeline.training.chain import FinetuneArguments
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import Sample
from diffsketching_pipeline.training.pairs import (
    PairedPhotoDataset,
    PairReader,
    PhotoSketchPair,
)
from diffsketching_pipeline.training.shards import ShardStream, list_shards, validation_pairs
from diffsketching_pipeline.training.starts import class_names_of


logger = logging.getLogger(__name__)


def weights_fingerprint(module: Any) -> str:
    """SHA-256 of a model's settings and weights: equal if and only if they are."""
    settings = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class NoiseCache:
    """
    x_T of photos on disk, one file each, named by all that it depends on: the pixels (after crop and flip), the class,
    the weights of the network and of the autoencoder, the noise schedule, the steps and the iterations.

    Several runs may share a folder, and a kill at any moment leaves a file complete or absent.
    """

    def __init__(self, folder: Path, unet: Any, scheduler: DDIMScheduler, args: FinetuneArguments, vae: Any = None):
        self.folder, self.vae = folder, vae
        self._unwritten: dict[Path, Tensor] = {}
        schedule = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        chain = [args.num_train_inference_steps, args.num_fixed_point_iterations]
        provenance = [weights_fingerprint(unet), schedule, chain]
        if vae is not None:
            provenance.append(weights_fingerprint(vae))
        self.prefix = json.dumps(provenance, sort_keys=True, default=str).encode()
        size = unet.config.sample_size
        channels = 3 if vae is None else vae.config.latent_channels
        self.shape = (channels, size, size) if isinstance(size, int) else (channels, *size)

    def path(self, pixel_values: Tensor, class_label: int) -> Path:
        """Return the file of x_T of a photo [3, R, R], whether it is there or not."""
        content = self.prefix + f"{class_label} {tuple(pixel_values.shape)}".encode() + pixel_values.numpy().tobytes()
        name = hashlib.sha256(content).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def load(self, pixel_values: Tensor, class_label: int) -> Tensor | None:
        """x_T [C, H, W] of a photo [3, R, R], or None where the file is missing or damaged."""
        path = self.path(pixel_values, class_label)
        if path in self._unwritten:
            return self._unwritten[path]
        try:
            latents = load_file(path)["latents"]
        except Exception:  # whatever is wrong with the file, it is made again
            return None
        return latents if latents.shape == self.shape else None

    def save(self, pixel_values: Tensor, class_label: int, latents: Tensor) -> None:
        """Write x_T [C, H, W] of a photo aside and rename; where that fails it is kept in the memory of this process."""
        path, latents = self.path(pixel_values, class_label), latents.float().cpu().contiguous()
        if not keep_file(self.folder, path, save({"latents": latents})):
            self._unwritten[path] = latents


def in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` successive items, the last one maybe shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


@torch.no_grad()
def invert_photos(
    pixel_values: Tensor,
    class_labels: Tensor,
    unet: Any,
    scheduler: DDIMScheduler,
    args: FinetuneArguments,
    vae: Any = None,
) -> Tensor:
    """
    x_T of photos [B, 3, R, R], or of their latents in `vae`, with their classes [B], on their device; told no drawing, so it
    serves every drawing.
    """
    sampler = sampling_scheduler(scheduler, args.num_train_inference_steps, pixel_values.device)
    predictor = GuidedPredictor(unet, unet.config, scheduler, Conditioning(class_labels))
    images = pixel_values if vae is None else encode_photos(vae, pixel_values)
    return invert(sampler, predictor, images, sampler.timesteps, args.num_fixed_point_iterations)


def fill_noise_cache(
    cache: NoiseCache,
    groups: Iterable[list[tuple[Tensor, int]]],
    unet: Any,
    scheduler: DDIMScheduler,
    args: FinetuneArguments,
    device: torch.device,
    time_is_up: Callable[[], bool] = lambda: False,
) -> int:
    """
    Inverts the photos (pixels [3, R, R] and class) whose x_T is not there yet, as long as there is time; returns how many.

    A group is one batch, whole even if parts of it are there: the last bits of a result depend on its batch, and a run
    that was killed on the way has to find what an uninterrupted one would have written.
    """
    count = 0
    for group in groups:
        missing = [cache.load(*photo) is None for photo in group]
        if not any(missing):
            continue
        if time_is_up():
            break
        images = torch.stack([pixels for pixels, _ in group]).to(device)
        labels = torch.tensor([label for _, label in group], device=device)
        noise = invert_photos(images, labels, unet, scheduler, args, cache.vae)
        for (pixels, label), latents, is_missing in zip(group, noise, missing, strict=True):
            if is_missing:
                cache.save(pixels, label, latents)
                count += 1
    return count


class ChainDataset:
    """
    Photos, the noise they come from, and drawings of them by an unskilled hand.

    A photo is cropped in one way, so that its x_T can be kept; both come flipped or not. Which contour is drawn, and how
    badly, is keyed by (seed, epoch, index).

    Args:
        photos: with `train=False`: the crops have to be the same at every epoch.
        cache: where x_T of what `views` yields lies once [`fill_noise_cache`] is done.
        args: see [`FinetuneArguments`].
        train: flip, and vary how badly is drawn.
    """

    def __init__(self, photos: PhotoSketchDataset, cache: NoiseCache, args: FinetuneArguments, train: bool = True):
        self.photos, self.cache, self.train = photos, cache, train
        self.num_steps = args.num_train_inference_steps
        by_people = isinstance(photos, PairedPhotoDataset)
        strength = args.free_hand_strength
        self.strength = strength if strength is not None else 0.0 if by_people else 0.5
        self.class_labels = photos.class_labels

    def __len__(self) -> int:
        return len(self.photos)

    def keys(self, draws: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, bool]]:
        """
        Index and flip of each photo that has to be inverted: those of the samples `draws` (index and epoch of each), or
        without it every one that a sample may hold.
        """
        if draws is None or not self.train:
            flips = (False, True) if self.train else (False,)
            return list(itertools.product(range(len(self)), flips))
        return sorted({(index, self._is_flipped(self._rng(index, epoch))) for index, epoch in draws})

    def views(self, keys: Iterable[tuple[int, bool]]) -> Iterator[tuple[Tensor, int]]:
        """Photos [3, R, R] and classes of `keys`."""
        for index, flip in keys:
            pixels = self.photos.view(index)[0]
            yield pixels.flip(-1).contiguous() if flip else pixels, self.class_labels[index]

    def _rng(self, index: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.photos.seed, epoch, index])

    def _is_flipped(self, rng: np.random.Generator) -> bool:
        """The first thing that is drawn, so that it is known without making the rest of the sample."""
        return self.train and bool(rng.random() < 0.5)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """
        `pixel_values` [3, R, R] and `latents` (x_T) [C, H, W], `sketch` [1, R, R], `class_label` int, `chain_step` int (the step
        that `--backprop per_step` goes through), `id` str.

        Raises:
            FileNotFoundError: x_T of the photo is not in the cache.
        """
        label = self.class_labels[index]
        rng = self._rng(index, epoch)
        flip = self._is_flipped(rng)
        view, name = self.photos.view(index), self.photos.ids[index]
        sample = draw_by_hand(view, rng, self.strength, self.num_steps, self.train, flip)
        latents = self.cache.load(sample["pixel_values"], label)
        if latents is None:
            raise FileNotFoundError(
                f"x_T of the photo {name} is missing or damaged in {self.cache.folder}: start again, and it is made anew."
            )
        return {**sample, "latents": latents, "class_label": label, "id": name}


def draw_by_hand(
    view: tuple[Tensor, np.ndarray, Box],
    rng: np.random.Generator,
    strength: float,
    num_steps: int,
    train: bool,
    flip: bool,
) -> Sample:
    """
    A photo and one of its drawings, redrawn by an unskilled hand.

    Args:
        view: of a photo, see [`PhotoSketchDataset.view`].
        rng: the only source of randomness.
        strength: of the distortion, at most.
        num_steps: of the chain.
        train: vary how badly is drawn.
        flip: mirror both.

    Returns:
        `dict`: `pixel_values` [3, R, R], `sketch` [1, R, R], `chain_step` int.
    """
    pixels, contours, box = view
    ink = half_size(contours[rng.integers(len(contours))])
    drawn = free_hand_distortion(ink, rng, strength * (rng.random() if train else 0.5))
    gain = rng.uniform(1.2, 2.6) if train else DEFAULT_LINE_GAIN
    sketch = torch.from_numpy(contour_to_sketch(drawn, pixels.shape[-1], box, gain))[None]
    if flip:
        pixels, sketch = pixels.flip(-1).contiguous(), sketch.flip(-1)
    return {"pixel_values": pixels, "sketch": sketch, "chain_step": int(rng.integers(num_steps))}


class ShardedChainData:
    """
    The samples of a [`ChainDataset`] without their x_T, from webdataset shards, for [`Trainer`].

    Args:
        pipeline: knows the classes.
        args: see [`FinetuneArguments`]; the drawings are by people, so they are not distorted unless it is asked for.
    """

    def __init__(self, pipeline: DiffSketchingPipeline, args: FinetuneArguments):
        self.args = args
        self.shards = list_shards(str(args.train_shards))
        self.class_names = class_names_of(pipeline)
        self.null_class = pipeline.null_class
        self.reader = PairReader(self.class_names, args.resolution, self.null_class)
        self.strength = args.free_hand_strength or 0.0

    def make_sample(self, pair: PhotoSketchPair, rng: np.random.Generator) -> Sample:
        """See [`ChainDataset.sample`]."""
        view, label = self.reader.read(pair)
        flip = bool(rng.random() < 0.5)
        sample = draw_by_hand(view, rng, self.strength, self.args.num_train_inference_steps, train=True, flip=flip)
        return {**sample, "class_label": label, "id": pair.stem}

    def stream(
        self, process_index: int, num_processes: int, num_workers: int, state: dict[str, Any] | None
    ) -> ShardStream:
        """The batches of one process, from `state` on."""
        batch_size, seed, held = self.args.train_batch_size, self.args.seed, self.args.shuffle_buffer
        readers = (process_index, num_processes, num_workers)
        return ShardStream(
            self.shards, self.class_names, self.make_sample, batch_size, seed, *readers, state, shuffle_buffer=held
        )

    def validation_photos(self) -> PairedPhotoDataset:
        """The photos that validate; see [`validation_pairs`]."""
        needs_class = self.null_class is None
        pairs = validation_pairs(self.shards, self.class_names, self.args.num_validation_samples, needs_class)
        resolution, seed, null_class = self.args.resolution, self.args.seed, self.null_class
        return PairedPhotoDataset(
            pairs, self.class_names, resolution, seed, train=False, null_class=null_class, split="validation"
        )
