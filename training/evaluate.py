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
"""Scores photos made from drawings: faithfulness to the drawing, realism, diversity, class control, memorisation.

    python training/evaluate.py --model PIPELINE --sketches DRAWINGS --reference PHOTOS/validation --train PHOTOS/train \\
        --evaluator EVALUATION_NETWORK --output_dir evaluation
    python training/evaluate.py --images GAN_OUTPUT OTHER=FOLDER --sketches DRAWINGS ...

The first generates photos of every drawing and scores them, the second scores folders of `<sketch>_<n>.png` from
anywhere; both may be given, and every system becomes a column beside real photos and noise. `output_dir` receives
`metrics.json`, the table `metrics.md`, `sheets/` to look at and, with `--model`, `images/`, which a second call completes.

Every photo, real or generated, is cropped centrally to an aspect of at most 4:3, squashed to a square and resized by
antialiased bicubic filtering ("squash4:3"), which is how the training data look to a model. The evaluation network must
not have been used by any loss; `train_encoders.py --task evaluation` trains one.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
import transformers
from accelerate import Accelerator
from data import IMAGE_ERRORS, IMAGE_SUFFIXES, MAX_SQUASH, free_hand_distortion
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from skimage.feature import canny
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm.auto import tqdm
from train_encoders import in_first_half
from trainer import argument
from transformers import AutoModelForImageClassification, HfArgumentParser

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor


CONTOUR_RESOLUTION = 128
"""Side in pixels at which contours are compared; drawings are normalised to it as the pipeline does to its own size."""

CANNY_SIGMA = 3.0
"""Blur in pixels at `CONTOUR_RESOLUTION`: of 2, 3, 4 and 6 the best at finding real photos by distorted contours."""

CHAMFER_CAP = 0.1
"""Distances are cut off at this share of the side, so that an edge of the background counts as one miss and no more."""

REDRAWN_MARGIN = 1 / 6
"""Paper, as a share of the side, that is put around a drawing before it is redrawn, so that nothing leaves the page."""

MIN_DISTANCE_SAMPLES = 32
"""
Fewest images on either side of a Fréchet or kernel distance: of 16 images of a weak model, Fréchet distances overlap with
those of 16 real photos; of 32 they are three standard deviations apart.
"""

MIN_GROUPS = 10
"""A bootstrap over fewer drawings (or photos) than this says nothing about the spread."""

MAX_DISTANCE_RESAMPLES = 100
NUM_HALVES = 10
NEAR_COPY_QUANTILE = 0.05

METRICS = {
    "class_agreement": ("class agreement", "higher"),
    "class_agreement_reweighted": ("class agreement, classes as frequent as among the drawings", "higher"),
    "class_agreement_relative": ("class agreement relative to real photos'", "higher"),
    "conditioning_class_agreement": ("agreement with the class an image was generated with", "higher"),
    "conditioning_class_accuracy": ("share generated with the drawing's own class", "higher"),
    "retrieval_at_1": ("nearest-drawing retrieval R@1", "higher"),
    "retrieval_at_5": ("nearest-drawing retrieval R@5", "higher"),
    "contour_distance": ("contour distance to the drawing", "lower"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "frechet_distance_drawn_classes": ("Fréchet distance, classes of the drawings", "lower"),
    "kernel_distance": ("kernel distance", "lower"),
    "kernel_distance_drawn_classes": ("kernel distance, classes of the drawings", "lower"),
    "pairwise_distance": ("mean pairwise feature distance", "higher"),
    "pairwise_distance_same_class": ("mean pairwise feature distance within a class", "higher"),
    "pairwise_lpips": ("mean pairwise LPIPS", "higher"),
    "nearest_training_distance": ("nearest training photo, feature distance", "higher"),
    "nearest_training_pixel_distance": ("nearest training photo, pixel distance", "higher"),
    "near_copy_share": ("share of near copies of training photos", "lower"),
}
"""Title and better direction of each metric, in the order of the table."""


# ---- arguments ------------------------------------------------------------------------------------------------------


def required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass
class EvaluationArguments:
    """What is scored, against what, and by which network."""

    sketches: str = required("drawings, `<class>/<sketch>.png`")
    reference: str = required("real photos to compare with, `<class>/<photo>.jpg`; the validation photos")
    train: str = required("the photos that the model was trained on, `<class>/<photo>.jpg`")
    evaluator: str = required("folder of an image classifier of transformers that learned on real photos only")
    output_dir: str = argument("evaluation", "where numbers, tables and pictures are written")
    model: str | None = argument(None, "pipeline (folder or Hub id) to generate photos with")
    images: list[str] | None = argument(
        None, "folders of images `<sketch>_<n>.png`, flat or in class folders, each as DIR or NAME=DIR"
    )
    split: Literal["tune", "report", "all"] = argument(
        "all", "half of the drawings, by hash of the name: choices are made on `tune`, numbers quoted from `report`"
    )
    num_images_per_sketch: int = argument(4, "images generated of each drawing")
    class_labels: Literal["predicted", "folder"] = argument(
        "predicted", "class to generate: what the pipeline makes of the drawing, or the name of the drawing's folder"
    )
    free_hand_strength: float = argument(
        0.0,
        "generate from copies of the drawings, redrawn as a hand of this unskill would: gaps, wobble, wrong proportions; 0 = "
        "as they are, 1 = a poor hand. Faithfulness is still that to the drawings as they are",
    )
    num_inference_steps: int | None = argument(None, "overrides the checkpoint's recommendation")
    eta: float | None = argument(None, "overrides the checkpoint's recommendation")
    sketch_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    classifier_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    perceptual_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    dtype: Literal["float32", "bfloat16", "float16"] = argument(
        "float32", "type of the model's weights for sampling; bfloat16 is nearly twice as fast on many machines"
    )
    seed: int = argument(0, "first seed: image n of drawing i of D has the seed `seed + n * D + i`")
    resolution: int | None = argument(
        None, "side of the evaluation network's input; what its preprocessor says, else 64"
    )
    eval_batch_size: int = argument(32, "images per forward pass")
    num_bootstrap_samples: int = argument(1000, "resamples of the 95%% intervals; 0 = no intervals")
    lpips_net: Literal["alex", "vgg", "squeeze"] = argument("alex", "backbone of LPIPS, used where its weights are")
    cache_dir: str | None = argument(None, "where the decoded training photos and their features are kept")


def check_evaluation_arguments(args: EvaluationArguments) -> None:
    """Raises `ValueError` for a missing or impossible argument, before anything is read."""
    if args.model is None and not args.images:
        raise ValueError("give `model` to generate images, `images` to score folders of them, or both.")
    for name, minimum in {
        "num_images_per_sketch": 1,
        "eval_batch_size": 1,
        "seed": 0,
        "num_bootstrap_samples": 0,
    }.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {getattr(args, name)}.")
    if args.free_hand_strength < 0:
        raise ValueError(f"`free_hand_strength` must not be negative, but got {args.free_hand_strength}.")
    if args.resolution is not None and args.resolution < 8:
        raise ValueError(f"`resolution` must be at least 8, but got {args.resolution}.")
    for name in ("sketches", "reference", "train", "evaluator"):
        if not Path(getattr(args, name)).is_dir():
            raise ValueError(f"`{name}` must be a folder, but {getattr(args, name)!r} is none.")


# ---- files ----------------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A drawing by name and class; `position` is its place among all drawings of the folder, whatever the split."""

    name: str
    label: str
    path: Path
    position: int


