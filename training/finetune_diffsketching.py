# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Fine-tunes the reverse process of a DiffSketching pipeline with the paper's constraints (eqs. 5-7, section 4).

    accelerate launch training/finetune_diffsketching.py training/configs/finetune_garments64.yaml \
        --pretrained_model_name_or_path garments-64 --train_data_dir garments

For each photo x_0 and a drawing s_0 of it: x_0 is inverted to x_T with the frozen network (once: it is kept on disk), the
network that learns makes x̂_0 from x_T with s_0 as its drawing, and the gradient of
L = λ L_i(x_0, x̂_0) + (1-λ) L_p(P(x̂_0), s_0) runs back through the chain of sampling steps. The result is
`output_dir/pipeline`: the pipeline that was given, with the fine-tuned UNet in it.

The data is one of: a folder with `train` and `validation`, each with photos in class folders (the drawings are then contours
of the photos, redrawn as an unskilled hand would); a folder with `photo` and `sketch`, matched by name; a dataset with a
column of photos and one of drawings (`--conditioning_image_column`), see `diffsketching_pipeline/training/pairs.py` for these
two; webdataset shards of pairs (`--train_shards`), streamed, see `shards.py` there: nothing of them is kept on disk, so x_T is made anew in each step.

Memory: `--gradient_checkpointing` keeps one step's activations however long the chain is, `--truncate_backprop_steps K`
goes back through the last K steps only, and `--backprop per_step` through one step, drawn at random.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ResNetForImageClassification
from transformers.image_processing_utils import ImageProcessingMixin

from diffsketching_pipeline import (
    DiffSketchingLoss,
    DiffSketchingPipeline,
    ImageIdentityLoss,
    SketchPerceptualLoss,
    add_lora,
    save_lora,
)
from diffsketching_pipeline.autoencoding import decode_latents, encode_photos
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import NoisePrediction, checkpointed, denoise, invert
from diffsketching_pipeline.guidance import (
    ClassifierGuidanceCallback,
    GuidanceCallback,
    GuidedPredictor,
    SketchGuidanceCallback,
)
from diffsketching_pipeline.images.contours import DEFAULT_LINE_GAIN, Box, contour_to_sketch
from diffsketching_pipeline.images.free_hand import check_free_hand, free_hand_distortion, half_size
from diffsketching_pipeline.losses import DiffSketchingLosses
from diffsketching_pipeline.schedulers import check_scheduler, sampling_scheduler
from diffsketching_pipeline.training.arguments import TrainingArguments, parse_args, resolve_data_dir
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import Sample, class_balanced_weights
from diffsketching_pipeline.training.pairs import (
    PairedPhotoDataset,
    PairReader,
    PhotoSketchPair,
    find_pairs,
    load_dataset_pairs,
    split_pairs,
)
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.shards import ShardStream, list_shards, validation_pairs
from diffsketching_pipeline.training.trainer import Trainer


logger = logging.getLogger(__name__)


