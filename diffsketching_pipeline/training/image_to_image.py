# SPDX-License-Identifier: Apache-2.0
"""Photo-Sketching's GAN in both directions: photos to drawings, and drawings to photos. See `train_sketcher.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.images.contours import DEFAULT_LINE_GAIN
from diffsketching_pipeline.images.free_hand import check_free_hand
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher
from diffsketching_pipeline.training.arguments import TrainingArguments, num_readers, resolve_data_dir
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.discriminators import PatchDiscriminator, discriminator_distance
from diffsketching_pipeline.training.modules import load_pretrained
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.trainer import Trainer


@dataclass
class SketcherArguments(TrainingArguments):
    direction: Literal["photo_to_sketch", "sketch_to_photo"] = argument("photo_to_sketch", "what is made of what")
    ngf: int = argument(64, "channels of the generator's first convolution")
    n_blocks: int = argument(9, "residual blocks of the generator")
    dropout: float = argument(0.0, "dropout in the generator's residual blocks")
    ndf: int = argument(64, "channels of the discriminator's first convolution")
    discriminator_layers: int = argument(2, "halvings of the discriminator; 2 look at patches of 34 pixels, 3 at 70")
    l1_weight: float = argument(100.0, "weight of the L1 distance to the nearest valid drawing")
    stroke_weight: float = argument(6.0, "how much more strokes count in that distance than paper; not for photos")
    gan_weight: float = argument(1.0, "weight of the adversarial term")
    free_hand_share: float = argument(
        0.0,
        "share of the drawings that are redrawn as an unskilled hand would, see train_unet.py; only where they are given",
    )
    free_hand_strength: float = argument(1.0, "largest strength of that")
    learning_rate: float = argument(2e-4, "the learning rate of both networks after the warm-up")
    adam_beta1: float = argument(0.5, "AdamW's beta 1; GANs need less momentum")
    adam_weight_decay: float = argument(0.0, "AdamW's weight decay")


def minimum_l1(prediction: Tensor, targets: Tensor, stroke_weight: float = 0.0) -> Tensor:
    """
    L1 distance to the nearest of N valid targets: mean over the batch of min_n Σ w_n |prediction - target_n| / Σ w_n.

    Args:
        prediction (`torch.Tensor`): [B, C, H, W].
        targets (`torch.Tensor`): [B, N, C, H, W].
        stroke_weight (`float`): w = 1 on paper and 1 + `stroke_weight` on strokes. Strokes cover a tenth of a drawing,
            and with equal weights an empty page is the median of all lines that might be there.
    """
    weights = 1 + stroke_weight * (1 - targets) / 2
    distances = (weights * (prediction[:, None] - targets).abs()).flatten(2).sum(-1) / weights.flatten(2).sum(-1)
    return distances.amin(-1).mean()


def source_and_targets(batch: dict[str, Any], direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the generator sees [B, C, H, W], all valid results [B, N, C', H, W], the one that the discriminator sees."""
    if direction == "photo_to_sketch":
        return batch["pixel_values"], batch["sketches"], batch["sketch"]
    return batch["sketch"], batch["pixel_values"][:, None], batch["pixel_values"]


def gan_losses(trainer: Trainer, args: SketcherArguments) -> dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]]:
    """The least-squares GAN (Mao et al., 2017): the discriminator's loss, then the generator's."""
    stroke_weight = args.stroke_weight if args.direction == "photo_to_sketch" else 0.0

    def discriminator_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        source, _, real = source_and_targets(batch, args.direction)
        with torch.no_grad():
            fake = trainer.unwrap("sketcher")(source).float()
        discriminator = trainer.modules["discriminator"]
        # One forward of both, because DDP expects one forward per backward.
        scores = discriminator(torch.cat([source, source]), torch.cat([real, fake])).float()
        return {"loss": discriminator_distance(scores)}

    def generator_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        source, targets, _ = source_and_targets(batch, args.direction)
        fake = trainer.modules["sketcher"](source).float()
        l1 = minimum_l1(fake, targets, stroke_weight)
        scores = trainer.unwrap("discriminator")(source, fake).float()
        adversarial = F.mse_loss(scores, torch.ones_like(scores))
        return {"loss": args.l1_weight * l1 + args.gan_weight * adversarial, "l1": l1, "adversarial": adversarial}

    return {"discriminator": discriminator_loss, "sketcher": generator_loss}


def check_sketcher_arguments(args: SketcherArguments) -> None:
    """Raises `ValueError` for a share or strength of redrawn drawings that cannot be, or where drawings are what is learned."""
    check_free_hand(args.free_hand_share, args.free_hand_strength)
    if args.free_hand_share > 0 and args.direction == "photo_to_sketch":
        raise ValueError("`free_hand_share` must be 0 where drawings are what is learned: see `direction`.")