@dataclass
class ImageSet:
    """
    Images that are scored together, and what the evaluation network makes of them.

    Attributes:
        name: the system's name.
        pixels: uint8 `[N, 3, R, R]` at the evaluation network's resolution.
        labels: class of each image.
        groups: int `[N]`, what the bootstrap resamples: the drawing's position, or each photo by itself.
        files: where the images lie; none for noise.
        probabilities, features, mirrored_features: float32 `[N, num_classes]` and `[N, D]`.
        given_labels: the class each image was generated with, where that is known.
        conditions: what belongs into the name of every number about them.
    """

    name: str
    pixels: Tensor
    labels: list[str]
    groups: np.ndarray
    files: list[Path]
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    mirrored_features: Tensor = field(default_factory=lambda: torch.empty(0))
    given_labels: list[str | None] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "ImageSet":
        """Some of the images, under another name."""
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        tensors = {
            key: value[index] if len(value) else value
            for key in ("pixels", "probabilities", "features", "mirrored_features")
            for value in [getattr(self, key)]
        }
        labels, files = [self.labels[i] for i in indices], [self.files[i] for i in indices if self.files]
        return replace(self, name=name, labels=labels, files=files, groups=self.groups[index.numpy()], **tensors)

    def image(self, index: int) -> Image.Image:
        """The image as it was stored, upright."""
        if self.files:
            return open_image(self.files[index])
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image; `ValueError` naming the file where that fails."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or delete it.") from error


def squash(image: Image.Image, resolution: int) -> Image.Image:
    """The central part with sides of at most 4:3, resized to a square: what the training data look like."""
    width, height = image.size
    box_width, box_height = min(width, MAX_SQUASH * height), min(height, MAX_SQUASH * width)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def list_class_folders(folder: Path, name: str) -> list[tuple[str, Path]]:
    """`(class, file)` of the images of `folder/<class>/`, sorted; `ValueError` where there is none."""
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"`{name}` must hold images in one folder per class, but {str(folder)!r} holds none.")
    return [(path.parent.name, path) for path in files]


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings of a folder in a fixed order; `ValueError` for two of the same name in a class."""
    drawings = [
        Drawing(path.stem, label, path, i) for i, (label, path) in enumerate(list_class_folders(folder, "sketches"))
    ]
    twice = [key for key, count in Counter((d.label, d.name) for d in drawings).items() if count > 1]
    if twice:
        raise ValueError(f"`sketches` has two files for the drawing {'/'.join(twice[0])!r}: keep one.")
    return drawings


def select_drawings(drawings: list[Drawing], split: str) -> list[Drawing]:
    """The drawings of one half, told apart as `train_encoders.py` does; `ValueError` where there is none."""
    selected = [d for d in drawings if split == "all" or in_first_half(d.name) == (split == "tune")]
    if not selected:
        raise ValueError(f"`split` {split!r} has none of the {len(drawings)} drawings: use `all`.")
    return selected


def match_images(folder: Path, drawings: list[Drawing], selected: list[Drawing]) -> list[tuple[Drawing, Path]]:
    """
    Finds the images `<sketch>_<n>.png` of the selected drawings, in folders named after the class or flat.

    Raises:
        ValueError: the folder holds an image that belongs to no drawing or to several, or a drawing has no image.
    """
    by_name: dict[tuple[str | None, str], list[Drawing]] = {}
    for drawing in drawings:
        for label in (drawing.label, None):
            by_name.setdefault((label, drawing.name), []).append(drawing)
    found: list[tuple[int, int, Drawing, Path]] = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        match = re.fullmatch(r"(.+)_(\d+)", path.stem)
        label = None if path.parent == folder else path.parent.name
        candidates = by_name.get((label, match[1]), []) if match else []
        if match is None or len(candidates) != 1:
            raise ValueError(_mismatch(path, label, len(candidates)))
        found.append((candidates[0].position, int(match[2]), candidates[0], path))
    wanted = {drawing.position for drawing in selected}
    images = [(drawing, path) for index, _, drawing, path in sorted(found) if index in wanted]
    missing = wanted - {drawing.position for drawing, _ in images}
    if missing:
        first = drawings[min(missing)]
        raise ValueError(
            f"`images` {str(folder)!r} has no image of {len(missing)} of {len(wanted)} drawings, for example"
            f" {first.label}/{first.name}_0.png."
        )
    return images


def _mismatch(path: Path, label: str | None, count: int) -> str:
    if count > 1:
        return f"`images` has {path}, which may be of {count} drawings: put images into folders named after the class."
    place = "" if label is None else f" of the class {label!r}"
    return f"`images` has {path}, which is not named `<sketch>_<n>` after any drawing{place} in `sketches`."


def check_labels(labels: Iterable[str], known: Iterable[str], name: str) -> None:
    """Raises `ValueError` for a class folder that the evaluation network does not know."""
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise ValueError(
            f"`{name}` has the classes {', '.join(unknown)}, which the `evaluator` does not know: {', '.join(known)}."
        )


def read_photos(files: list[tuple[str, Path]], name: str, resolution: int) -> ImageSet:
    """Reads photos of any size, squashed to a square."""
    pixels = torch.empty(len(files), 3, resolution, resolution, dtype=torch.uint8)
    for i, (_, path) in enumerate(tqdm(files, desc=f"Reading {name}", unit="image", leave=False)):
        pixels[i] = torch.from_numpy(np.array(squash(open_image(path), resolution))).permute(2, 0, 1)
    return ImageSet(name, pixels, [label for label, _ in files], np.arange(len(files)), [path for _, path in files])


def read_system(name: str, images: list[tuple[Drawing, Path]], resolution: int) -> ImageSet:
    """Reads the images of a system; `ValueError` for fewer than two, or for images of several sizes."""
    if len(images) < 2:
        raise ValueError(f"{name!r} has {len(images)} image: at least 2 are needed.")
    sizes: dict[tuple[int, int], Path] = {}
    given_labels = []
    for _, path in images:
        image = open_image(path)
        sizes.setdefault(image.size, path)
        given_labels.append(image.info.get("class_label"))
    if len(sizes) > 1:
        examples = " and ".join(f"{w} x {h} ({path})" for (w, h), path in list(sizes.items())[:2])
        raise ValueError(f"`images` of {name!r} must all have one size, but there are {examples}.")
    system = read_photos([(drawing.label, path) for drawing, path in images], name, resolution)
    system.groups = np.array([drawing.position for drawing, _ in images])
    system.given_labels = given_labels
    return system


# ---- the evaluation network -----------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a network's weights in float32, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Evaluator:
    """
    Class probabilities and pooled features of an image classifier of transformers.

    The features are what its last linear layer takes. Input range and size are those of a `preprocessor_config.json`
    beside the weights; without one, [-1, 1] and `resolution` or 64.

    Args:
        folder (`str`): a folder written by `save_pretrained`.
        resolution (`int`, *optional*): side of the input in pixels.
        device (`torch.device`): where it computes.

    Raises:
        ValueError: the folder holds no such classifier, or one that does not take photos.
    """

    def __init__(self, folder: str, resolution: int | None = None, device: torch.device | str = "cpu"):
        try:
            self.model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`evaluator` must be a folder with the weights of an image classifier, but {folder!r} cannot be loaded"
                f" ({str(error).splitlines()[0]}): `train_encoders.py --task evaluation` trains one."
            ) from error
        config = self.model.config
        if getattr(config, "num_channels", 3) != 3:
            raise ValueError(f"`evaluator` must take photos, but {folder!r} takes {config.num_channels} channel(s).")
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]
        if not heads:
            raise ValueError(
                f"`evaluator` must end in a linear layer, but the {config.model_type} in {folder!r} does not."
            )
        self.head = heads[-1]
        self.model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = device
        self.labels: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self._read_preprocessor(Path(folder) / "preprocessor_config.json", resolution)
        self.fingerprint = fingerprint(self.model)
        self.conditions = {
            "extractor": f"{config.model_type}-{self.fingerprint[:8]}",
            "resize": f"squash4:3-bicubic-{self.resolution}px",
        }

    def _read_preprocessor(self, path: Path, resolution: int | None) -> None:
        settings = json.loads(path.read_text()) if path.is_file() else {}
        size = settings.get("crop_size") or settings.get("size") or 64
        self.resolution = int(resolution or (max(size.values()) if isinstance(size, dict) else size))
        mean, std = (settings.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std"))
        self.mean, self.std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch_size: int, desc: str | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[N, 3, R, R]` -> probabilities `[N, num_classes]` and features `[N, D]`, float32 on the CPU."""
        logits, features = [], []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features.append(inputs[0].flatten(1).cpu())

        handle = self.head.register_forward_pre_hook(keep)
        try:
            for batch in tqdm(pixels.split(batch_size), desc=desc, leave=False, disable=desc is None):
                images = (batch.to(self.device).float() / 255 - self.mean) / self.std
                logits.append(self.model(images).logits.cpu())
        finally:
            handle.remove()
        return torch.cat(logits).softmax(-1), torch.cat(features)

    def look_at(self, images: ImageSet, batch_size: int, mirror: bool = True) -> ImageSet:
        """Fills in probabilities and features, with `mirror` also those of the mirrored images."""
        images.probabilities, images.features = self(images.pixels, batch_size, f"Features of {images.name}")
        if mirror:
            images.mirrored_features = self(images.pixels.flip(-1), batch_size)[1]
        return images


