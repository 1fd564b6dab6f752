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
anywhere; both may be given, and every system becomes a column beside real photos and noise. `--systems` names several ways
to use the model, the unconditional one and other baselines among them (see systems.py). `output_dir` receives
`metrics.json`, the table `metrics.md`, `sheets/` to look at and, with `--model`, `images/`, which a second call completes.

Every photo, real or generated, is cropped centrally to an aspect of at most 4:3, squashed to a square and resized by
antialiased bicubic filtering ("squash4:3"), which is how the training data look to a model. The evaluation network must
not have been used by any loss; `train_encoders.py --task evaluation` trains one.

Several judges, `--evaluator garments-64 garments-128`, give their numbers in one table. Each sees every photo, whatever its
size, at its own side; `--resolution 256` adds the distance of colors and textures at that side. A number names its judge, or
its side where there is no network.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import torchmetrics
import torchvision
import transformers
from accelerate import Accelerator
from command_line import parse_arguments, user_errors
from data import check_free_hand, free_hand_distortion
from evaluation_network import Evaluator, read_training_photos
from evaluation_report import make_table, scores_to_json, write_contact_sheets, write_nearest_sheet
from free_hand_gap import free_hand_gap, read_contour_metrics
from image_sets import (
    Drawing,
    ImageSet,
    check_labels,
    check_settings,
    file_digest,
    list_class_folders,
    match_images,
    read_drawings,
    read_photos,
    read_system,
    required,
    save_png,
    select_drawings,
    write_text,
)
from metrics import CONTOUR_RESOLUTION, sample_like
from PIL import Image
from scoring import Scorer, Scores, add_judge, check_perceptual_components, make_noise, perceptual_sketch_distances
from systems import (
    SAMPLING_NAMES,
    Job,
    Plan,
    System,
    generate,
    labels_to_give,
    measure_memory,
    read_systems,
    with_defaults,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from train_encoders import in_first_half
from trainer import argument
from transformers import PreTrainedModel

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor
from diffsketching_pipeline.manifest import weights_sha256


REDRAWN_MARGIN = 1 / 6
"""Paper, as a share of the side, that is put around a drawing before it is redrawn, so that nothing leaves the page."""


# ---- arguments ------------------------------------------------------------------------------------------------------


@dataclass
class EvaluationArguments:
    """What is scored, against what, and by which network."""

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
    num_inference_steps: int | None = argument(None, "overrides the checkpoint's recommendation")
    eta: float | None = argument(None, "overrides the checkpoint's recommendation")
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
    if args.extractor not in ("evaluator", "inception") and not Path(args.extractor).is_dir():
        raise ValueError(f"`extractor` must be `evaluator`, `inception` or a folder, but got {args.extractor!r}.")
    if args.resolution is not None and args.resolution < 8:
        raise ValueError(f"`resolution` must be at least 8, but got {args.resolution}.")
    named = [(name, getattr(args, name)) for name in ("sketches", "reference", "train")]
    for name, folder in [*named, *(("evaluator", folder) for folder in args.evaluator or [])]:
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`{name}` must be a folder, but {folder!r} is none.")


# ---- generating -----------------------------------------------------------------------------------------------------


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


def images_dir(args: EvaluationArguments, system: System) -> Path:
    """Where a system's images lie: those of several have a folder each."""
    folder = Path(args.output_dir) / "images"
    return folder if args.systems is None else folder / system.name


def plan_jobs(
    args: EvaluationArguments, system: System, drawings: list[Drawing], selected: list[Drawing]
) -> list[Job]:
    """
    Every image of the selected drawings. Each has its own seed, the same for every model, system, split and number of images:
    with one seed for all drawings, all images would share a few tints and layouts, and realism would suffer.
    """
    jobs = []
    for n, drawing in itertools.product(range(args.num_images_per_sketch), selected):
        path = images_dir(args, system) / drawing.label / f"{drawing.name}_{n}.png"
        sketch = redrawn_path(drawing, redrawn_dir(args)) if args.free_hand_strength else drawing.path
        jobs.append(Job(drawing, sketch, args.seed + n * len(drawings) + drawing.position, path))
    return jobs


def make_plans(
    args: EvaluationArguments, pipeline: DiffSketchingPipeline, drawings: list[Drawing], selected: list[Drawing]
) -> list[Plan]:
    """What each system is to generate, checked; arguments of the script hold for what a system leaves open."""
    systems = [System()] if args.systems is None else read_systems(args.systems)
    defaults = {name: getattr(args, name) for name in SAMPLING_NAMES}
    plans = []
    for system in [with_defaults(system, defaults) for system in systems]:
        plan = Plan(system, system.build(pipeline), plan_jobs(args, system, drawings, selected))
        system.check(plan.pipeline)
        plans.append(plan)
    if len(plans[0].jobs) < 2:
        raise ValueError("`num_images_per_sketch` must be at least 2 for a single drawing.")
    return plans


def load_evaluators(args: EvaluationArguments, device: torch.device) -> list[Evaluator]:
    """The judges; `ValueError` for the same network twice, which would say everything twice."""
    evaluators = [Evaluator(next(iter(args.evaluator or []), None), args.resolution, device, args.extractor)]
    evaluators += [Evaluator(folder, args.resolution, device) for folder in (args.evaluator or [])[1:]]
    names = [evaluator.classifier.name for evaluator in evaluators if evaluator.classifier is not None]
    if len(set(names)) < len(names):
        raise ValueError(f"`evaluator` must name different networks, but got {', '.join(names)}.")
    return evaluators


def load_model(
    args: EvaluationArguments, evaluators: list[Evaluator], drawings: list[Drawing]
) -> DiffSketchingPipeline:
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
        if not isinstance(component, nn.Module):
            continue
        # An extractor of transformers has lost its head.
        networks = {component, component.base_model} if isinstance(component, PreTrainedModel) else {component}
        weights = {weights_sha256(network) for network in networks}
        for judge, judging in (pair for evaluator in evaluators for pair in evaluator.fingerprints.items()):
            if judging in weights:
                raise ValueError(f"`{judge}` is the `{name}` of `model`: judge it by a network that no loss has used.")
    if args.perceptual_sketch_distance:
        check_perceptual_components(pipeline)
    if args.class_labels == "folder":
        for label in sorted({drawing.label for drawing in drawings}):
            pipeline.get_label_id(label)
    return pipeline.to(getattr(torch, args.dtype))


def generation_settings(
    args: EvaluationArguments, plan: Plan, weights: dict[str, str], drawings: list[Drawing]
) -> dict[str, Any]:
    """What the images depend on beside the drawing's name and the image's number; `weights` are the model's."""
    scheduler = plan.pipeline.scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    plain, system = System(), plan.system
    # What is as in a plain call is left out, so that images made before a setting existed are still known.
    more = ("withhold", "strength", "guidance_start", "guidance_end")
    return {
        "weights": weights,
        "scheduler": {"class": type(scheduler).__name__, **config},
        "recommended": plan.pipeline.recommended,
        "sketches": file_digest(drawing.path for drawing in drawings),
        "free_hand_strength": args.free_hand_strength or None,
        "dtype": None if args.dtype == "float32" else args.dtype,
        **{name: getattr(args, name) for name in ("class_labels", "seed")},
        **{name: getattr(system, name) for name in SAMPLING_NAMES},
        **{n: None if getattr(system, n) == getattr(plain, n) else getattr(system, n) for n in more},
    }


# ---- the script -----------------------------------------------------------------------------------------------------


RESERVED_NAMES = ("training_photos", "reference_photos", "reference_photos_drawn_classes", "noise")


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


def check_names(plans: list[Plan], folders: Iterable[str]) -> None:
    """Raises `ValueError` for a name of a column that is used twice."""
    taken = {*RESERVED_NAMES, *(plan.system.name for plan in plans)}
    for name in folders:
        if name in taken:
            raise ValueError(f"`images` has the name {name!r}, which is taken: say NAME=DIR.")
    for plan in plans:
        if plan.system.name in RESERVED_NAMES:
            raise ValueError(f"`systems` has the name {plan.system.name!r}, which is taken: take another.")


@dataclass
class Inputs:
    """
    Everything that the user gave, checked; `train` and `weights`, the pipeline's, on the main process only. Images are at
    the side of the first of the judges.
    """

    evaluators: list[Evaluator]
    drawings: list[Drawing]
    selected: list[Drawing]
    sketches: Tensor
    systems: dict[str, ImageSet]
    reference: ImageSet
    on_contours: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: ImageSet | None = None
    pipeline: DiffSketchingPipeline | None = None
    weights: dict[str, str] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    @property
    def evaluator(self) -> Evaluator:
        """The first of the judges, whose numbers go by their plain names."""
        return self.evaluators[0]

    def given_sketches(self, name: str) -> Tensor:
        """The drawings that a system was given, `[len(drawings), 1, S, S]`."""
        given = {
            job.drawing.position: job.sketch for plan in self.plans if plan.system.name == name for job in plan.jobs
        }
        paths = [str(given.get(drawing.position, drawing.path)) for drawing in self.drawings]
        return SketchProcessor(CONTOUR_RESOLUTION).preprocess(paths)


def prepare(args: EvaluationArguments, accelerator: Accelerator) -> Inputs:
    """Reads and checks all input; what is wrong with it is a `ValueError` before any long work."""
    check_evaluation_arguments(args)
    folders = parse_images(args.images)
    drawings = read_drawings(Path(args.sketches))
    selected = select_drawings(drawings, args.split)
    matched = {name: match_images(folder, drawings, selected) for name, folder in folders.items()}
    reference_files, train_files = (list_class_folders(Path(getattr(args, n)), n) for n in ("reference", "train"))
    evaluators = load_evaluators(args, accelerator.device)
    evaluator = evaluators[0]
    on_contours = read_contour_metrics(args.contour_metrics, evaluator.settings) if args.contour_metrics else {}
    for name, labels in {
        "sketches": [drawing.label for drawing in drawings],
        "reference": [label for label, _ in reference_files],
        "train": [label for label, _ in train_files],
    }.items():
        for judge in evaluators:
            if judge.labels:
                check_labels(labels, judge.labels, name)
    if len(reference_files) < 2:
        raise ValueError("`reference` must hold at least 2 photos, but holds 1.")
    sketches = SketchProcessor(CONTOUR_RESOLUTION).preprocess([str(drawing.path) for drawing in drawings])
    systems = {name: read_system(name, images, evaluator.resolution) for name, images in matched.items()}
    reference = read_photos(reference_files, f"{Path(args.reference).name} photos", evaluator.resolution)
    inputs = Inputs(evaluators, drawings, selected, sketches, systems, reference, on_contours)
    if args.model is not None:
        inputs.pipeline = load_model(args, evaluators, selected)
        inputs.plans = make_plans(args, inputs.pipeline, drawings, selected)
    check_names(inputs.plans, folders)
    if accelerator.is_main_process:
        inputs.train = read_training_photos(train_files, evaluator, args.eval_batch_size, args.cache_dir)
        if inputs.pipeline is not None:
            networks = inputs.pipeline.components.items()
            inputs.weights = {name: weights_sha256(net) for name, net in networks if isinstance(net, nn.Module)}
            for plan in inputs.plans:
                settings = generation_settings(args, plan, inputs.weights, drawings)
                path = images_dir(args, plan.system) / "generation.json"
                check_settings(settings, path, "`output_dir` holds images generated")
    return inputs


def read_generated(args: EvaluationArguments, inputs: Inputs, plan: Plan) -> ImageSet:
    """The images of a system of the model, with what belongs into the names of their numbers."""
    jobs = sorted(plan.jobs, key=lambda job: (job.drawing.position, job.seed))
    images = [(job.drawing, job.path) for job in jobs]
    generated = read_system(plan.system.name, images, inputs.evaluator.resolution)
    seeds = [job.seed for job in jobs]
    generated.conditions = {
        "model": f"{Path(str(args.model)).name}-{inputs.weights['unet'][:8]}",
        "sampling": describe_sampling(args, plan),
        "seeds": f"{len(seeds)} in {min(seeds)}-{max(seeds)}",
    }
    if args.free_hand_strength:
        generated.conditions["given"] = f"the drawings redrawn at strength {args.free_hand_strength:g}"
    memory = images_dir(args, plan.system) / "memory.json"
    if memory.is_file():
        generated.memory = json.loads(memory.read_text())
    return generated


def describe_sampling(args: EvaluationArguments, plan: Plan) -> str:
    """How a system generates, in one line; what is as in a plain call is left out."""
    settings = plan.system.resolve(plan.pipeline)
    scheduler, withhold = settings.pop("scheduler"), settings.pop("withhold")
    for name in ("strength", "guidance_start", "guidance_end"):
        if settings[name] == getattr(System(), name):
            del settings[name]
    parts = [scheduler, *(f"{name}={value}" for name, value in settings.items())]
    if args.dtype != "float32":
        parts.append(f"dtype={args.dtype}")
    if withhold:
        parts.append(f"the UNet is not told the {' and the '.join(reversed(withhold))}")
    if plan.system.uses_class(plan.pipeline):
        parts.append(f"class {args.class_labels}")
    return ", ".join(parts)


def score_all(args: EvaluationArguments, inputs: Inputs, train: ImageSet) -> dict[str, Scores]:
    """The columns of the table: systems, then real photos as ceiling and noise as floor, by every judge."""
    scores = score_by(inputs.evaluator, args, inputs, train)
    files = list(zip(train.labels, train.files, strict=True))
    for evaluator in inputs.evaluators[1:]:
        seen = read_training_photos(files, evaluator, args.eval_batch_size, args.cache_dir)
        judged = score_by(evaluator, args, inputs, seen)
        scores = {name: add_judge(scores[name], judged[name]) for name in scores}
    return scores


def score_by(evaluator: Evaluator, args: EvaluationArguments, inputs: Inputs, train: ImageSet) -> dict[str, Scores]:
    """The columns by one judge, with photos at its side; what depends on no judge is measured with the first."""
    is_first, batch_size = evaluator is inputs.evaluator, args.eval_batch_size
    reference = evaluator.look_at(inputs.reference.at(evaluator.resolution), batch_size)
    strokes = (inputs.sketches[:, 0] < 0).numpy()
    settings = {name: getattr(args, name) for name in ("split", "num_bootstrap_samples", "lpips_net")}
    settings["resolution"] = args.resolution if is_first else None
    scorer = Scorer(evaluator, inputs.drawings, strokes, inputs.selected, reference, train, **settings)
    systems = [images.at(evaluator.resolution) for images in inputs.systems.values()]
    reference.conditions = {"photos": reference.name}
    scorer.drawn_reference.conditions = {"photos": scorer.drawn_reference.name}
    noise = make_noise(systems[0])
    scores = {}
    for images in [*systems, noise]:
        images.conditions = {**scorer.drawn, **images.conditions}
        evaluator.look_at(images, batch_size)
        scores[images.name] = scorer.score_system(images) if is_first else scorer.judge_system(images)
        if is_first and args.perceptual_sketch_distance and inputs.pipeline is not None:
            distances = perceptual_sketch_distances(inputs.pipeline, images, inputs.drawings, batch_size)
            scores[images.name] |= scorer.perceptual_sketch_distance(images, distances)

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
        "evaluator": inputs.evaluator.settings,
        **({"more_evaluators": [judge.settings for judge in more]} if (more := inputs.evaluators[1:]) else {}),
        "drawings": [f"{drawing.label}/{drawing.name}" for drawing in inputs.selected],
        "recommended": inputs.pipeline.recommended if inputs.pipeline is not None else None,
        "systems": {plan.system.name: plan.system.resolve(plan.pipeline) for plan in inputs.plans},
        "versions": {library.__name__: library.__version__ for library in libraries},
    }