def make_dataset(args: SketcherArguments, root: Path, split: str) -> PhotoSketchDataset:
    """P draws in one way: no jitter and one line gain; the reverse direction must take any drawing."""
    is_reverse = args.direction == "sketch_to_photo"
    return PhotoSketchDataset(
        root,
        split,
        args.resolution,
        args.seed,
        split == "train",
        args.cache_dir,
        contours="one" if is_reverse else "all",
        jitter=1.0 if is_reverse else 0.0,
        line_gain=(1.0, 2.6) if is_reverse else (DEFAULT_LINE_GAIN, DEFAULT_LINE_GAIN),
        free_hand_share=args.free_hand_share if split == "train" else 0.0,
        free_hand_strength=args.free_hand_strength,
        max_samples=args.max_train_samples if split == "train" else None,
        num_readers=num_readers(args),
    )


def make_models(args: SketcherArguments) -> dict[str, nn.Module]:
    """A fresh discriminator, and a generator that is fresh or `pretrained_model_name_or_path`."""
    photo_channels, sketch_channels = 3, 1
    channels = (photo_channels, sketch_channels)
    in_channels, out_channels = channels if args.direction == "photo_to_sketch" else channels[::-1]
    torch.manual_seed(args.seed)
    # By keyword: diffusers takes what is passed by position for a default, and forgets it when a config is reloaded.
    discriminator = PatchDiscriminator(
        in_channels=photo_channels + sketch_channels, ndf=args.ndf, n_layers=args.discriminator_layers
    )
    if args.pretrained_model_name_or_path is not None:
        sketcher = load_pretrained(PhotoSketcher, args.pretrained_model_name_or_path, "sketcher")
        found = (sketcher.config.in_channels, sketcher.config.out_channels)
        if found != (in_channels, out_channels):
            raise ValueError(
                f"`pretrained_model_name_or_path` must make {out_channels} channels of {in_channels} for `direction` "
                f"{args.direction}, but it makes {found[1]} of {found[0]}."
            )
        return {"discriminator": discriminator, "sketcher": sketcher}
    sketcher = PhotoSketcher(
        in_channels=in_channels, out_channels=out_channels, ngf=args.ngf, n_blocks=args.n_blocks, dropout=args.dropout
    )
    return {"discriminator": discriminator, "sketcher": sketcher}


@torch.no_grad()
def generate(model: nn.Module, source: Tensor, batch_size: int = 32) -> Tensor:
    """The generator's results [N, C, H, W] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).float().cpu() for part in source.split(batch_size)])


def sketch_metrics(result: Tensor, targets: Tensor) -> dict[str, float]:
    """
    Measure how near drawings [N, 1, H, W] are to the valid ones [N, K, 1, H, W]. A generator that draws nothing has a low L1
    distance too; the share of ink tells it from one that draws.
    """
    ink, target_ink = (((1 - drawings) / 2).mean().item() for drawings in (result, targets))
    return {"l1": minimum_l1(result, targets).item(), "ink": ink, "target_ink": target_ink}


def train(
    args: SketcherArguments, folder_name: str, metrics: Callable[[Tensor, Tensor], dict[str, float]] = sketch_metrics
) -> None:
    """
    Trains generator and discriminator, then writes the averaged generator to `output_dir/folder_name`.

    Args:
        args: see [`SketcherArguments`].
        folder_name: what the generator is called.
        metrics: `(result, targets) -> {name: value}` of the validation pairs, see [`source_and_targets`].
    """
    check_sketcher_arguments(args)
    root = resolve_data_dir(args)

    # 1. Data
    dataset, validation_dataset = make_dataset(args, root, "train"), make_dataset(args, root, "validation")
    step = max(1, len(validation_dataset) // 120)
    validation = default_collate([validation_dataset.sample(i) for i in range(0, len(validation_dataset), step)])
    source, targets, _ = source_and_targets(validation, args.direction)

    # 2. Models and loop
    trainer = Trainer(args, make_models(args), dataset, ema_modules=["sketcher"])

    def validate() -> tuple[dict[str, float], dict[str, Tensor]]:
        result = generate(trainer.unwrap("sketcher"), source)
        shown = slice(None, None, max(1, len(source) // 12))
        rows = [source[shown][:12], *(targets[shown][:12, n] for n in range(targets.shape[1])), result[shown][:12]]
        return metrics(result, targets), {"validation": image_grid(rows)}

    # 3. Train, publish the averaged generator
    trainer.train(gan_losses(trainer, args), validate)
    averaged = trainer.ema_copy("sketcher")
    if averaged is not None:
        with write_folder(Path(args.output_dir) / folder_name) as folder:
            averaged.save_pretrained(folder)
        trainer.push(Path(args.output_dir) / folder_name)