def read_training_photos(
    files: list[tuple[str, Path]], evaluator: Evaluator, batch_size: int, cache_dir: str | None
) -> ImageSet:
    """The training photos with their features, from `cache_dir` where they lie there already."""
    if cache_dir is None:
        return evaluator.look_at(read_photos(files, "training photos", evaluator.resolution), batch_size, mirror=False)
    digest = hashlib.sha256(f"{evaluator.fingerprint}:{evaluator.conditions['resize']}".encode())
    for label, path in files:
        status = path.stat()
        digest.update(f"{label}/{path.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    cached = Path(cache_dir) / f"evaluation-{digest.hexdigest()[:32]}.safetensors"
    if cached.is_file():
        stored = load_file(cached)
        labels, paths = [label for label, _ in files], [path for _, path in files]
        photos = ImageSet("training photos", stored["pixels"], labels, np.arange(len(files)), paths)
        return replace(photos, probabilities=stored["probabilities"], features=stored["features"])
    photos = read_training_photos(files, evaluator, batch_size, None)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f".{cached.name}.tmp")
    save_file({name: getattr(photos, name) for name in ("pixels", "probabilities", "features")}, temporary)
    os.replace(temporary, cached)
    return photos


# ---- generating -----------------------------------------------------------------------------------------------------


SCALE_NAMES = ("sketch_guidance_scale", "classifier_guidance_scale", "perceptual_guidance_scale")
SAMPLING_NAMES = ("num_inference_steps", "eta", *SCALE_NAMES)


class Job(NamedTuple):
    """One image to generate: from which file, for which drawing, to where."""

    drawing: Drawing
    sketch: Path
    seed: int
    path: Path


def redraw(drawings: list[Drawing], strength: float, folder: Path) -> None:
    """
    Writes a copy of each drawing, `folder/<class>/<sketch>.png`, as an unskilled hand would have made it. How depends on the
    drawing's class and name alone, so that every system and every half is given the same copies.
    """
    for drawing in tqdm(drawings, desc="Redrawing", unit="drawing", leave=False):
        page = SketchProcessor(CONTOUR_RESOLUTION).preprocess(str(drawing.path))[0, 0].numpy()
        ink = np.pad(page < 0, round(REDRAWN_MARGIN * CONTOUR_RESOLUTION))
        key = hashlib.sha256(f"{drawing.label}/{drawing.name}".encode()).digest()
        redrawn = free_hand_distortion(ink, np.random.default_rng(list(key[:8])), strength)
        image = Image.fromarray(np.where(redrawn, 0, 255).astype(np.uint8))
        save_png(image, redrawn_path(drawing, folder))


def redrawn_path(drawing: Drawing, folder: Path) -> Path:
    return folder / drawing.label / f"{drawing.name}.png"


def redrawn_dir(args: EvaluationArguments) -> Path:
    return Path(args.output_dir) / "redrawn"


def plan_jobs(args: EvaluationArguments, drawings: list[Drawing], selected: list[Drawing]) -> list[Job]:
    """
    Every image of the selected drawings. Each has its own seed, the same for every model, split and number of images:
    with one seed for all drawings, all images would share a few tints and layouts, and realism would suffer.
    """
    jobs = []
    for n, drawing in itertools.product(range(args.num_images_per_sketch), selected):
        path = Path(args.output_dir) / "images" / drawing.label / f"{drawing.name}_{n}.png"
        sketch = redrawn_path(drawing, redrawn_dir(args)) if args.free_hand_strength else drawing.path
        jobs.append(Job(drawing, sketch, args.seed + n * len(drawings) + drawing.position, path))
    return jobs