@dataclass
class FinetuneArguments(TrainingArguments):
    """What this script adds to [`TrainingArguments`]."""

    output_dir: str = argument(
        "diffsketching-finetuned", "where checkpoints, samples, logs and `pipeline` are written"
    )
    learning_rate: float = argument(1e-5, "the learning rate after the warm-up; 2e-6 to 5e-5 is a useful range")
    lr_warmup_steps: int = argument(20, "steps over which the learning rate rises from 0")
    adam_weight_decay: float = argument(0.0, "AdamW's weight decay")
    train_batch_size: int = argument(4, "photos per process and chain")

    identity_weight: float = argument(0.5, "lambda of eq. 7 in [0, 1]: 1 keeps the photo, 0 follows the drawing")
    perceptual_net: Literal["sketch_encoder", "alex", "vgg", "squeeze"] = argument(
        "sketch_encoder", "F_s of eq. 5: the pipeline's, or a network of LPIPS with its learned weights"
    )
    image_encoder_name_or_path: str | None = argument(
        None,
        "F_i of eq. 6 in the place of the pipeline's: a ResNetForImageClassification (folder or Hub id), fed as its "
        "preprocessor_config.json says",
    )
    num_train_inference_steps: int = argument(10, "sampling steps of the chain, and of the inversion that starts it")
    num_fixed_point_iterations: int = argument(3, "network evaluations per inversion step beyond the first")
    sketch_guidance_scale: float = argument(1.0, "classifier-free guidance on the drawing inside the chain; 1 = off")
    classifier_guidance_scale: float = argument(0.0, "eq. 4 inside the chain, not differentiated; 0 = off")
    perceptual_guidance_scale: float = argument(0.0, "guidance by eq. 5 inside the chain, not differentiated; 0 = off")

    backprop: Literal["chain", "per_step"] = argument(
        "chain", "differentiate the chain, or only x_0 as predicted at one random step of it"
    )
    truncate_backprop_steps: int | None = argument(None, "differentiate this many last steps of the chain only")
    gradient_checkpointing: bool = argument(False, "recompute each step's activations in the backward pass")

    train_shards: str | None = argument(
        None,
        "webdataset shards of pairs in the place of `train_data_dir`, for example `pairs-{000000..000099}.tar`; needs "
        "`max_train_steps`",
    )
    shuffle_buffer: int = argument(256, "pairs of a shard that are held in memory and shuffled together")
    conditioning_image_column: str | None = argument(
        None, "`dataset_name` has this column of drawings, one or a list per photo; left out: it is a folder of photos"
    )
    image_column: str = argument("image", "its column of photos")
    label_column: str = argument("label", "its column of classes, if it has one")
    lora_rank: int | None = argument(
        None, "train low-rank adapters of this rank (to `output_dir/lora`) instead of all weights; needs peft"
    )
    lora_alpha: float | None = argument(
        None, "the adapters' change is scaled by this over the rank; the rank if left out"
    )

    free_hand_strength: float | None = argument(
        None,
        "largest strength of the distortion of drawings, 0 = as they are; left out: 0.5 for contours, 0 for drawings that "
        "people made",
    )
    class_balance_power: float = argument(0.5, "0 samples photos evenly, 1 classes, between them in proportion")
    max_train_samples: int | None = argument(None, "train on this many photos only, chosen by the hash of their names")
    inversion_batch_size: int = argument(16, "photos inverted at once")

    num_validation_samples: int = argument(16, "validation photos on which the constraints are measured")
    num_validation_images: int = argument(8, "validation drawings in the picture")
    ddpm_num_inference_steps: int = argument(25, "sampling steps for the picture")


def check_finetune_arguments(args: FinetuneArguments) -> None:
    """Raises `ValueError` for a value out of range, or two that exclude each other."""
    if args.pretrained_model_name_or_path is None:
        raise ValueError("`pretrained_model_name_or_path` is needed: the pipeline (folder or Hub id) to fine-tune.")
    if not 0 <= args.identity_weight <= 1:
        raise ValueError(f"`identity_weight` must be in [0, 1], but got {args.identity_weight}.")
    if args.free_hand_strength is not None:
        check_free_hand(strength=args.free_hand_strength)
    at_least = {"num_train_inference_steps": 1, "num_fixed_point_iterations": 0, "inversion_batch_size": 1}
    at_least |= {"max_train_samples": 1, "num_validation_samples": 1, "num_validation_images": 1}
    at_least |= {"ddpm_num_inference_steps": 1, "lora_rank": 1, "shuffle_buffer": 1}
    for name, minimum in at_least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {value}.")
    kept = args.truncate_backprop_steps
    if kept is not None and not 1 <= kept <= args.num_train_inference_steps:
        raise ValueError(
            "`truncate_backprop_steps` must be between 1 and `num_train_inference_steps`, "
            f"{args.num_train_inference_steps}, but got {kept}."
        )
    if kept is not None and args.backprop == "per_step":
        raise ValueError("`truncate_backprop_steps` is for `--backprop chain`: per_step goes back through one step.")
    if args.train_shards is not None:
        for name in ("train_data_dir", "dataset_name", "max_train_samples"):
            if getattr(args, name) is not None:
                raise ValueError(f"`{name}` and `train_shards` cannot both be given: the shards are the data.")
        if args.max_train_steps is None:
            raise ValueError("`max_train_steps` is needed with `train_shards`: how long an epoch is, is not known.")


