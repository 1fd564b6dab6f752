# SPDX-License-Identifier: Apache-2.0
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

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torchmetrics
import torchvision
import transformers
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor
from diffsketching_pipeline.command_line import parse_arguments, user_errors
from diffsketching_pipeline.evaluation.arguments import (
    EvaluationArguments,
    check_evaluation_arguments,
    parse_images,
    sketch_reader,
)
from diffsketching_pipeline.evaluation.cost import measure_memory
from diffsketching_pipeline.evaluation.extractors import Evaluator, read_training_photos
from diffsketching_pipeline.evaluation.free_hand_gap import free_hand_gap, read_contour_metrics
from diffsketching_pipeline.evaluation.generation import Plan, generate, labels_to_give
from diffsketching_pipeline.evaluation.image_sets import (
    Drawing,
    ImageSet,
    check_labels,
    check_settings,
    list_class_folders,
    match_images,
    read_drawings,
    read_photos,
    read_system,
    select_drawings,
    write_text,
)
from diffsketching_pipeline.evaluation.measurements import Scores, add_judge
from diffsketching_pipeline.evaluation.metrics import CONTOUR_RESOLUTION, sample_like
from diffsketching_pipeline.evaluation.perceptual import check_perceptual_components, perceptual_sketch_distances
from diffsketching_pipeline.evaluation.plans import generation_settings, images_dir, make_plans, redraw, redrawn_dir
from diffsketching_pipeline.evaluation.report import (
    make_table,
    scores_to_json,
    write_contact_sheets,
    write_nearest_sheet,
)
from diffsketching_pipeline.evaluation.scoring import Scorer, make_noise
from diffsketching_pipeline.evaluation.systems import System
from diffsketching_pipeline.files import lock_folder
from diffsketching_pipeline.manifest import weights_sha256
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.splits import in_first_half


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
        pipeline = DiffSketchingPipeline.from_pretrained(find_checkpoint(args.model))
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


RESERVED_NAMES = ("training_photos", "reference_photos", "reference_photos_drawn_classes", "noise")


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
    the side of the first of the judges. `lock` keeps other runs out of `output_dir` as long as this one lives.
    """

    evaluators: list[Evaluator]
    drawings: list[Drawing]
    selected: list[Drawing]
    sketches: Tensor
    systems: dict[str, ImageSet]
    reference: ImageSet
    reader: SketchProcessor
    on_contours: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: ImageSet | None = None
    pipeline: DiffSketchingPipeline | None = None
    weights: dict[str, str] = field(default_factory=dict)
    lock: FileLock | None = None
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
        return self.reader.preprocess(paths)


def prepare(args: EvaluationArguments, accelerator: Accelerator) -> Inputs:
    """Reads and checks all input; what is wrong with it is a `ValueError` before any long work."""
    check_evaluation_arguments(args)
    # A refused evaluation makes no folder; one that another evaluation works in is there.
    output_dir = Path(args.output_dir)
    lock = lock_folder(output_dir) if accelerator.is_main_process and output_dir.is_dir() else None
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
    reader = sketch_reader(args, CONTOUR_RESOLUTION)
    sketches = reader.preprocess([str(drawing.path) for drawing in drawings])
    systems = {name: read_system(name, images, evaluator.resolution) for name, images in matched.items()}
    reference = read_photos(reference_files, f"{Path(args.reference).name} photos", evaluator.resolution)
    inputs = Inputs(evaluators, drawings, selected, sketches, systems, reference, reader, on_contours)
    if args.model is not None:
        inputs.pipeline = load_model(args, evaluators, selected)
        inputs.plans = make_plans(args, inputs.pipeline, drawings, selected)
    check_names(inputs.plans, folders)
    if accelerator.is_main_process:
        inputs.train = read_training_photos(train_files, evaluator, args.eval_batch_size, args.cache_dir)
        inputs.lock = lock or lock_folder(output_dir)
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
    """Describe in one line how a system generates; what is as in a plain call is left out."""
    settings = plan.system.resolve(plan.pipeline)
    scheduler, withhold = settings.pop("scheduler"), settings.pop("withhold")
    for name in ("strength", "guidance_start", "guidance_end"):
        if settings[name] == getattr(System(), name):
            del settings[name]
    parts = [scheduler, *(f"{name}={value}" for name, value in settings.items())]
    if args.dtype != "float32":
        parts.append(f"dtype={args.dtype}")
    if args.threshold is not None:
        parts.append(f"threshold={args.threshold:g}")
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
    reference = evaluator.extract_features(inputs.reference.at(evaluator.resolution), batch_size)
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
        evaluator.extract_features(images, batch_size)
        scores[images.name] = scorer.score_system(images) if is_first else scorer.judge_system(images)
        if is_first and args.perceptual_sketch_distance and inputs.pipeline is not None:
            reader = sketch_reader(args, max(inputs.pipeline.height, inputs.pipeline.width))
            distances = perceptual_sketch_distances(inputs.pipeline, images, inputs.drawings, batch_size, reader)
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
        redraw(inputs.selected, args.free_hand_strength, redrawn_dir(args), inputs.reader)
    for plan in inputs.plans:
        generate(plan, args.class_labels, args.eval_batch_size, accelerator)
    if inputs.train is None:
        return {}
    for plan in inputs.plans if args.measure_memory and accelerator.device.type == "cpu" else []:
        batch = plan.jobs[: args.eval_batch_size]
        labels = labels_to_give(batch, args.class_labels)
        dtype = getattr(torch, args.dtype)
        folder = images_dir(args, plan.system)
        measure_memory(find_checkpoint(args.model), dtype, plan.system, batch, labels, folder, args.threshold)
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


def run(words: Sequence[str] | None = None, program: str = "evaluate.py") -> None:
    """
    Run an evaluation from the command line, and print where the table is.

    Args:
        words: the arguments, those of the process when left out.
        program: what the user has called, for `--help` and errors.

    Raises:
        SystemExit: with code 2 and one line on stderr for what is wrong with the input.
    """
    with user_errors(program):
        args = parse_arguments(EvaluationArguments, __doc__, words, program=program)
        accelerator = Accelerator()
        inputs = prepare(args, accelerator)
    is_main_process = accelerator.is_main_process
    finish(args, inputs, accelerator)
    if is_main_process:
        print(Path(args.output_dir) / "metrics.md")


if __name__ == "__main__":
    run()
