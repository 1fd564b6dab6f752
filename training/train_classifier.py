# SPDX-License-Identifier: Apache-2.0
"""Trains the noisy image classifier p(y | x_t, t) that guides sampling towards a class (eq. 4).

    accelerate launch training/train_classifier.py training/configs/classifier_garments64.yaml \
        --train_data_dir garments --scheduler_name_or_path diffsketching-unet/pipeline

It sees photos (or, for a latent UNet, their latents: `--pretrained_vae_model_name_or_path`) noised by the schedule of the
UNet it will guide, at every timestep, and is told the timestep. The result, with averaged weights, is the folder `output_dir/classifier` for `DiffSketchingPipeline(classifier=...)`.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffsketching_pipeline import NoisyImageClassifier
from diffsketching_pipeline.autoencoding import decode_latents, get_scale_factor
from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import TrainingArguments, num_readers, parse_args, resolve_data_dir
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.keyed import (
    add_noise_and_timestep,
    class_balanced_weights,
    clean_images,
    keyed_generator,
)
from diffsketching_pipeline.training.latents import LatentDataset, load_vae
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.starts import Start, find_start, with_classifier_classes
from diffsketching_pipeline.training.trainer import Trainer


NUM_QUARTERS = 4


@dataclass
class ClassifierTrainingArguments(TrainingArguments):
    """The arguments that this script adds to [`TrainingArguments`]."""

    output_dir: str = argument("noisy-classifier", "where checkpoints, samples, logs and `classifier` are written")

    block_out_channels: list[int] = argument([32, 64, 96, 160], "NoisyImageClassifier's `block_out_channels`")
    down_block_types: list[str] = argument(
        ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "NoisyImageClassifier's `down_block_types`",
    )
    layers_per_block: int = argument(1, "NoisyImageClassifier's `layers_per_block`")
    attention_head_dim: int = argument(32, "channels of one attention head")
    norm_num_groups: int = argument(16, "NoisyImageClassifier's `norm_num_groups`")
    dropout: float = argument(0.1, "dropout inside the residual blocks")

    pretrained_vae_model_name_or_path: str | None = argument(
        None, "classify the latents of this autoencoder, for a UNet that denoises them"
    )
    crops_per_photo: int = argument(4, "crops of each photo whose latents are cached")
    unet_name_or_path: str | None = argument(
        None,
        "pipeline (folder or Hub id), or folder of a UNet2DModel, whose downsampling half the classifier starts as; the "
        "arguments above but `dropout` are then the UNet's own",
    )
    scheduler_name_or_path: str | None = argument(
        None, "pipeline (folder or Hub id) whose noise schedule is used; it overrides the two arguments below"
    )
    ddpm_num_steps: int = argument(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = argument(
        "squaredcos_cap_v2", "noise schedule"
    )
    class_balance_power: float = argument(0.5, "0 samples photos evenly, 1 classes, between them in proportion")
    label_smoothing: float = argument(0.0, "share of the target that is spread over all classes, in [0, 1)")
    color_jitter: float = argument(0.15, "augmentation, see `PhotoSketchDataset`")

    num_validation_samples: int = argument(256, "validation photos on which accuracy is measured at four noise levels")
    num_validation_images: int = argument(10, "validation photos in the picture")


def check_classifier_arguments(args: ClassifierTrainingArguments) -> None:
    """Raises `ValueError` for a smoothing outside [0, 1), fewer than one validation photo, or two networks to start from."""
    if not 0 <= args.label_smoothing < 1:
        raise ValueError(f"`label_smoothing` must be in [0, 1), but got {args.label_smoothing}.")
    for name in ("num_validation_samples", "num_validation_images", "crops_per_photo"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {getattr(args, name)}.")
    if args.unet_name_or_path is not None and args.pretrained_model_name_or_path is not None:
        raise ValueError(
            "`unet_name_or_path` and `pretrained_model_name_or_path` cannot both be given: a classifier starts from one of "
            f"them, but they are {args.unet_name_or_path!r} and {args.pretrained_model_name_or_path!r}."
        )


def make_scheduler(args: ClassifierTrainingArguments) -> DDPMScheduler:
    """The noise schedule of `scheduler_name_or_path`, or the one the arguments describe; used to add noise only."""
    if args.scheduler_name_or_path is not None:
        return DDPMScheduler.from_pretrained(find_start(args.scheduler_name_or_path), subfolder="scheduler")
    return DDPMScheduler(num_train_timesteps=args.ddpm_num_steps, beta_schedule=args.ddpm_beta_schedule)


def make_classifier(
    args: ClassifierTrainingArguments, id2label: dict[int, str], vae: Any = None
) -> NoisyImageClassifier:
    """
    A new classifier, one that starts as half of the UNet of `unet_name_or_path`, or the one of
    `pretrained_model_name_or_path`; of the latents of `vae` if it is given.

    Raises:
        ValueError: the pretrained network has another resolution than the data.
    """
    side, channels = args.resolution // get_scale_factor(vae), 3 if vae is None else vae.config.latent_channels
    if args.unet_name_or_path is not None:
        path = args.unet_name_or_path
        start = Start.read(path)
        unet = start.load(UNet2DModel, "unet")
        # Its classes may be others than the data's: it is told none of them.
        known, number = unet.config.num_class_embeds, len(start.id2label or id2label)
        if unet.config.sample_size != side or known not in (None, number + 1):
            raise ValueError(
                f"`unet_name_or_path` must have sample_size {side} and no classes or {number + 1} (one "
                f"for none), but {path!r} has {unet.config.sample_size} and {known}."
            )
        torch.manual_seed(args.seed)
        null_class = None if known is None else number
        return NoisyImageClassifier.from_unet(unet, len(id2label), null_class, args.dropout, channels)
    if args.pretrained_model_name_or_path is None:
        torch.manual_seed(args.seed)
        return NoisyImageClassifier(
            sample_size=side,
            in_channels=channels,
            num_classes=len(id2label),
            block_out_channels=tuple(args.block_out_channels),
            down_block_types=tuple(args.down_block_types),
            layers_per_block=args.layers_per_block,
            attention_head_dim=args.attention_head_dim,
            norm_num_groups=args.norm_num_groups,
            dropout=args.dropout,
        )
    start = Start.read(args.pretrained_model_name_or_path)
    classifier = start.load(NoisyImageClassifier, "classifier")
    for name, expected in (("sample_size", side), ("in_channels", channels)):
        if classifier.config[name] != expected:
            raise ValueError(
                f"`pretrained_model_name_or_path` must have {name} {expected}, but "
                f"{args.pretrained_model_name_or_path!r} has {classifier.config[name]}."
            )
    return with_classifier_classes(classifier, start.match(id2label, classifier.config.num_classes))


def classify_noisy(classifier: Any, scheduler: DDPMScheduler, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """
    Noises a batch and classifies it.

    Args:
        classifier: called as a [`NoisyImageClassifier`].
        scheduler: owns the noise schedule.
        batch: `pixel_values` or `latents`, and `noise`, `[B, C, H, W]`, `timestep` `[B]`.

    Returns:
        The logits `[B, num_classes]` and the noisy images `[B, C, H, W]`.
    """
    noisy_images = scheduler.add_noise(clean_images(batch), batch["noise"], batch["timestep"])
    return classifier(noisy_images, batch["timestep"]).logits.float(), noisy_images


def with_captions(images: Tensor, captions: list[str], side: int = 128) -> Tensor:
    """Enlarges `[N, 3, H, W]` in [-1, 1] to about `side` pixels and writes a line of text on each."""
    scale = max(1, side // images.shape[-1])
    enlarged = F.interpolate(images.cpu().clamp(-1, 1), scale_factor=float(scale))
    pixels = ((enlarged + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    captioned = []
    for array, caption in zip(pixels, captions, strict=True):
        picture = Image.fromarray(array)
        draw = ImageDraw.Draw(picture)
        draw.rectangle(draw.textbbox((2, 1), caption), fill="black")
        draw.text((2, 1), caption, fill="white")
        captioned.append(pil_to_tensor(picture))
    return torch.stack(captioned).float() / 127.5 - 1


class ClassifierValidation:
    """
    Accuracy on fixed validation photos with fixed noise, one timestep of each quarter of the schedule per photo, and a
    picture: a row per quarter (the least noise first), captioned "predicted (true)".
    """

    def __init__(
        self, args: ClassifierTrainingArguments, dataset: PhotoSketchDataset, scheduler: DDPMScheduler, vae: Any = None
    ):
        self.scheduler, self.batch_size, self.vae = scheduler, args.train_batch_size, vae
        self.id2label = dataset.id2label
        count = min(args.num_validation_samples, len(dataset))
        samples = [dataset.sample(i * len(dataset) // count) for i in range(count)]
        self.images = torch.stack([clean_images(sample) for sample in samples])
        self.labels = torch.tensor([sample["class_label"] for sample in samples])
        self.noise = torch.stack(
            [torch.randn(self.images.shape[1:], generator=keyed_generator(args.seed, i)) for i in range(count)]
        )
        shown = min(args.num_validation_images, count)
        self.shown = [i * count // shown for i in range(shown)]

    def timesteps(self, quarter: int) -> Tensor:
        """Timesteps `[N]` spread evenly over one quarter of the schedule, in an order unrelated to the classes'."""
        steps = self.scheduler.config["num_train_timesteps"]
        spread = (torch.arange(len(self.labels), dtype=torch.float64) * 0.6180339887) % 1
        return ((quarter + spread) * (steps / NUM_QUARTERS)).long()

    def logits(self, classifier: Any, quarter: int) -> tuple[Tensor, Tensor]:
        """Logits `[N, num_classes]` and noisy images `[N, C, H, W]` at one quarter, on the CPU."""
        results = []
        batch = {"pixel_values": self.images, "noise": self.noise, "timestep": self.timesteps(quarter)}
        for first in range(0, len(self.labels), self.batch_size):
            part = slice(first, first + self.batch_size)
            on_device = {name: value[part].to(classifier.device) for name, value in batch.items()}
            results.append([output.cpu() for output in classify_noisy(classifier, self.scheduler, on_device)])
        logits, noisy_images = zip(*results, strict=True)
        return torch.cat(logits), torch.cat(noisy_images)

    def __call__(self, classifier: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The losses, accuracies and the picture of a classifier."""
        metrics, rows = {}, []
        for quarter in range(NUM_QUARTERS):
            logits, noisy_images = self.logits(classifier, quarter)
            predicted = logits.argmax(dim=1)
            name = f"quarter_{quarter + 1}"
            metrics[f"accuracy_{name}"] = float((predicted == self.labels).float().mean())
            metrics[f"loss_{name}"] = float(F.cross_entropy(logits, self.labels))
            captions = [
                f"{self.id2label[int(predicted[i])]} ({self.id2label[int(self.labels[i])]})" for i in self.shown
            ]
            shown = noisy_images[self.shown]
            if self.vae is not None:
                shown = torch.cat([decode_latents(self.vae, latents[None]) for latents in shown])
            rows.append(with_captions(shown, captions))
        return metrics, {"noisy_predicted": image_grid(rows)}


def main(args: ClassifierTrainingArguments) -> None:
    """Trains as the arguments say; the classifier lies in `output_dir/classifier` afterwards."""
    check_classifier_arguments(args)
    root = resolve_data_dir(args)
    options: dict[str, Any] = {"contours": "none", "color_jitter": args.color_jitter, "num_readers": num_readers(args)}
    dataset_class: type[PhotoSketchDataset] | type[LatentDataset] = PhotoSketchDataset
    vae = None
    if args.pretrained_vae_model_name_or_path is not None:
        dataset_class, vae = LatentDataset, load_vae(args.pretrained_vae_model_name_or_path)
        options |= {"vae": vae, "crops_per_photo": args.crops_per_photo}
    make_dataset = partial(
        dataset_class, root, resolution=args.resolution, seed=args.seed, cache_dir=args.cache_dir, **options
    )
    dataset = make_dataset(split="train", train=True, max_samples=args.max_train_samples)
    validation_dataset = make_dataset(split="validation", train=False)
    scheduler = make_scheduler(args)
    trainer = Trainer(
        args,
        {"classifier": make_classifier(args, dataset.id2label, vae)},
        dataset,
        transform=partial(add_noise_and_timestep, num_train_timesteps=scheduler.config["num_train_timesteps"]),
        sample_weights=class_balanced_weights(dataset.class_labels, args.class_balance_power),
    )
    validation = ClassifierValidation(args, validation_dataset, scheduler, vae)

    def compute_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, _ = classify_noisy(trainer.modules["classifier"], scheduler, batch)
        loss = F.cross_entropy(logits, batch["class_label"], label_smoothing=args.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch["class_label"]).float().mean()}

    trainer.train(compute_loss, lambda: validation(trainer.unwrap("classifier")))
    averaged = trainer.ema_copy("classifier")
    if averaged is not None:
        with write_folder(Path(args.output_dir) / "classifier") as folder:
            averaged.save_pretrained(folder)
        print(Path(args.output_dir) / "classifier")
        trainer.push(Path(args.output_dir) / "classifier")


if __name__ == "__main__":
    with stoppable(__file__):
        main(parse_args(ClassifierTrainingArguments, sys.argv[1:], description=__doc__))