def evaluate(args: EvaluationArguments, inputs: Inputs, accelerator: Accelerator) -> dict[str, Scores]:
    """Generates what is missing, scores everything and writes the results; returns them on the main process."""
    if inputs.plans and args.free_hand_strength and accelerator.is_main_process:
        redraw(inputs.selected, args.free_hand_strength, redrawn_dir(args))
    for plan in inputs.plans:
        generate(plan, args.class_labels, args.eval_batch_size, accelerator)
    if inputs.train is None:
        return {}
    for plan in inputs.plans if args.measure_memory and accelerator.device.type == "cpu" else []:
        batch = plan.jobs[: args.eval_batch_size]
        labels = labels_to_give(batch, args.class_labels)
        dtype = getattr(torch, args.dtype)
        measure_memory(str(args.model), dtype, plan.system, batch, labels, images_dir(args, plan.system))
    generated = {plan.system.name: read_generated(args, inputs, plan) for plan in inputs.plans}
    inputs.systems = {**generated, **inputs.systems}
    scores = score_all(args, inputs, inputs.train)
    output_dir = Path(args.output_dir)
    gaps = {n: free_hand_gap(scores[n], inputs.on_contours[n]) for n in inputs.systems if n in inputs.on_contours}
    content = {"settings": describe_run(args, inputs), "systems": scores_to_json(scores)}
    content |= {"free_hand_gap": scores_to_json(gaps)} if gaps else {}
    write_text(json.dumps(content, indent=2) + "\n", output_dir / "metrics.json")
    write_text(make_table(scores, gaps), output_dir / "metrics.md")
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


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    with user_errors(__file__):
        args = parse_arguments(EvaluationArguments, __doc__)
        accelerator = Accelerator()
        inputs = prepare(args, accelerator)
    is_main_process = accelerator.is_main_process
    finish(args, inputs, accelerator)
    if is_main_process:
        print(Path(args.output_dir) / "metrics.md")


if __name__ == "__main__":
    run()