def load_model(args: EvaluationArguments, evaluator: Evaluator, drawings: list[Drawing]) -> DiffSketchingPipeline:
    """
    The pipeline to generate with.

    Raises:
        ValueError: it cannot be loaded, does not know the class of a drawing it is to be given, or holds the evaluation
            network itself: a metric is never computed by a network that a loss may have used.
    """
    try:
        pipeline = DiffSketchingPipeline.from_pretrained(args.model)
    except OSError as error:
        raise ValueError(f"`model` {args.model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and fingerprint(component) == evaluator.fingerprint:
            raise ValueError(f"`evaluator` is the `{name}` of `model`: judge it by a network that no loss has used.")
    if args.class_labels == "folder":
        for label in sorted({drawing.label for drawing in drawings}):
            pipeline.get_label_id(label)
    return pipeline.to(getattr(torch, args.dtype))


def generation_settings(args: EvaluationArguments, pipeline: Any, drawings: list[Drawing]) -> dict[str, Any]:
    """What the images depend on beside the drawing's name and the image's number."""
    weights = {name: fingerprint(c) for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    sketches = hashlib.sha256(b"".join(hashlib.sha256(d.path.read_bytes()).digest() for d in drawings)).hexdigest()
    settings = {
        "weights": weights,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
        "recommended": pipeline.recommended,
        "sketches": sketches,
        "free_hand_strength": args.free_hand_strength or None,
        "dtype": None if args.dtype == "float32" else args.dtype,
        **{name: getattr(args, name) for name in ("class_labels", "seed", *SAMPLING_NAMES)},
    }
    return json.loads(json.dumps(settings, default=str))


def check_generation_settings(settings: dict[str, Any], folder: Path) -> None:
    """
    Writes the settings beside the images; `ValueError` where images of other settings lie there already.
    """
    path = folder / "generation.json"
    if not path.is_file():
        write_text(json.dumps(settings, indent=2) + "\n", path)
        return
    earlier = json.loads(path.read_text())
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise ValueError(
            f"`output_dir` holds images generated with another {', '.join(changed)}: take another `output_dir`, or"
            f" delete {folder}."
        )


def generate(args: EvaluationArguments, pipeline: Any, jobs: list[Job], accelerator: Accelerator) -> None:
    """Generates the images that do not exist yet, shared among the processes."""
    pipeline.to(accelerator.device)
    # Shared out before looking what exists, or a slow process would see a fast one's images and share differently.
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(jobs) as share:
        share = [job for job in share if not job.path.is_file()]
        progress = tqdm(
            total=len(share), desc="Generating", unit="image", disable=not accelerator.is_local_main_process
        )
        for first in range(0, len(share), args.eval_batch_size):
            batch = share[first : first + args.eval_batch_size]
            output = pipeline(
                [str(job.sketch) for job in batch],
                class_labels=[job.drawing.label for job in batch] if args.class_labels == "folder" else None,
                num_images_per_sketch=1,
                generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                **{name: getattr(args, name) for name in SAMPLING_NAMES},
            )
            for job, image, label in zip(batch, output.images, output.class_labels, strict=True):
                texts = {"seed": str(job.seed)} | ({} if label is None else {"class_label": str(label)})
                save_png(image, job.path, texts)
            progress.update(len(batch))
        progress.close()
    accelerator.wait_for_everyone()


def save_png(image: Image.Image, path: Path, texts: dict[str, str] | None = None) -> None:
    """Writes a PNG with text chunks; it appears complete or not at all."""
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG", pnginfo=info)
    os.replace(temporary, path)


def write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- statistics -----------------------------------------------------------------------------------------------------


def bootstrap_means(
    values: np.ndarray, groups: np.ndarray, num_samples: int, weights: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """
    Weighted means over resampled groups, `[num_samples]`.

    Whole groups are drawn with replacement: images of one drawing succeed and fail together.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _, index = np.unique(groups, return_inverse=True)
    sums, norms = np.bincount(index, values * weights), np.bincount(index, weights)
    chosen = np.random.default_rng(seed).integers(len(sums), size=(num_samples, len(sums)))
    return sums[chosen].sum(1) / norms[chosen].sum(1)


def percentile_interval(samples: np.ndarray, num_groups: int) -> tuple[float, float] | None:
    """The central 95% of bootstrap samples; None for none, or for a bootstrap of fewer than `MIN_GROUPS` groups."""
    if len(samples) == 0 or num_groups < MIN_GROUPS:
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


class _Precomputed(nn.Module):
    """Lets torchmetrics take features where it expects images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


# Several processes generate, but one of them scores: a metric that waits for the others waits for ever.
THIS_PROCESS: dict[str, Any] = {"sync_on_compute": False}


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features `[N, D]` and `[M, D]` (Heusel et al., 2017)."""
    metric = FrechetInceptionDistance(_Precomputed(features.shape[1]), **THIS_PROCESS).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """
    Unbiased squared MMD with the cubic kernel of KID (Binkowski et al., 2018), mean over random subsets of the size of
    the smaller set (at most 1000), as many as it takes to see about all of the larger one.
    """
    size = min(len(features), len(reference), 1000)
    subsets = -(-max(len(features), len(reference)) // size)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(0)
        network = _Precomputed(features.shape[1])
        metric = KernelInceptionDistance(network, subsets=subsets, subset_size=size, **THIS_PROCESS)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])


SET_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet_distance": frechet_distance,
    "kernel_distance": kernel_distance,
}


def bootstrap_distances(
    distance: Callable[[Tensor, Tensor], float],
    features: Tensor,
    groups: np.ndarray,
    reference: Tensor,
    num_samples: int,
    seed: int = 0,
) -> np.ndarray:
    """Distances of resampled groups of `features` from a fixed reference, minus their mean, `[num_samples]`."""
    members = [torch.from_numpy(np.flatnonzero(groups == group)) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        chosen = torch.cat([members[i] for i in rng.integers(len(members), size=len(members))])
        samples.append(distance(features[chosen], reference))
    # A resampled set has fewer distinct images, so it lies farther away than the set itself: only the spread counts.
    return np.asarray(samples) - np.mean(samples) if samples else np.empty(0)


def random_halves(labels: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of indices of equal size (one is left out of an odd number), with about the same classes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    half = len(order) // 2
    return order[0 : 2 * half : 2], order[1 : 2 * half : 2]


def sample_like(labels: Sequence[str], wanted: Sequence[str], allowed: np.ndarray, seed: int) -> np.ndarray:
    """Random indices into `labels`, allowed ones only, as many of each class as `wanted` has, or all there are."""
    rng = np.random.default_rng(seed)
    names, chosen = np.asarray(labels), []
    for label, count in sorted(Counter(wanted).items()):
        available = np.flatnonzero((names == label) & allowed)
        chosen.append(rng.permutation(available)[:count])
    return np.sort(np.concatenate(chosen))


def pairwise_means(features: Tensor, groups: np.ndarray) -> dict[int, float]:
    """Mean distance between the unit-normalised features of two images of a group, for each group of at least two."""
    unit = F.normalize(features.double(), dim=1)
    means = {}
    for group in np.unique(groups):
        members = unit[torch.from_numpy(groups == group)]
        if len(members) > 1:
            means[int(group)] = float(torch.pdist(members).mean())
    return means


def random_pair_distance(
    features: Tensor, same: np.ndarray | None, num_samples: int, seed: int = 0
) -> tuple[float, np.ndarray]:
    """
    Mean distance between unit-normalised features `[N, D]` over pairs of different images (only those that `same`
    `[N, N]` marks, if given), and its bootstrap samples over images.
    """
    unit = F.normalize(features.double(), dim=1)
    distances = torch.cdist(unit, unit).numpy()
    pairs = 1.0 - np.eye(len(unit)) if same is None else same * (1.0 - np.eye(len(unit)))
    draws = np.random.default_rng(seed).integers(len(unit), size=(num_samples, len(unit)))
    counts = np.stack([np.bincount(draw, minlength=len(unit)) for draw in draws]) if num_samples else np.empty((0, 1))
    value = (distances * pairs).sum() / pairs.sum()
    if not num_samples:
        return float(value), np.empty(0)
    return float(value), ((counts @ (distances * pairs)) * counts).sum(1) / ((counts @ pairs) * counts).sum(1)


def nearest(queries: Tensor, keys: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances from each query `[N, D]` to its `count` nearest keys `[M, D]`, and their indices."""
    keys = keys.double()
    found = [torch.cdist(chunk.double(), keys).topk(count, largest=False) for chunk in queries.split(256)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


# ---- contours -------------------------------------------------------------------------------------------------------


def edge_map(image: Image.Image) -> np.ndarray:
    """
    Edges of a photo by Canny's method, bool `[CONTOUR_RESOLUTION, CONTOUR_RESOLUTION]`.

    A classical method: no network that a loss has used decides what a contour is. Its thresholds fall until something is
    found, because pale garments have weak edges.
    """
    pixels = np.asarray(squash(image, CONTOUR_RESOLUTION).convert("L"), dtype=np.float32) / 255
    edges = np.zeros(pixels.shape, dtype=bool)
    for factor in (1.0, 0.5, 0.25):
        edges = canny(pixels, sigma=CANNY_SIGMA, low_threshold=0.1 * factor, high_threshold=0.2 * factor)
        if edges.sum() >= CONTOUR_RESOLUTION:
            break
    return edges


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest True one as a share of the side, at most `CHAMFER_CAP`; flat `[S * S]`."""
    if not mask.any():
        return np.full(mask.size, CHAMFER_CAP)
    return np.minimum(ndimage.distance_transform_edt(~mask) / mask.shape[-1], CHAMFER_CAP).ravel()


def contour_distances(edges: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """
    Symmetric chamfer distance between contours of photos and drawings, as a share of the side.

    Args:
        edges (`np.ndarray`): bool `[N, S, S]`.
        strokes (`np.ndarray`): bool `[G, S, S]`, none of them empty.

    Returns:
        `np.ndarray`: `[N, G]`, half the sum of the mean distance from edges to strokes and from strokes to edges, each
        distance at most `CHAMFER_CAP`. A photo without edges is `CHAMFER_CAP` away from every drawing.
    """
    to_edges = np.stack([_distance_to(mask) for mask in edges])
    to_strokes = np.stack([_distance_to(mask) for mask in strokes])
    flat_edges = edges.reshape(len(edges), -1).astype(np.float64)
    flat_strokes = strokes.reshape(len(strokes), -1).astype(np.float64)
    num_edges = flat_edges.sum(1, keepdims=True)
    from_edges = np.where(num_edges > 0, flat_edges @ to_strokes.T / np.maximum(num_edges, 1), CHAMFER_CAP)
    from_strokes = to_edges @ flat_strokes.T / flat_strokes.sum(1)
    return (from_edges + from_strokes) / 2


def retrieval_ranks(distances: np.ndarray, own: np.ndarray) -> np.ndarray:
    """
    How many other drawings are at most as far from an image as its own, `[N]`; 0 is a hit at 1.

    Ties count against the image, so an image without edges, equally far from all drawings, ranks last.
    """
    own_distance = np.take_along_axis(distances, own[:, None], axis=1)
    return (distances <= own_distance + 1e-9).sum(1) - 1


# ---- scoring --------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """A number with everything it depends on; `value` is None for a `reason`."""

    title: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def name(self) -> str:
        """The name to quote the number with."""
        return f"{self.title} [{'; '.join(f'{k}: {v}' for k, v in {**self.conditions, 'N': self.n}.items())}]"


Scores = dict[str, Measurement]


class Scorer:
    """
    All metrics of one evaluation. Systems are sets of images of drawings, photos are sets of real ones.

    Args:
        args: the arguments of the script.
        evaluator: the evaluation network.
        drawings: all drawings, the gallery of the retrieval.
        strokes: bool `[len(drawings), S, S]`, the drawings as the model sees them.
        selected: the drawings that are scored.
        reference, train: real photos with their features.
    """

    def __init__(
        self,
        args: EvaluationArguments,
        evaluator: Evaluator,
        drawings: list[Drawing],
        strokes: np.ndarray,
        selected: list[Drawing],
        reference: ImageSet,
        train: ImageSet,
    ):
        self.args, self.evaluator, self.strokes, self.train = args, evaluator, strokes, train
        half = "all" if args.split == "all" else f"{args.split} half,"
        self.drawn = {"drawings": f"{half} {len(selected)} of {len(drawings)}"}
        self.mix = Counter(drawing.label for drawing in selected)
        self.reference = reference
        drawn = [i for i, label in enumerate(reference.labels) if label in self.mix]
        self.drawn_reference = reference.select(drawn, f"{reference.name} of drawn classes")
        self.lpips, self.lpips_reason = load_lpips(args.lpips_net)
        self.near_copy_limit = None
        if drawn:
            self.near_copy_limit = float(
                np.quantile(self.training_distances(self.drawn_reference), NEAR_COPY_QUANTILE)
            )

    def score_system(self, images: ImageSet) -> Scores:
        """Every metric of images that were made from drawings."""
        return {
            **self.class_agreement(images),
            **self.relative_agreement(images),
            **self.conditioning_class(images),
            **self.retrieval(images),
            **self.realism(images),
            **self.diversity(images),
            **self.memorisation(images),
        }

    def score_reference(self, photos: ImageSet) -> Scores:
        """What the reference photos themselves reach: their distance is that of one half from the other."""
        return {
            **self.class_agreement(photos),
            **self.reweighted_agreement(photos),
            **self.halves(photos),
            **self.photo_diversity(photos),
            **self.memorisation(photos),
        }

    def score_training_photos(self, photos: ImageSet) -> Scores:
        """What perfect images of the same classes would reach at the same number."""
        return {**self.class_agreement(photos), **self.relative_agreement(photos), **self.realism(photos)}

    # -- building blocks

    def measure(
        self,
        key: str,
        value: float | None,
        images: ImageSet,
        conditions: dict[str, str],
        interval: tuple[float, float] | None = None,
        reason: str | None = None,
    ) -> Scores:
        conditions = {**images.conditions, **conditions}
        return {key: Measurement(METRICS[key][0], value, len(images), interval, conditions, reason)}

    def measure_mean(
        self,
        key: str,
        values: np.ndarray,
        images: ImageSet,
        conditions: dict[str, str],
        weights: np.ndarray | None = None,
    ) -> Scores:
        """The mean of one value per image, with its bootstrap interval."""
        values = np.asarray(values, dtype=np.float64)
        samples = bootstrap_means(values, images.groups, self.args.num_bootstrap_samples, weights)
        interval = percentile_interval(samples, len(np.unique(images.groups)))
        return self.measure(key, float(np.average(values, weights=weights)), images, conditions, interval)

    def agrees(self, images: ImageSet, labels: Sequence[str | None] | None = None) -> np.ndarray:
        """1 where the evaluation network takes an image for its label (`labels`, or its own), else 0."""
        predicted = [self.evaluator.labels[i] for i in images.probabilities.argmax(-1).tolist()]
        labels = images.labels if labels is None else labels
        return np.array([a == b for a, b in zip(predicted, labels, strict=True)], dtype=np.float64)

    def mix_weights(self, photos: ImageSet) -> np.ndarray | None:
        """Weights that make classes as frequent as among the drawings; None where a class is missing."""
        counts = Counter(photos.labels)
        if set(self.mix) - set(counts):
            return None
        return np.array([self.mix[label] / counts[label] for label in photos.labels])

    # -- faithfulness

    def class_agreement(self, images: ImageSet) -> Scores:
        """Share of images that the evaluation network takes for their class."""
        return self.measure_mean("class_agreement", self.agrees(images), images, self.evaluator.conditions)

    def reweighted_agreement(self, photos: ImageSet) -> Scores:
        """The share for photos, if their classes were as frequent as the drawings'."""
        weights, key = self.mix_weights(photos), "class_agreement_reweighted"
        if weights is None:
            reason = "the photos lack a class of the drawings"
            return self.measure(key, None, photos, self.evaluator.conditions, reason=reason)
        return self.measure_mean(key, self.agrees(photos), photos, self.evaluator.conditions, weights)

    def relative_agreement(self, images: ImageSet) -> Scores:
        """The share among images as a fraction of the reweighted share among the reference photos."""
        key, photos = "class_agreement_relative", self.drawn_reference
        against = f"{len(photos)} {photos.name}, classes as frequent as the drawings'"
        conditions = {**self.evaluator.conditions, "reference": against}
        weights = self.mix_weights(photos)
        real = None if weights is None else self.agrees(photos)
        if real is None or not real.any():
            reason = "no reference photo is recognised" if real is not None else "they lack a class of the drawings"
            return self.measure(key, None, images, conditions, reason=reason)
        agrees, num_samples = self.agrees(images), self.args.num_bootstrap_samples
        samples = bootstrap_means(agrees, images.groups, num_samples)
        # Another seed: the photos are drawn independently of the images.
        real_samples = bootstrap_means(real, photos.groups, num_samples, weights, seed=1)
        interval = percentile_interval(samples / np.maximum(real_samples, 1e-9), len(np.unique(images.groups)))
        value = float(agrees.mean() / np.average(real, weights=weights))
        return self.measure(key, value, images, conditions, interval)

    def conditioning_class(self, images: ImageSet) -> Scores:
        """
        How often the class that an image was generated with is the drawing's, and how often the evaluation network sees
        that class in it: what the class predictor costs, and what the generator does. Left out where it is not known.
        """
        if not images.given_labels or None in images.given_labels:
            return {}
        right = np.array([a == b for a, b in zip(images.given_labels, images.labels, strict=True)])
        seen = self.agrees(images, images.given_labels)
        return {
            **self.measure_mean("conditioning_class_agreement", seen, images, self.evaluator.conditions),
            **self.measure_mean("conditioning_class_accuracy", right, images, {}),
        }

    def retrieval(self, images: ImageSet) -> Scores:
        """Which of all drawings is the contour of each image closest to?"""
        edges = [edge_map(images.image(i)) for i in tqdm(range(len(images)), desc="Contours", leave=False)]
        distances = contour_distances(np.stack(edges), self.strokes)
        ranks = retrieval_ranks(distances, images.groups)
        size = len(self.strokes)
        conditions = {
            "contour": f"Canny sigma {CANNY_SIGMA:g} at {CONTOUR_RESOLUTION}px",
            "distance": f"symmetric chamfer capped at {CHAMFER_CAP:g} of the side",
        }
        scores: Scores = {}
        for k in (1, 5):
            if size <= k:
                reason = f"{size} drawing(s) are too few to choose {k} from"
                scores |= self.measure(f"retrieval_at_{k}", None, images, conditions, reason=reason)
                continue
            more = {"gallery": f"{size} drawings", "chance": f"{k / size:.3g}", **conditions}
            scores |= self.measure_mean(f"retrieval_at_{k}", ranks < k, images, more)
        own = distances[np.arange(len(images)), images.groups]
        return scores | self.measure_mean("contour_distance", own, images, conditions)

    # -- realism

    def realism(self, images: ImageSet) -> Scores:
        """Fréchet and kernel distance to all reference photos, and to those of the drawings' classes."""
        scores: Scores = {}
        for suffix, reference in (("", self.reference), ("_drawn_classes", self.drawn_reference)):
            for name, distance in SET_DISTANCES.items():
                scores |= self.set_distance(name + suffix, distance, images, reference)
        return scores

    def set_distance(
        self, key: str, distance: Callable[[Tensor, Tensor], float], images: ImageSet, reference: ImageSet
    ) -> Scores:
        conditions = {**self.evaluator.conditions, "reference": f"{len(reference)} {reference.name}"}
        if min(len(images), len(reference)) < MIN_DISTANCE_SAMPLES:
            reason = f"fewer than {MIN_DISTANCE_SAMPLES} images: {len(images)} against {len(reference)}"
            return self.measure(key, None, images, conditions, reason=reason)
        value = distance(images.features, reference.features)
        num_samples = min(self.args.num_bootstrap_samples, MAX_DISTANCE_RESAMPLES)
        spread = bootstrap_distances(distance, images.features, images.groups, reference.features, num_samples)
        interval = percentile_interval(value + spread, len(np.unique(images.groups)))
        return self.measure(key, value, images, conditions, interval)

    def halves(self, photos: ImageSet) -> Scores:
        """Distances between random halves of the photos: mean, smallest and largest of `NUM_HALVES` splits."""
        suffix = "_drawn_classes" if photos is self.drawn_reference else ""
        half = photos.select(range(len(photos) // 2), photos.name)
        conditions = {**self.evaluator.conditions, "reference": f"the other half of {len(photos)} {photos.name}"}
        scores: Scores = {}
        for name, distance in SET_DISTANCES.items():
            if len(half) < MIN_DISTANCE_SAMPLES:
                reason = f"fewer than {MIN_DISTANCE_SAMPLES} images in a half"
                scores |= self.measure(name + suffix, None, half, conditions, reason=reason)
                continue
            values = []
            for seed in range(NUM_HALVES):
                first, second = random_halves(photos.labels, seed)
                values.append(distance(photos.features[first], photos.features[second]))
            interval = (min(values), max(values))
            more = {**conditions, "interval": f"smallest and largest of {NUM_HALVES} splits"}
            scores |= self.measure(name + suffix, float(np.mean(values)), half, more, interval)
        return scores

    # -- diversity

    def diversity(self, images: ImageSet) -> Scores:
        """Distances between images of the same drawing."""
        conditions = {"pairs": "within a drawing", "normalisation": "unit", **self.evaluator.conditions}
        means = pairwise_means(images.features, images.groups)
        reason = None if means else "no drawing has two images"
        scores = self.group_means("pairwise_distance", means, images, conditions, reason)
        conditions = {"pairs": "within a drawing", "backbone": self.args.lpips_net}
        reason = reason or self.lpips_reason
        means = {} if reason else lpips_means(self.lpips, images, self.evaluator.device)
        return scores | self.group_means("pairwise_lpips", means, images, conditions, reason)

    def group_means(
        self, key: str, means: dict[int, float], images: ImageSet, conditions: dict[str, str], reason: str | None
    ) -> Scores:
        """The mean over drawings of one value each."""
        if reason is not None:
            return self.measure(key, None, images, conditions, reason=reason)
        values = np.array(list(means.values()))
        samples = bootstrap_means(values, np.arange(len(values)), self.args.num_bootstrap_samples)
        interval = percentile_interval(samples, len(values))
        return self.measure(key, float(values.mean()), images, conditions, interval)

    def photo_diversity(self, photos: ImageSet) -> Scores:
        """Distances between random photos, and between random photos of one class."""
        labels = np.asarray(photos.labels)
        same = labels[:, None] == labels[None, :]
        conditions = {"pairs": "random photos", "normalisation": "unit", **self.evaluator.conditions}
        scores: Scores = {}
        for key, mask in (("pairwise_distance", None), ("pairwise_distance_same_class", same)):
            if mask is not None and mask.sum() == len(photos):
                scores |= self.measure(key, None, photos, conditions, reason="no class has two photos")
                continue
            value, samples = random_pair_distance(photos.features, mask, self.args.num_bootstrap_samples)
            interval = percentile_interval(samples, len(photos))
            scores |= self.measure(key, value, photos, conditions, interval)
        return scores

    # -- memorisation

    def training_distances(self, images: ImageSet) -> np.ndarray:
        """Distance of unit-normalised features from the nearest training photo, mirrored or not, `[N]`."""
        keys = F.normalize(self.train.features, dim=1)
        both = [nearest(F.normalize(f, dim=1), keys)[0] for f in (images.features, images.mirrored_features)]
        return torch.minimum(*both)[:, 0].numpy()

    def memorisation(self, images: ImageSet) -> Scores:
        """Distances from the nearest training photo, and how many are smaller than real photos' usually are."""
        against = {"reference": f"{len(self.train)} training photos and their mirror images"}
        distances = self.training_distances(images)
        conditions = {**self.evaluator.conditions, "normalisation": "unit", **against}
        scores = self.measure_mean("nearest_training_distance", distances, images, conditions)
        keys = thumbnails(self.train.pixels)
        both = [nearest(thumbnails(pixels), keys)[0] for pixels in (images.pixels, images.pixels.flip(-1))]
        pixel_distances = torch.minimum(*both)[:, 0].numpy() / math.sqrt(keys.shape[1])
        more = {"resize": f"squash4:3 to {THUMBNAIL_SIDE}px", "unit": "root mean square of [0, 1]", **against}
        scores |= self.measure_mean("nearest_training_pixel_distance", pixel_distances, images, more)
        if self.near_copy_limit is None:
            reason = "no reference photo is of a drawn class"
            return scores | self.measure("near_copy_share", None, images, conditions, reason=reason)
        share = f"{NEAR_COPY_QUANTILE:.0%} of {len(self.drawn_reference)} {self.drawn_reference.name} are nearer"
        more = {"limit": f"{self.near_copy_limit:.4g}, {share}", **conditions}
        return scores | self.measure_mean("near_copy_share", distances < self.near_copy_limit, images, more)


THUMBNAIL_SIDE = 32


def thumbnails(pixels: Tensor) -> Tensor:
    """uint8 `[N, 3, R, R]` -> float `[N, 3 * THUMBNAIL_SIDE ** 2]` in [0, 1], small enough to forgive small shifts."""
    chunks = [F.adaptive_avg_pool2d(chunk.float() / 255, THUMBNAIL_SIDE).flatten(1) for chunk in pixels.split(256)]
    return torch.cat(chunks)


def load_lpips(net: Literal["alex", "vgg", "squeeze"]) -> tuple[nn.Module | None, str | None]:
    """LPIPS on a pretrained backbone, or why there is none: its weights are never downloaded and never random."""
    model_name = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet1_1"}[net]
    weights = getattr(torchvision.models, f"{model_name}_Weights").DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not path.is_file():
        return None, f"no backbone weights: {path.name} is not in the torch hub folder ({path.parent})"
    return LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", **THIS_PROCESS).eval(), None


@torch.no_grad()
def lpips_means(lpips: Any, images: ImageSet, device: torch.device | str) -> dict[int, float]:
    """Mean LPIPS between two images of a drawing, for each drawing with at least two."""
    lpips.to(device)
    means = {}
    for group in tqdm(np.unique(images.groups), desc="LPIPS", leave=False):
        pixels = images.pixels[torch.from_numpy(images.groups == group)].to(device).float() / 127.5 - 1
        if len(pixels) > 1:
            first, second = torch.triu_indices(len(pixels), len(pixels), offset=1)
            means[int(group)] = float(lpips(pixels[first], pixels[second]).mean())
    return means


def make_noise(images: ImageSet, seed: int = 0) -> ImageSet:
    """Uniform noise in the place of a system's images: what every metric says about nothing."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, images.pixels.shape, generator=generator, dtype=torch.uint8)
    return ImageSet("noise", pixels, images.labels, images.groups, [])


# ---- pictures and tables --------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A picture with a caption under it."""

    image: Image.Image
    caption: str = ""
    color: str = "black"


TILE, CAPTION = 96, 14


def draw_sheet(rows: Sequence[Sequence[Tile]], num_columns: int = 1) -> Image.Image:
    """Rows of tiles as one picture, the rows in `num_columns` columns, filled from the top."""
    length, font = max(len(row) for row in rows), ImageFont.load_default(size=11)
    per_column = -(-len(rows) // num_columns)
    cell, gap = (TILE + 4, TILE + CAPTION + 4), 12
    size = (num_columns * (length * cell[0] + gap), per_column * cell[1])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        left, top = (i // per_column) * (length * cell[0] + gap), (i % per_column) * cell[1]
        for k, tile in enumerate(row):
            smaller = max(tile.image.size) > TILE
            filtering = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
            picture = ImageOps.contain(tile.image.convert("RGB"), (TILE, TILE), filtering)
            sheet.paste(picture, (left + k * cell[0], top))
            caption = tile.caption
            while caption and draw.textlength(caption, font) > TILE:
                caption = caption[:-1]
            draw.text((left + k * cell[0], top + TILE), caption, fill=tile.color, font=font)
    return sheet


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def drawing_rows(
    images: ImageSet, drawings: list[Drawing], sketches: Tensor, labels: Sequence[str]
) -> dict[int, list[Tile]]:
    """By drawing: the drawing as the model sees it, then its images with what the evaluation network takes them for."""
    rows: dict[int, list[Tile]] = {}
    predicted = [labels[i] for i in images.probabilities.argmax(-1).tolist()]
    for i, group in enumerate(images.groups.tolist()):
        if group not in rows:
            drawing = drawings[group]
            page = ((sketches[group, 0] + 1) * 127.5).round().byte().numpy()
            rows[group] = [Tile(Image.fromarray(page), f"{drawing.label} {drawing.name}")]
        color = "darkgreen" if predicted[i] == images.labels[i] else "crimson"
        rows[group].append(Tile(images.image(i), predicted[i], color))
    return rows


def write_contact_sheets(
    images: ImageSet, drawings: list[Drawing], sketches: Tensor, labels: Sequence[str], folder: Path
) -> None:
    """One sheet for each class and one of all (at most 120 drawings of them), rows of `drawing | images`."""
    rows = drawing_rows(images, drawings, sketches, labels)
    for label in sorted({drawings[group].label for group in rows}):
        members = [row for group, row in rows.items() if drawings[group].label == label]
        save_png(draw_sheet(members), folder / f"{label}.png")
    chosen = [list(rows.values())[i] for i in evenly_spaced(len(rows), 120)]
    length = max(len(row) for row in chosen)
    save_png(draw_sheet(chosen, max(1, round(math.sqrt(len(chosen) / length)))), folder / "all.png")


def write_nearest_sheet(images: ImageSet, train: ImageSet, path: Path) -> None:
    """Images beside the three training photos nearest to them: the 16 nearest of all, then a fair sample by distance."""
    count = min(3, len(train))
    keys = F.normalize(train.features, dim=1)
    distances, indices = nearest(F.normalize(images.features, dim=1), keys, count)
    mirrored, mirrored_indices = nearest(F.normalize(images.mirrored_features, dim=1), keys, count)
    closer = (mirrored[:, :1] < distances[:, :1]).expand_as(distances)
    distances, indices = torch.where(closer, mirrored, distances), torch.where(closer, mirrored_indices, indices)
    order = distances[:, 0].argsort().tolist()
    ranks = sorted({*range(min(16, len(order))), *evenly_spaced(len(order), 32)})
    rows = []
    for i in (order[rank] for rank in ranks):
        row = [Tile(images.image(i), images.labels[i])]
        for distance, k in zip(distances[i].tolist(), indices[i].tolist(), strict=True):
            photo = Image.fromarray(train.pixels[k].permute(1, 2, 0).numpy())
            row.append(Tile(photo, f"{distance:.3f} {train.labels[k]}"))
        rows.append(row)
    save_png(draw_sheet(rows, 3), path)


def format_measurement(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    if measurement.value is None:
        return "–"
    text = f"{measurement.value:.3g}"
    if measurement.interval is not None:
        text += " [{:.3g}, {:.3g}]".format(*measurement.interval)
    return f"{text} (N={measurement.n})"


def make_table(scores: dict[str, Scores]) -> str:
    """A Markdown table of metrics by systems, then the full name of every number and the reasons for missing ones."""
    lines = [f"| | {' | '.join(scores)} |", "| --- |" + " --- |" * len(scores)]
    names = []
    for key, (title, better) in METRICS.items():
        cells = [system.get(key) for system in scores.values()]
        if not any(cells):
            continue
        arrow = "↑" if better == "higher" else "↓"
        lines.append(f"| {title} {arrow} | {' | '.join(format_measurement(cell) for cell in cells)} |")
        for name, cell in zip(scores, cells, strict=True):
            if cell is not None:
                names.append(f"- {name}: {cell.name}" + (f": none, {cell.reason}" if cell.value is None else ""))
    note = (
        "Values with 95% bootstrap intervals over drawings (over photos for real ones). A share of exactly 0 or 1 leaves"
        " nothing to resample: its interval has no width. Fréchet distances grow as N falls: compare them at one N, and"
        " with the training photos, which are as many as the first system's images and of the same classes."
    )
    return "\n".join(["# Evaluation", "", note, "", *lines, "", "## What each number is", "", *names, ""])


def scores_to_json(scores: dict[str, Scores]) -> dict[str, Any]:
    return {
        system: {
            key: {"name": measurement.name, "better": METRICS[key][1], **asdict(measurement)}
            for key, measurement in measurements.items()
        }
        for system, measurements in scores.items()
    }


# ---- the script -----------------------------------------------------------------------------------------------------


RESERVED_NAMES = ("generated", "training_photos", "reference_photos", "reference_photos_drawn_classes", "noise")


def parse_systems(images: list[str] | None) -> dict[str, Path]:
    """`["DIR", "NAME=DIR"]` -> folders by name; `ValueError` for a folder that does not exist or a name used twice."""
    systems: dict[str, Path] = {}
    for entry in images or []:
        name, _, folder = entry.rpartition("=") if not Path(entry).is_dir() else ("", "", entry)
        if not Path(folder).is_dir():
            raise ValueError(f"`images` must be folders, but {folder!r} is none.")
        name = name or Path(folder).resolve().name
        if name in systems or name in RESERVED_NAMES:
            raise ValueError(f"`images` has the name {name!r} twice: say NAME={folder}.")
        systems[name] = Path(folder)
    return systems


@dataclass
class Inputs:
    """Everything that the user gave, checked; `train` on the main process only."""

    evaluator: Evaluator
    drawings: list[Drawing]
    selected: list[Drawing]
    sketches: Tensor
    systems: dict[str, ImageSet]
    reference: ImageSet
    train: ImageSet | None = None
    pipeline: Any = None
    jobs: list[Job] = field(default_factory=list)

    def given_sketches(self, name: str) -> Tensor:
        """The drawings that a system was given, `[len(drawings), 1, S, S]`."""
        if name != "generated":
            return self.sketches
        given = {job.drawing.position: job.sketch for job in self.jobs}
        paths = [str(given.get(drawing.position, drawing.path)) for drawing in self.drawings]
        return SketchProcessor(CONTOUR_RESOLUTION).preprocess(paths)


def prepare(args: EvaluationArguments, accelerator: Accelerator) -> Inputs:
    """Reads and checks all input; what is wrong with it is a `ValueError` before any long work."""
    check_evaluation_arguments(args)
    folders = parse_systems(args.images)
    drawings = read_drawings(Path(args.sketches))
    selected = select_drawings(drawings, args.split)
    matched = {name: match_images(folder, drawings, selected) for name, folder in folders.items()}
    reference_files, train_files = (list_class_folders(Path(getattr(args, n)), n) for n in ("reference", "train"))
    evaluator = Evaluator(args.evaluator, args.resolution, accelerator.device)
    for name, labels in {
        "sketches": [drawing.label for drawing in drawings],
        "reference": [label for label, _ in reference_files],
        "train": [label for label, _ in train_files],
    }.items():
        check_labels(labels, evaluator.labels, name)
    if len(reference_files) < 2:
        raise ValueError("`reference` must hold at least 2 photos, but holds 1.")
    sketches = SketchProcessor(CONTOUR_RESOLUTION).preprocess([str(drawing.path) for drawing in drawings])
    systems = {name: read_system(name, images, evaluator.resolution) for name, images in matched.items()}
    reference = read_photos(reference_files, f"{Path(args.reference).name} photos", evaluator.resolution)
    inputs = Inputs(evaluator, drawings, selected, sketches, systems, reference)
    if args.model is not None:
        inputs.pipeline = load_model(args, evaluator, selected)
        inputs.jobs = plan_jobs(args, drawings, selected)
        if len(inputs.jobs) < 2:
            raise ValueError("`num_images_per_sketch` must be at least 2 for a single drawing.")
    if accelerator.is_main_process:
        inputs.train = read_training_photos(train_files, evaluator, args.eval_batch_size, args.cache_dir)
        if inputs.pipeline is not None:
            settings = generation_settings(args, inputs.pipeline, drawings)
            check_generation_settings(settings, Path(args.output_dir) / "images")
    return inputs


def read_generated(args: EvaluationArguments, inputs: Inputs) -> ImageSet:
    jobs = sorted(inputs.jobs, key=lambda job: (job.drawing.position, job.seed))
    generated = read_system("generated", [(job.drawing, job.path) for job in jobs], inputs.evaluator.resolution)
    pipeline, seeds = inputs.pipeline, [job.seed for job in jobs]
    used = {name: value for name in SAMPLING_NAMES if (value := getattr(args, name)) is not None}
    if args.dtype != "float32":
        used["dtype"] = args.dtype
    settings = ", ".join(f"{name}={value}" for name, value in {**pipeline.recommended, **used}.items())
    generated.conditions = {
        "model": f"{Path(str(args.model)).name}-{fingerprint(pipeline.unet)[:8]}",
        "sampling": f"{settings or 'pipeline defaults'}, class {args.class_labels}",
        "seeds": f"{len(seeds)} in {min(seeds)}-{max(seeds)}",
    }
    if args.free_hand_strength:
        generated.conditions["given"] = f"the drawings redrawn at strength {args.free_hand_strength:g}"
    return generated


def score_all(args: EvaluationArguments, inputs: Inputs, train: ImageSet) -> dict[str, Scores]:
    """The columns of the table: systems, then real photos as ceiling and noise as floor."""
    evaluator, batch_size = inputs.evaluator, args.eval_batch_size
    reference = evaluator.look_at(inputs.reference, batch_size)
    strokes = (inputs.sketches[:, 0] < 0).numpy()
    scorer = Scorer(args, evaluator, inputs.drawings, strokes, inputs.selected, reference, train)
    systems = list(inputs.systems.values())
    reference.conditions = {"photos": reference.name}
    scorer.drawn_reference.conditions = {"photos": scorer.drawn_reference.name}
    noise = make_noise(systems[0])
    scores = {}
    for images in [*systems, noise]:
        images.conditions = {**scorer.drawn, **images.conditions}
        scores[images.name] = scorer.score_system(evaluator.look_at(images, batch_size))

    # The evaluation network of `train_encoders.py` knows the first half by heart: its features lie farther away.
    unseen = np.array([not in_first_half(path.stem) for path in train.files])
    like = train.select(sample_like(train.labels, systems[0].labels, unseen, seed=0), "training photos")
    like.conditions = {"photos": "training photos of the second half by hash, classes as drawn"}
    real: dict[str, Scores] = {}
    if len(like) > 1:
        real["training_photos"] = scorer.score_training_photos(like)
    real["reference_photos"] = scorer.score_reference(reference)
    if len(scorer.drawn_reference) > 1:
        real["reference_photos_drawn_classes"] = scorer.score_reference(scorer.drawn_reference)
    return {**{images.name: scores[images.name] for images in systems}, **real, "noise": scores["noise"]}


def describe_run(args: EvaluationArguments, inputs: Inputs) -> dict[str, Any]:
    """The settings that `metrics.json` records."""
    libraries = (torch, torchmetrics, torchvision, diffusers, transformers)
    return {
        "arguments": asdict(args),
        "evaluator": {"fingerprint": inputs.evaluator.fingerprint, **inputs.evaluator.conditions},
        "drawings": [f"{drawing.label}/{drawing.name}" for drawing in inputs.selected],
        "recommended": inputs.pipeline.recommended if inputs.pipeline is not None else None,
        "versions": {library.__name__: library.__version__ for library in libraries},
    }


def evaluate(args: EvaluationArguments, inputs: Inputs, accelerator: Accelerator) -> dict[str, Scores]:
    """Generates what is missing, scores everything and writes the results; returns them on the main process."""
    if inputs.pipeline is not None:
        if args.free_hand_strength and accelerator.is_main_process:
            redraw(inputs.selected, args.free_hand_strength, redrawn_dir(args))
        generate(args, inputs.pipeline, inputs.jobs, accelerator)
    if inputs.train is None:
        return {}
    if inputs.pipeline is not None:
        inputs.systems = {"generated": read_generated(args, inputs), **inputs.systems}
    scores = score_all(args, inputs, inputs.train)
    output_dir = Path(args.output_dir)
    content = {"settings": describe_run(args, inputs), "systems": scores_to_json(scores)}
    write_text(json.dumps(content, indent=2) + "\n", output_dir / "metrics.json")
    write_text(make_table(scores), output_dir / "metrics.md")
    for name, images in inputs.systems.items():
        folder = output_dir / "sheets" / name
        write_contact_sheets(images, inputs.drawings, inputs.given_sketches(name), inputs.evaluator.labels, folder)
        write_nearest_sheet(images, inputs.train, folder / "nearest_training_photos.png")
    return scores


def main(args: EvaluationArguments) -> dict[str, Scores]:
    """Runs the evaluation; returns the measurements by system and metric."""
    accelerator = Accelerator()
    return finish(args, prepare(args, accelerator), accelerator)


def finish(args: EvaluationArguments, inputs: Inputs, accelerator: Accelerator) -> dict[str, Scores]:
    """[`evaluate`], after which all processes end together."""
    scores = evaluate(args, inputs, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return scores


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and leaves the description's lines alone."""


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    parser = HfArgumentParser(
        cast(Any, EvaluationArguments), description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    try:
        (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
        accelerator = Accelerator()
        inputs = prepare(args, accelerator)
    except ValueError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    is_main_process = accelerator.is_main_process
    finish(args, inputs, accelerator)
    if is_main_process:
        print(Path(args.output_dir) / "metrics.md")


if __name__ == "__main__":
    run()