def check_pipeline(pipeline: DiffSketchingPipeline, args: FinetuneArguments) -> None:
    """Raises `ValueError` for a component that the constraints need and the pipeline lacks, or another resolution."""
    weight, scale = args.identity_weight, args.classifier_guidance_scale
    perceptual_scale = args.perceptual_guidance_scale
    guided = f"`perceptual_guidance_scale` other than 0 (it is {perceptual_scale})"
    needs = [
        ("sketcher", weight < 1, f"`identity_weight` below 1 (it is {weight})"),
        (
            "sketch_encoder",
            weight < 1 and args.perceptual_net == "sketch_encoder",
            f"`identity_weight` below 1 (it is {weight})",
        ),
        (
            "image_encoder",
            weight > 0 and args.image_encoder_name_or_path is None,
            f"`identity_weight` above 0 (it is {weight})",
        ),
        ("classifier", scale != 0, f"`classifier_guidance_scale` other than 0 (it is {scale})"),
        ("sketcher", perceptual_scale != 0, guided),
        ("sketch_encoder", perceptual_scale != 0, guided),
    ]
    for name, is_needed, reason in needs:
        if is_needed and getattr(pipeline, name) is None:
            raise ValueError(
                f"{reason} needs the component `{name}`, which {args.pretrained_model_name_or_path!r} does not have: "
                "train it and join it with assemble.py."
            )
    if not pipeline.takes_sketch:
        raise ValueError(
            f"the UNet must take the drawing as its {pipeline.sample_channels + 1}th input channel, but {args.pretrained_model_name_or_path!r} has "
            f"{pipeline.unet.config.in_channels}: add it with `diffsketching_pipeline.expand_unet_for_sketch`."
        )
    if not isinstance(pipeline.scheduler, DDIMScheduler):
        raise ValueError(f"the chain is DDIM's, but the pipeline has a {type(pipeline.scheduler).__name__}.")
    for name in ("num_train_inference_steps", "ddpm_num_inference_steps"):
        try:
            check_scheduler(pipeline.scheduler, getattr(args, name))
        except ValueError as error:
            raise ValueError(
                f"`{name}={getattr(args, name)}` does not fit the pipeline's scheduler: {error}"
            ) from error
    if (args.resolution, args.resolution) != (pipeline.height, pipeline.width):
        raise ValueError(
            f"`resolution` must be the pipeline's, {pipeline.height} x {pipeline.width}, but got {args.resolution}."
        )


