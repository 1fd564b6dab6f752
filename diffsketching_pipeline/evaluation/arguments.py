# SPDX-License-Identifier: Apache-2.0
"""The arguments of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffsketching_pipeline.command_line import argument, required
from diffsketching_pipeline.files import check_writable
from diffsketching_pipeline.images.free_hand import check_free_hand
from diffsketching_pipeline.images.sketch_processor import SketchProcessor


@dataclass
class EvaluationArguments:
    """Arguments for what is scored, against what, and by which network."""

    sketches: str = required("drawings, `<class>/<sketch>.png`")
    reference: str = required("real photos to compare with, `<class>/<photo>.jpg`; the validation photos")
    train: str = required("the photos that the model was trained on, `<class>/<photo>.jpg`")
    evaluator: list[str] | None = argument(
        None,
        "folder of an image classifier of transformers that learned on real photos only, or of several, whose numbers then "
        "stand side by side; without it, and with an `extractor`, nothing is said of classes",
    )
    extractor: str = argument(
        "evaluator",
        "whose features distances, precision, recall, diversity and memorisation compare: those of the `evaluator`; of "
        "`inception`, the network of FID, where its weights are; or of a folder with an image model of transformers. Further "
        "evaluators keep their own",
    )
    output_dir: str = argument("evaluation", "where numbers, tables and pictures are written")
    model: str | None = argument(None, "pipeline (folder or Hub id) to generate photos with")
    images: list[str] | None = argument(
        None, "folders of images `<sketch>_<n>.png`, flat or in class folders, each as DIR or NAME=DIR"
    )
    systems: str | None = argument(
        None,
        "YAML file of several ways to generate with `model`, each a column of the table; see the head of systems.py. The "
        "scales and steps below hold for what it leaves open",
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
    threshold: float | None = argument(
        None, "what is ink in `sketches` is darker than this share of its paper, in (0, 1); by default it is found"
    )
    num_inference_steps: int | None = argument(None, "overrides the checkpoint's recommendation")
    eta: float | None = argument(None, "overrides the checkpoint's recommendation")
    sketch_abstraction: float | None = argument(None, "overrides the checkpoint's recommendation")
    sketch_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    classifier_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    perceptual_guidance_scale: float | None = argument(None, "overrides the checkpoint's recommendation")
    dtype: Literal["float32", "bfloat16", "float16"] = argument(
        "float32", "type of the model's weights for sampling; bfloat16 is faster where the processor knows it"
    )
    seed: int = argument(0, "first seed: image n of drawing i of D has the seed `seed + n * D + i`")
    resolution: int | None = argument(
        None,
        "side in pixels at which colors and textures are compared, in addition to that of each `evaluator`; also the input "
        "of an `evaluator` whose preprocessor names no side of its own (64 by default). Without an `evaluator`, all photos' "
        "side (by default the `extractor`'s)",
    )
    eval_batch_size: int = argument(32, "images per forward pass")
    num_bootstrap_samples: int = argument(1000, "resamples of the 95%% intervals; 0 = no intervals")
    lpips_net: Literal["alex", "vgg", "squeeze"] = argument("alex", "backbone of LPIPS, used where its weights are")
    perceptual_sketch_distance: bool = argument(
        False,
        "also give L_p of eq. 5 by the sketcher and sketch encoder of `model`: a loss to watch, not a judge, because what "
        "is trained or guided on it may please it without looking better",
    )
    measure_memory: bool = argument(
        False, "also measure each system's peak memory; on a CPU one batch more, in a process of its own"
    )
    contour_metrics: str | None = argument(
        None,
        "`metrics.json` of the same systems on contours of photos (see draw_contours.py); each metric's difference from it, "
        "the free-hand gap, is then part of the result",
    )
    cache_dir: str | None = argument(None, "where the decoded training photos and their features are kept")

    def __post_init__(self) -> None:
        if isinstance(self.evaluator, str):
            self.evaluator = [self.evaluator]


def check_evaluation_arguments(args: EvaluationArguments) -> None:
    """Raises `ValueError` for a missing or impossible argument, before anything is read."""
    check_writable(args.output_dir)
    if args.model is None and not args.images:
        raise ValueError("give `model` to generate images, `images` to score folders of them, or both.")
    for name in ("systems", "perceptual_sketch_distance", "measure_memory"):
        if args.model is None and getattr(args, name):
            raise ValueError(f"`{name}` needs a `model`.")
    for name, minimum in {
        "num_images_per_sketch": 1,
        "eval_batch_size": 1,
        "seed": 0,
        "num_bootstrap_samples": 0,
    }.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {getattr(args, name)}.")
    check_free_hand(strength=args.free_hand_strength)
    sketch_reader(args, resolution=8)
    if args.extractor not in ("evaluator", "inception") and not Path(args.extractor).is_dir():
        raise ValueError(f"`extractor` must be `evaluator`, `inception` or a folder, but got {args.extractor!r}.")
    if args.resolution is not None and args.resolution < 8:
        raise ValueError(f"`resolution` must be at least 8, but got {args.resolution}.")
    named = [(name, getattr(args, name)) for name in ("sketches", "reference", "train")]
    for name, folder in [*named, *(("evaluator", folder) for folder in args.evaluator or [])]:
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`{name}` must be a folder, but {folder!r} is none.")


def sketch_reader(args: EvaluationArguments, resolution: int) -> SketchProcessor:
    """Return the reader of `sketches` at a side of `resolution` pixels; `ValueError` for an impossible `threshold`."""
    return SketchProcessor(resolution, threshold="otsu" if args.threshold is None else args.threshold)


def parse_images(images: list[str] | None) -> dict[str, Path]:
    """`["DIR", "NAME=DIR"]` -> folders by name; `ValueError` for a folder that does not exist or a name used twice."""
    systems: dict[str, Path] = {}
    for entry in images or []:
        name, _, folder = entry.rpartition("=") if not Path(entry).is_dir() else ("", "", entry)
        if not Path(folder).is_dir():
            raise ValueError(f"`images` must be folders, but {folder!r} is none.")
        name = name or Path(folder).resolve().name
        if name in systems:
            raise ValueError(f"`images` has the name {name!r} twice: say NAME={folder}.")
        systems[name] = Path(folder)
    return systems
