# SPDX-License-Identifier: Apache-2.0
"""Trains the small encoders of DiffSketching on photos alone: no human drawing is needed.

    python training/train_encoders.py training/configs/sketch_encoder_garments64.yaml --train_data_dir DIR

`--task sketch`: F_s, a `ResNetForImageClassification` with one channel that names the class of a drawing. It learns on
contours of photos, and on doodles of the classes that `training/doodles.py` of the package knows, redrawn as an unskilled hand would. `--task
image`: F_i, the same on photos. `--task evaluation`: a RegNet or MobileNetV2 on photos, for `evaluate.py` and for no loss,
trained on one half of the training photos (by the SHA-256 of their file names): no number may be computed by a network that
a loss has used. Its `preprocessor_config.json` says at which side it judges.

The result is a folder in `output_dir` that `from_pretrained` loads: `sketch_encoder`, `image_encoder` or `evaluation`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from diffsketching_pipeline.command_line import argument
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.images.contours import (
    DEFAULT_LINE_GAIN,
    check_contour_source,
    contour_distribution,
    contour_to_sketch,
    resized_to_short_side,
)
from diffsketching_pipeline.images.free_hand import (
    STRAIGHTENED_SHARE,
    check_stroke_deletion,
    delete_strokes,
    free_hand_distortion,
    half_size,
    maybe_straightened,
)
from diffsketching_pipeline.images.photo_files import decode_photo
from diffsketching_pipeline.splits import in_first_half
from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import TrainingArguments, num_readers, parse_args, resolve_data_dir
from diffsketching_pipeline.training.cache import CachedPhoto
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.doodles import DOODLES, draw_carelessly, draw_doodle
from diffsketching_pipeline.training.keyed import class_balanced_weights
from diffsketching_pipeline.training.other_doodles import other_strokes
from diffsketching_pipeline.training.pictures import image_grid
from diffsketching_pipeline.training.run_folder import write_folder
from diffsketching_pipeline.training.starts import Start, with_encoder_classes
from diffsketching_pipeline.training.trainer import Trainer


COMPONENT_NAMES = {"sketch": "sketch_encoder", "image": "image_encoder", "evaluation": "evaluation"}
NO_CLASS = -1
"""The label of a drawing of something that is none of the classes."""
# Users' drawings are mostly outlines with few lines inside.
SKETCH_CONTOUR_PROBABILITIES = (0.08, 0.14, 0.2, 0.25, 0.33)


@dataclass
class EncoderArguments(TrainingArguments):
    task: Literal["sketch", "image", "evaluation"] = argument("sketch", "which encoder to train")
    embedding_size: int = argument(48, "channels of the stem")
    hidden_sizes: list[int] = argument([48, 96, 192], "channels of the stages")
    depths: list[int] = argument([2, 2, 2], "blocks of the stages")
    groups_width: int = argument(16, "channels per group of the evaluation network's 3x3 convolutions")
    evaluation_model: Literal["regnet", "mobilenet_v2"] = argument(
        "regnet", "family of the evaluation network; no loss may use either"
    )
    depth_multiplier: float = argument(1.0, "width of a MobileNetV2; the four arguments above are those of the others")
    start_resolution: int | None = argument(
        None,
        "side that photos are shrunk to at the first step; it grows to `resolution` over the first two thirds of the steps "
        "(progressive resizing), which takes a fraction of the time",
    )
    object_crops: bool = argument(
        True,
        "crop photos around the object, which takes contours to find; else anywhere, of the middle when measuring, as "
        "`evaluate.py` does",
    )
    label_smoothing: float = argument(0.1, "share of the target spread over all classes")
    mixup_alpha: float = argument(0.0, "Beta(alpha, alpha) of mixup (Zhang et al., 2018); 0 = off")
    random_erasing: float = argument(0.0, "probability of hiding a rectangle of a photo (Zhong et al., 2020)")
    color_jitter: float = argument(0.3, "range of brightness, contrast and color changes of photos")
    class_balance_power: float = argument(0.5, "0 = classes as frequent as they are, 1 = all equally often")
    free_hand_strength: float = argument(1.0, "largest strength of the free-hand distortion of drawings")
    doodle_share: float = argument(
        0.4,
        "share of the training drawings of a class known to `doodles.DOODLES` that it makes, instead of from a photo",
    )
    other_share: float = argument(
        0.0,
        "share of the training drawings, of the sketch encoder, that are doodles of things of no class; all classes are then "
        "as likely, so that a drawing of something else is told by a low probability of its best class",
    )
    stroke_deletion_share: float = argument(0.0, "share of the training drawings that lack strokes")
    max_stroke_deletion: float = argument(0.5, "largest share of the strokes that these lack")
    contours: Literal["classical", "hed", "both"] = argument(
        "classical", "who draws the contours of photos for the sketch encoder"
    )
    hed_weights: str | None = argument(
        None, "file of HED weights, see `diffsketching_pipeline/training/hed_contours.py`"
    )
    validation_drawings_dir: str | None = argument(
        None, "folder with one folder of human drawings per class, to measure the sketch encoder on; never trained on"
    )


# ---- data -----------------------------------------------------------------------------------------------------------


def fit_to_page(ink: np.ndarray, margin: float) -> np.ndarray:
    """Cuts out the drawing, pads it to a square and leaves `margin` (a share of the page) free on each side."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if len(rows) == 0:
        return ink
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = round(max(ink.shape) / (1 - 2 * margin))
    before = [(side - length) // 2 for length in ink.shape]
    return np.pad(ink, [(b, side - length - b) for b, length in zip(before, ink.shape, strict=True)])


class FreeHandDataset:
    """
    Drawings made from the photos of a `PhotoSketchDataset`, as an unskilled hand would make them.

    Two of three are recentered and scaled to a margin as `SketchProcessor` does with users' drawings; the others keep
    the photo's frame as the output of P does. A share `doodle_share` of the training drawings are not of the photo but
    doodles of its class; a share `other_share` are doodles of other things, whose label is `NO_CLASS`; a share
    `stroke_deletion_share` lacks up to `max_stroke_deletion` of the strokes. Everything is
    keyed by (seed, epoch, index) as in `PhotoSketchDataset`.
    """

    def __init__(
        self,
        photos: PhotoSketchDataset,
        strength: float,
        train: bool = True,
        doodle_share: float = 0.0,
        stroke_deletion_share: float = 0.0,
        max_stroke_deletion: float = 0.5,
        other_share: float = 0.0,
    ):
        self.photos, self.strength, self.train = photos, strength, train
        self.other_share = other_share if train else 0.0
        self.doodle_share = doodle_share if train else 0.0
        self.stroke_deletion_share = stroke_deletion_share if train else 0.0
        self.max_stroke_deletion = max_stroke_deletion
        self.contour_probabilities = contour_distribution(SKETCH_CONTOUR_PROBABILITIES, photos.contour_source)

    def __len__(self) -> int:
        return len(self.photos)

    def contour(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """One of the contours of a photo, bool [H, W], as they are or straightened."""
        contours = self.photos.photo(index).contours
        ink = half_size(contours[rng.choice(len(contours), p=self.contour_probabilities)])
        return maybe_straightened(ink, rng, STRAIGHTENED_SHARE)

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """`pixel_values` float32 [1, R, R], -1 = stroke, +1 = paper; `class_label` int, `NO_CLASS` for other things; `id` str."""
        rng = np.random.default_rng([self.photos.seed, epoch, index])
        class_label = self.photos.class_labels[index]
        label = self.photos.id2label[class_label]
        if self.other_share > 0 and rng.random() < self.other_share:
            ink, class_label = draw_carelessly(other_strokes(rng), rng), NO_CLASS
        elif label in DOODLES and rng.random() < self.doodle_share:
            ink = draw_doodle(label, rng)
        else:
            ink = self.contour(index, rng)
        if self.stroke_deletion_share > 0 and rng.random() < self.stroke_deletion_share:
            ink = delete_strokes(ink, rng, self.max_stroke_deletion * rng.random())
        if rng.random() < 0.5:
            ink = ink[:, ::-1]
        border = min(ink.shape) // 6
        strength = self.strength * (rng.random() ** 0.5 if self.train else 0.5)
        drawn = free_hand_distortion(np.pad(ink, border), rng, strength)
        if rng.random() < 2 / 3:
            drawn = fit_to_page(drawn, margin=rng.uniform(0.02, 0.14))
        else:
            drawn = drawn[border:-border, border:-border] if drawn[border:-border, border:-border].any() else drawn
        gain = rng.uniform(1.2, 3.0) if self.train else DEFAULT_LINE_GAIN
        sketch = contour_to_sketch(drawn, self.photos.resolution, line_gain=gain)
        return {
            "pixel_values": torch.from_numpy(sketch)[None],
            "class_label": class_label,
            "id": self.photos.ids[index],
        }


def erase_randomly(probability: float) -> Callable[[dict[str, Any], torch.Generator], dict[str, Any]]:
    """A transform that fills a rectangle of `pixel_values` (4 to 20% of the area) with one random color."""

    def transform(sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        draw = torch.rand(9, generator=generator)
        if draw[0] >= probability:
            return sample
        pixels = sample["pixel_values"].clone()
        height, width = pixels.shape[-2:]
        area, aspect = 0.04 + 0.16 * draw[1], torch.exp(1.4 * draw[2] - 0.7)
        h, w = int(height * (area * aspect).sqrt()), int(width * (area / aspect).sqrt())
        top, left = int(draw[3] * (height - h)), int(draw[4] * (width - w))
        pixels[:, top : top + h, left : left + w] = (2 * draw[5 : 5 + len(pixels)] - 1).view(-1, 1, 1)
        return {**sample, "pixel_values": pixels}

    return transform


class PlainPhotoDataset(PhotoSketchDataset):
    """The photos of a `PhotoSketchDataset` without contours: crops need only hold the photo's middle."""

    def _make(self, content: bytes) -> CachedPhoto:
        image = resized_to_short_side(decode_photo(content), self.image_size, 4 * self.image_size)
        return CachedPhoto(np.asarray(image), np.zeros((1, 8, 8), dtype=bool), (0.5, 0.5, 0.5, 0.5))


def make_dataset(args: EncoderArguments, root: Path, split: str) -> PhotoSketchDataset | FreeHandDataset:
    train = split == "train"
    dataset_class = PhotoSketchDataset if args.object_crops else PlainPhotoDataset
    photos = dataset_class(
        root,
        split,
        args.resolution,
        args.seed,
        train,
        # A cached photo is one with contours.
        args.cache_dir if args.object_crops else None,
        contours="none",
        color_jitter=args.color_jitter,
        contour_source=args.contours if args.task == "sketch" else "classical",
        hed_weights=args.hed_weights,
        keep=in_first_half if train and args.task == "evaluation" else None,
        max_samples=args.max_train_samples if train else None,
        num_readers=num_readers(args),
    )
    if args.task != "sketch":
        return photos
    deletion = (args.stroke_deletion_share, args.max_stroke_deletion)
    return FreeHandDataset(photos, args.free_hand_strength, train, args.doodle_share, *deletion, args.other_share)


# ---- model ----------------------------------------------------------------------------------------------------------


def model_class(args: EncoderArguments) -> Any:
    """The class of transformers that is trained."""
    if args.task != "evaluation":
        return ResNetForImageClassification
    return RegNetForImageClassification if args.evaluation_model == "regnet" else MobileNetV2ForImageClassification


def make_model(args: EncoderArguments, id2label: dict[int, str]) -> nn.Module:
    """
    A ResNet or, for evaluation, a RegNet with squeeze-and-excitation or a MobileNetV2: another family, so that both fail
    differently.

    transformers' ResNet halves twice in its stem, and its configuration cannot lower that. So its first stage does not
    halve again: at 64 pixels the stem and the first stage are at 16x16, the others at 8x8 and 4x4.
    """
    shape: dict[str, Any] = {
        "embedding_size": args.embedding_size,
        "hidden_sizes": args.hidden_sizes,
        "depths": args.depths,
    }
    labels: dict[str, Any] = {
        "num_labels": len(id2label),
        "id2label": id2label,
        "label2id": {label: index for index, label in id2label.items()},
    }
    torch.manual_seed(args.seed)
    if args.pretrained_model_name_or_path is not None:
        start = Start.read(args.pretrained_model_name_or_path)
        model = start.load(model_class(args), COMPONENT_NAMES[args.task])
        # The side that it learns from now on, which the start may not name.
        model.config.image_size = args.resolution
        return with_encoder_classes(model, start.match(id2label, model.config.num_labels, model.config.id2label))
    if args.task == "evaluation" and args.evaluation_model == "mobilenet_v2":
        config = MobileNetV2Config(**labels, image_size=args.resolution, depth_multiplier=args.depth_multiplier)
        return MobileNetV2ForImageClassification(config)
    shape |= labels
    if args.task == "evaluation":
        return RegNetForImageClassification(RegNetConfig(**shape, layer_type="y", groups_width=args.groups_width))
    num_channels = 1 if args.task == "sketch" else 3
    return ResNetForImageClassification(
        ResNetConfig(
            **shape,
            num_channels=num_channels,
            layer_type="basic",
            downsample_in_first_stage=False,
            image_size=args.resolution,  # for pipelines of another size
        )
    )


def side_at(step: int, args: EncoderArguments, max_train_steps: int) -> int:
    """
    Return the side of the photos at a step: from `start_resolution` to `resolution` over the first two thirds, in four equal
    steps, because each new side costs its convolutions a new plan.
    """
    if args.start_resolution is None:
        return args.resolution
    stage = min(4, int(4 * 1.5 * step / max_train_steps))
    return args.start_resolution + stage * (args.resolution - args.start_resolution) // 4


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """
    Mean cross-entropy of `logits` `[B, K]` with label smoothing; with the uniform distribution where the label is `NO_CLASS`
    (outlier exposure, Hendrycks et al., 2019).
    """
    losses = F.cross_entropy(logits, labels.clamp(min=0), label_smoothing=label_smoothing, reduction="none")
    return torch.where(labels == NO_CLASS, -logits.log_softmax(-1).mean(-1), losses).mean()


def classification_loss(trainer: Trainer, args: EncoderArguments) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """Cross-entropy with label smoothing and, if asked, mixup."""
    name = COMPONENT_NAMES[args.task]

    def compute_loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels, labels = batch["pixel_values"], batch["class_label"]
        side = side_at(trainer.global_step, args, trainer.max_train_steps)
        if side != pixels.shape[-1]:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        share, other = 1.0, torch.arange(len(labels), device=labels.device)
        if args.mixup_alpha > 0:
            share = float(torch.distributions.Beta(args.mixup_alpha, args.mixup_alpha).sample())
            other = other.flip(0)
        logits = trainer.modules[name](share * pixels + (1 - share) * pixels[other]).logits.float()
        loss = share * smoothed_cross_entropy(logits, labels, args.label_smoothing)
        loss = loss + (1 - share) * smoothed_cross_entropy(logits, labels[other], args.label_smoothing)
        is_right = (logits.argmax(-1) == labels)[labels != NO_CLASS]
        # A batch of other things alone says nothing of accuracy.
        return {
            "loss": loss,
            "accuracy": is_right.float().mean() if len(is_right) else torch.ones((), device=loss.device),
        }

    return compute_loss


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterator[dict[str, Any]], num_batches: int) -> None:
    """Sets the running statistics to those of averaged weights: the EMA averages parameters, not buffers."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    device = next(model.parameters()).device
    model.train()
    for _ in range(num_batches):
        model(next(batches)["pixel_values"].to(device))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, pixel_values: Tensor, batch_size: int = 64) -> Tensor:
    """Class probabilities [N, num_classes] on the CPU."""
    device = next(model.parameters()).device
    logits = [model(batch.to(device)).logits.float().cpu() for batch in pixel_values.split(batch_size)]
    return torch.cat(logits).softmax(-1)


def accuracies(probabilities: Tensor, labels: Tensor, id2label: dict[int, str]) -> dict[str, float]:
    """Top-1, top-3, mean over classes, and each class's own share of right answers."""
    ranked = probabilities.argsort(dim=-1, descending=True)
    right = ranked[:, 0] == labels
    result = {
        "accuracy": right.float().mean().item(),
        "top3_accuracy": (ranked[:, :3] == labels[:, None]).any(-1).float().mean().item(),
    }
    per_class = {i: right[labels == i].float().mean().item() for i in sorted(set(labels.tolist()))}
    result["mean_class_accuracy"] = float(np.mean(list(per_class.values())))
    return result | {f"class/{id2label[i]}": value for i, value in per_class.items()}


def load_drawings(folder: Path, label2id: dict[str, int], resolution: int) -> dict[str, tuple[Tensor, Tensor]]:
    """
    Human drawings as the pipeline sees them, in two halves (`in_first_half`): choices are made on "tune", numbers are
    quoted from "report".

    Returns:
        `dict[str, tuple[Tensor, Tensor]]`: per half, drawings [N, 1, R, R] and their class indices [N].
    """
    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    files = sorted(file for file in folder.glob("*/*.png") if file.parent.name in label2id)
    if not files:
        raise ValueError(f"`validation_drawings_dir` has no PNG in a folder named after a class: {folder}.")
    sketches = SketchProcessor(resolution=resolution).preprocess([str(file) for file in files])
    labels = torch.tensor([label2id[file.parent.name] for file in files])
    is_tune = torch.tensor([in_first_half(file.stem) for file in files])
    return {"tune": (sketches[is_tune], labels[is_tune]), "report": (sketches[~is_tune], labels[~is_tune])}


def write_preprocessor(resolution: int, folder: Path) -> None:
    """Write how transformers and `evaluate.py` prepare photos for the network: squashed to its side, in [-1, 1]."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": resolution, "width": resolution},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_file(folder / "preprocessor_config.json", json.dumps(settings, indent=2) + "\n")


def check_encoder_arguments(args: EncoderArguments) -> None:
    """Raise `ValueError` for an argument that cannot be, before anything is read."""
    if not 0 <= args.doodle_share <= 1:
        raise ValueError(f"`doodle_share` must be in [0, 1], but got {args.doodle_share}.")
    if not 0 <= args.other_share < 1:
        raise ValueError(f"`other_share` must be in [0, 1), but got {args.other_share}.")
    if args.other_share > 0 and args.task != "sketch":
        raise ValueError(f"`other_share` must be 0 for the `task` {args.task}, which learns from photos.")
    check_stroke_deletion(args.stroke_deletion_share, args.max_stroke_deletion)
    check_contour_source(args.contours, args.hed_weights)
    if args.start_resolution is not None and not 16 <= args.start_resolution <= args.resolution:
        raise ValueError(
            f"`start_resolution` must be from 16 to `resolution`, {args.resolution}, but got {args.start_resolution}."
        )
    if args.task == "sketch" and (args.start_resolution is not None or not args.object_crops):
        raise ValueError(
            "`start_resolution` and `object_crops` must be left alone for the `task` sketch, made of contours."
        )


def main() -> None:
    args = parse_args(EncoderArguments, description=__doc__)
    check_encoder_arguments(args)
    root = resolve_data_dir(args)
    name = COMPONENT_NAMES[args.task]

    # 1. Data
    dataset, validation_dataset = make_dataset(args, root, "train"), make_dataset(args, root, "validation")
    photos = dataset.photos if isinstance(dataset, FreeHandDataset) else dataset
    validation = default_collate([validation_dataset.sample(i) for i in range(len(validation_dataset))])
    pixels, labels = validation["pixel_values"], validation["class_label"]
    drawings = {}
    if args.task == "sketch" and args.validation_drawings_dir is not None:
        drawings = load_drawings(Path(args.validation_drawings_dir), photos.label2id, args.resolution)

    # 2. Model and loop
    trainer = Trainer(
        args,
        {name: make_model(args, photos.id2label)},
        dataset,
        transform=erase_randomly(args.random_erasing) if args.random_erasing > 0 else None,
        sample_weights=class_balanced_weights(photos.class_labels, args.class_balance_power),
    )

    def validate() -> tuple[dict[str, float], dict[str, Tensor]]:
        model = trainer.unwrap(name)
        metrics = accuracies(predict(model, pixels), labels, photos.id2label)
        metrics = {key: value for key, value in metrics.items() if not key.startswith("class/")}
        for half, (sketches, truth) in drawings.items():
            if half == "tune":
                metrics["drawings_tune"] = accuracies(predict(model, sketches), truth, photos.id2label)["accuracy"]
        rows = [pixels[:: max(1, len(pixels) // 12)][:12]]
        rows += [sketches[:: max(1, len(sketches) // 12)][:12] for sketches, _ in drawings.values()]
        return metrics, {"validation": image_grid([row for row in rows if len(row) == len(rows[0])], scale=2)}

    # 3. Train, publish the averaged weights, measure them
    trainer.train(classification_loss(trainer, args), validate)
    model = trainer.ema_copy(name, dtype=torch.float32)
    if model is None:
        return
    recalibrate_batch_norm(model, trainer.batches(), num_batches=min(100, -(-len(dataset) // args.train_batch_size)))
    report = {"validation": accuracies(predict(model, pixels), labels, photos.id2label)}
    for half, (sketches, truth) in drawings.items():
        report[f"drawings_{half}"] = accuracies(predict(model, sketches), truth, photos.id2label)
    with write_folder(Path(args.output_dir) / name) as folder:
        model.to(getattr(torch, args.save_dtype)).save_pretrained(folder)
        if args.task == "evaluation":
            write_preprocessor(args.resolution, folder)
    write_file(Path(args.output_dir) / "metrics.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    trainer.push(Path(args.output_dir) / name)


if __name__ == "__main__":
    with stoppable(__file__):
        main()