# ---- the noise that each photo comes from ---------------------------------------------------------------------------


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
        """Where x_T of a photo [3, R, R] lies, whether it is there or not."""
        content = self.prefix + f"{class_label} {tuple(pixel_values.shape)}".encode() + pixel_values.numpy().tobytes()
        name = hashlib.sha256(content).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def load(self, pixel_values: Tensor, class_label: int) -> Tensor | None:
        """x_T [C, H, W] of a photo [3, R, R], or None where the file is missing or damaged."""
        try:
            latents = load_file(self.path(pixel_values, class_label))["latents"]
        except Exception:  # whatever is wrong with the file, it is made again
            return None
        return latents if latents.shape == self.shape else None

    def save(self, pixel_values: Tensor, class_label: int, latents: Tensor) -> None:
        """Writes aside and renames."""
        path = self.path(pixel_values, class_label)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        os.close(descriptor)
        try:
            save_file({"latents": latents.float().cpu().contiguous()}, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


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


# ---- data -----------------------------------------------------------------------------------------------------------


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
        max_samples: keep this many photos only, chosen by the hash of their names.
    """

    def __init__(
        self,
        photos: PhotoSketchDataset,
        cache: NoiseCache,
        args: FinetuneArguments,
        train: bool = True,
        max_samples: int | None = None,
    ):
        self.photos, self.cache, self.train = photos, cache, train
        self.num_steps = args.num_train_inference_steps
        by_people = isinstance(photos, PairedPhotoDataset)
        strength = args.free_hand_strength
        self.strength = strength if strength is not None else 0.0 if by_people else 0.5
        names = [f"{label}/{name}" for label, name in zip(photos.class_labels, photos.ids, strict=True)]
        hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
        self.indices = sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:max_samples])
        self.class_labels = [photos.class_labels[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

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
            pixels = self.photos.view(self.indices[index])[0]
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
        photo_index, label = self.indices[index], self.class_labels[index]
        rng = self._rng(index, epoch)
        flip = self._is_flipped(rng)
        view, name = self.photos.view(photo_index), self.photos.ids[photo_index]
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


def class_names_of(pipeline: DiffSketchingPipeline) -> list[str]:
    """What the data may call the pipeline's classes: their names or, where it has none, their indices as text."""
    return [pipeline.id2label.get(index, str(index)) for index in range(pipeline.num_classes)]


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


# ---- the chain ------------------------------------------------------------------------------------------------------


def run_chain(
    unet: Callable[..., Any],
    unet_config: Any,
    scheduler: DDIMScheduler,
    batch: dict[str, Tensor],
    args: FinetuneArguments,
    components: Mapping[str, Any] | None = None,
    null_class: int | None = None,
) -> Tensor:
    """
    x̂_0 of each photo's x_T and drawing, differentiable with respect to the parameters of `unet`.

    Args:
        unet: called as a conditional `UNet2DModel`; a wrapped one is called through its wrapper.
        unet_config: its config.
        scheduler: owns the noise schedule.
        batch: `latents` (x_T) [B, C, H, W], `sketch` [B, 1, R, R], `class_label` and `chain_step` [B].
        args: says how many steps there are, which of them are differentiated, and how they are guided.
        components: what the guidance that is on needs, by name: `classifier`; `sketcher`, `sketch_encoder` and `vae`.
        null_class: the UNet's "no class", which classifier-free guidance puts in the place of the class, as in sampling.

    Returns:
        `Tensor`: [B, C, H, W] in the UNet's own space, unclipped.
    """
    sampler = sampling_scheduler(scheduler, args.num_train_inference_steps, batch["latents"].device)
    labels = batch["class_label"]
    null_labels = None if null_class is None else torch.full_like(labels, null_class)
    conditioning = Conditioning(labels, batch["sketch"], null_class_labels=null_labels)
    called = checkpointed(unet) if args.gradient_checkpointing else unet
    told = (called, unet_config, scheduler, conditioning)
    predictor = GuidedPredictor(
        *told,
        sketch_guidance_scale=args.sketch_guidance_scale,
        callbacks=guidance_callbacks(args),
        num_steps=len(sampler.timesteps),
        components=components,
    )

    if args.backprop == "chain":
        return denoise(
            sampler,
            predictor,
            batch["latents"],
            sampler.timesteps,
            truncate_backprop_steps=args.truncate_backprop_steps,
        )

    visited, steps = [batch["latents"]], batch["chain_step"]

    def remember(step_index: int, timestep: Tensor, latents: Tensor, _: NoisePrediction) -> tuple[Tensor, bool]:
        visited.append(latents)
        return latents, True

    with torch.no_grad():
        denoise(sampler, predictor, batch["latents"], sampler.timesteps[: int(steps.max())], on_step_end=remember)
    latents = torch.stack(visited)[steps, torch.arange(len(steps), device=steps.device)]
    plain = GuidedPredictor(*told, sketch_guidance_scale=args.sketch_guidance_scale)
    return plain(latents, sampler.timesteps[steps]).pred_original_sample


def guidance_callbacks(args: FinetuneArguments) -> list[GuidanceCallback]:
    """Return the guidance by gradients that the arguments turn on; the chain is guided by them as sampling is."""
    callbacks: list[GuidanceCallback] = []
    if args.classifier_guidance_scale != 0:
        callbacks.append(ClassifierGuidanceCallback(args.classifier_guidance_scale))
    if args.perceptual_guidance_scale != 0:
        callbacks.append(SketchGuidanceCallback(args.perceptual_guidance_scale))
    return callbacks


def decoded(pipeline: DiffSketchingPipeline, images: Tensor) -> Tensor:
    """Photos [B, 3, R, R] of what the chain made, through the frozen decoder where it works on latents; differentiable."""
    return images if pipeline.vae is None else decode_latents(pipeline.vae, images)


def make_loss(pipeline: DiffSketchingPipeline, args: FinetuneArguments) -> DiffSketchingLoss:
    """Eq. 7 on the frozen networks of the pipeline, or those that the arguments name in their place."""
    perceptual = identity = None
    if args.perceptual_net != "sketch_encoder":
        perceptual = SketchPerceptualLoss.from_lpips(args.perceptual_net)
    elif pipeline.sketch_encoder is not None:
        perceptual = SketchPerceptualLoss(pipeline.sketch_encoder)
    if args.image_encoder_name_or_path is not None:
        identity = load_identity_loss(args.image_encoder_name_or_path)
    elif pipeline.image_encoder is not None:
        identity = ImageIdentityLoss(pipeline.image_encoder)
    return DiffSketchingLoss(pipeline.sketcher, perceptual, identity, args.identity_weight).to(pipeline.device)


def load_identity_loss(name_or_path: str) -> ImageIdentityLoss:
    """
    L_i on a ResNet of its own, with mean, standard deviation and size of its preprocessor, if it has one.

    Raises:
        ValueError: it does not take photos.
    """
    encoder = ResNetForImageClassification.from_pretrained(name_or_path).float().eval().requires_grad_(False)
    if encoder.config.num_channels != 3:
        raise ValueError(
            f"`image_encoder_name_or_path` must take photos, but {name_or_path!r} takes {encoder.config.num_channels} "
            "channel(s)."
        )
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(name_or_path)[0]
    except OSError:
        return ImageIdentityLoss(encoder)
    size = settings.get("crop_size") or settings.get("size")
    size = max(size.values()) if isinstance(size, dict) else size
    return ImageIdentityLoss(encoder, settings.get("image_mean"), settings.get("image_std"), size)


class FinetuneValidation:
    """
    The constraints on fixed validation photos and drawings, and a picture: drawings, photos before, photos after.

    `perceptual_loss_swapped` is reached when each photo's noise is given the drawing of another photo, and is held against
    that: a network that ignores the drawing in favour of what the noise remembers cannot lower it.
    """

    def __init__(
        self,
        args: FinetuneArguments,
        dataset: ChainDataset,
        pipeline: DiffSketchingPipeline,
        loss: DiffSketchingLoss,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        # Before and after are to differ by training alone, not by precision.
        self.autocast = autocast
        self.args = dataclasses.replace(args, backprop="chain", truncate_backprop_steps=None)
        self.pipeline, self.loss = pipeline, loss
        samples = [dataset.sample(i) for i in range(len(dataset))]
        self.batch: dict[str, Tensor] = {
            name: torch.stack([torch.as_tensor(sample[name]) for sample in samples])
            for name in ("pixel_values", "latents", "sketch", "class_label", "chain_step")
        }
        drawn = [i for i, sample in enumerate(samples) if (sample["sketch"] < 0).any()]
        shown = min(args.num_validation_images, len(drawn))
        self.shown = [drawn[i * len(drawn) // shown] for i in range(shown)]
        self.before = self.pictures(pipeline.unet) if self.shown else None

    @torch.no_grad()
    def pictures(self, unet: Any) -> Tensor:
        """Photos of the shown drawings with fixed seeds, [N, 3, R, R] in [-1, 1]."""
        pretrained, null_class = self.pipeline.unet, self.pipeline.null_class
        labels = [None if label == null_class else label for label in self.batch["class_label"][self.shown].tolist()]
        self.pipeline.register_modules(unet=unet)
        try:
            with self.autocast():
                images = self.pipeline(
                    self.batch["sketch"][self.shown],
                    class_labels=labels,
                    num_images_per_sketch=1,
                    num_inference_steps=self.args.ddpm_num_inference_steps,
                    generator=[torch.Generator().manual_seed(i) for i in range(len(self.shown))],
                    output_type="pt",
                ).images
        finally:
            self.pipeline.register_modules(unet=pretrained)
        return images.float().cpu() * 2 - 1

    def chain_losses(self, unet: Any, batch: dict[str, Tensor]) -> DiffSketchingLosses:
        """Eq. 7 of what the chain makes of a batch."""
        pipeline = self.pipeline
        pred = run_chain(
            unet, unet.config, pipeline.scheduler, batch, self.args, pipeline.components, pipeline.null_class
        )
        return self.loss(decoded(pipeline, pred), batch["pixel_values"], batch["sketch"])

    def __call__(self, unet: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The mean constraints and the picture of a UNet."""
        values: dict[str, list[Tensor]] = {}
        size = self.args.train_batch_size
        swapped = self.batch["sketch"].roll(1, dims=0)
        for first in range(0, len(swapped), size):
            part = slice(first, first + size)
            batch = {name: value[part].to(unet.device) for name, value in self.batch.items()}
            losses = self.chain_losses(unet, batch)
            found = {"loss": losses.loss, "identity_loss": losses.identity, "perceptual_loss": losses.perceptual}
            if losses.perceptual is not None and len(swapped) > 1:
                other = self.chain_losses(unet, batch | {"sketch": swapped[part].to(unet.device)})
                found["perceptual_loss_swapped"] = other.perceptual
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, []).append(value)
        metrics = {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
        if self.before is None:
            return metrics, {}
        rows = [self.batch["sketch"][self.shown], self.before, self.pictures(unet)]
        return metrics, {"sketch_before_after": image_grid(rows, scale=2)}


# ---- the script -----------------------------------------------------------------------------------------------------


def load_frozen_pipeline(args: FinetuneArguments) -> DiffSketchingPipeline:
    """The pretrained pipeline in float32, none of whose parameters learns."""
    pipeline = DiffSketchingPipeline.from_pretrained(str(args.pretrained_model_name_or_path))
    check_pipeline(pipeline, args)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def load_photos(args: FinetuneArguments, pipeline: DiffSketchingPipeline) -> dict[str, PhotoSketchDataset]:
    """
    Photos on disk of both splits, never augmented, with what can be drawn of them; see the head of this file for the layouts.

    Raises:
        ValueError: there are none, or their classes are not those of the pipeline.
    """
    id2label = pipeline.id2label
    if args.conditioning_image_column is not None and args.dataset_name is None:
        raise ValueError("`conditioning_image_column` is a column of `dataset_name`: give that, too.")
    pairs = None
    if args.dataset_name is not None and args.conditioning_image_column is not None:
        columns = (args.image_column, args.conditioning_image_column, args.label_column)
        pairs = load_dataset_pairs(args.dataset_name, *columns, cache_dir=args.cache_dir)
    elif args.train_data_dir is not None and (Path(args.train_data_dir) / "sketch").is_dir():
        pairs = find_pairs(Path(args.train_data_dir) / "photo", Path(args.train_data_dir) / "sketch")
    shared: dict[str, Any] = {
        "resolution": args.resolution,
        "seed": args.seed,
        "train": False,
        "cache_dir": args.cache_dir,
    }
    if pairs is not None:
        names = class_names_of(pipeline)
        shared["null_class"] = pipeline.null_class
        return {
            split: PairedPhotoDataset(members, names, split=split, **shared)
            for split, members in split_pairs(pairs).items()
        }
    root = resolve_data_dir(args)
    photos = {split: PhotoSketchDataset(root, split, **shared) for split in ("train", "validation")}
    if photos["train"].id2label != id2label:
        raise ValueError(
            f"`train_data_dir` has the classes {list(photos['train'].id2label.values())}, but the pipeline has "
            f"{list(id2label.values())}."
        )
    return photos


def main(args: FinetuneArguments) -> None:
    """Fine-tunes as the arguments say; the pipeline lies in `output_dir/pipeline` afterwards."""
    check_finetune_arguments(args)
    pipeline = load_frozen_pipeline(args)
    streamed = ShardedChainData(pipeline, args) if args.train_shards is not None else None
    photos = {"validation": streamed.validation_photos()} if streamed is not None else load_photos(args, pipeline)
    cache_folder = Path(args.cache_dir if args.cache_dir is not None else args.output_dir) / "inverted"
    cache = NoiseCache(cache_folder, pipeline.unet, pipeline.scheduler, args, pipeline.vae)
    validation_dataset = ChainDataset(photos["validation"], cache, args, False, args.num_validation_samples)
    weights = None
    dataset: Any = streamed
    if streamed is None:
        dataset = ChainDataset(photos["train"], cache, args, max_samples=args.max_train_samples)
        weights = class_balanced_weights(dataset.class_labels, args.class_balance_power)

    unet = type(pipeline.unet).from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    if args.lora_rank is not None:
        torch.manual_seed(args.seed)
        add_lora(unet, args.lora_rank, args.lora_alpha)
    trainer = Trainer(args, {"unet": unet}, dataset, sample_weights=weights)
    accelerator = trainer.accelerator
    pipeline.to(accelerator.device)

    # 1. Photos to noise, each process its share of those that this run will see
    inverted = [(validation_dataset, validation_dataset.keys())]
    if streamed is None:
        inverted.insert(0, (dataset, dataset.keys(trainer.all_draws())))
    progress = tqdm(
        itertools.chain.from_iterable(each.views(keys) for each, keys in inverted),
        desc="Inverting photos",
        total=sum(len(keys) for _, keys in inverted),
        unit="photo",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        leave=False,
    )
    groups = in_groups(progress, args.inversion_batch_size)
    mine = itertools.islice(groups, accelerator.process_index, None, accelerator.num_processes)
    fill_noise_cache(cache, mine, pipeline.unet, pipeline.scheduler, args, accelerator.device, trainer.time_is_up)
    # Every process waits here, and all of them go on or none.
    if accelerator.gather(torch.tensor(trainer.time_is_up(), device=accelerator.device)).any():
        logger.info("`max_train_minutes` are over before all photos were inverted: start again to go on from here")
        return

    # 2. Training
    loss = make_loss(pipeline, args)
    validation = None
    if accelerator.is_main_process:
        validation = FinetuneValidation(args, validation_dataset, pipeline, loss, accelerator.autocast)
    if streamed is None:
        pipeline.unet.to("cpu")  # nothing needs the frozen one any more

    def compute_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        if "latents" not in batch:
            frozen = (pipeline.unet, pipeline.scheduler, args, pipeline.vae)
            batch = batch | {"latents": invert_photos(batch["pixel_values"], batch["class_label"], *frozen)}
        pred = run_chain(
            trainer.modules["unet"],
            unet.config,
            pipeline.scheduler,
            batch,
            args,
            pipeline.components,
            pipeline.null_class,
        )
        losses = loss(decoded(pipeline, pred), batch["pixel_values"], batch["sketch"])
        terms = {"perceptual_loss": losses.perceptual, "identity_loss": losses.identity}
        logged = {name: term.detach().mean() for name, term in terms.items() if term is not None}
        return {"loss": losses.loss.mean(), **logged}

    # Only the main process calls it, and only there is a validation.
    trainer.train(compute_loss, (lambda: validation(trainer.unwrap("unet"))) if validation is not None else None)

    # 3. The pipeline with the averaged weights, all of it in one type
    averaged = trainer.ema_copy("unet")
    if averaged is not None:
        pipeline.register_modules(unet=averaged)
        pipeline.to("cpu", getattr(torch, args.save_dtype))
        with write_folder(Path(args.output_dir) / "pipeline") as folder:
            pipeline.save_pretrained(folder)
        if args.lora_rank is not None:
            with write_folder(Path(args.output_dir) / "lora") as folder, trainer.ema_weights():
                save_lora(trainer.unwrap("unet"), folder)
        print(Path(args.output_dir) / "pipeline")
        trainer.push(Path(args.output_dir) / "pipeline")


if __name__ == "__main__":
    main(parse_args(FinetuneArguments, sys.argv[1:], description=__doc__))
