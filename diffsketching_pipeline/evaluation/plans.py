# SPDX-License-Identifier: Apache-2.0
"""Plans of what an evaluation generates: which drawings, by which systems, with which seeds."""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor
from diffsketching_pipeline.evaluation.arguments import EvaluationArguments
from diffsketching_pipeline.evaluation.generation import Plan
from diffsketching_pipeline.evaluation.image_sets import Drawing, file_digest, save_png
from diffsketching_pipeline.evaluation.metrics import CONTOUR_RESOLUTION
from diffsketching_pipeline.evaluation.systems import SAMPLING_NAMES, Job, System, read_systems, with_defaults
from diffsketching_pipeline.images.free_hand import free_hand_distortion


REDRAWN_MARGIN = 1 / 6
"""Paper, as a share of the side, that is put around a drawing before it is redrawn, so that nothing leaves the page."""


def redraw(drawings: list[Drawing], strength: float, folder: Path, reader: SketchProcessor) -> None:
    """
    Writes a copy of each drawing, `folder/<class>/<sketch>.png`, as an unskilled hand would have made it. How depends on the
    drawing's class and name alone, so that every system and every half is given the same copies. `reader` reads them at
    `CONTOUR_RESOLUTION`.
    """
    for drawing in tqdm(drawings, desc="Redrawing", unit="drawing", leave=False):
        page = reader.preprocess(str(drawing.path))[0, 0].numpy()
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
    """Return the folder of a system's images: each of several systems has its own."""
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
    """Plan what each system is to generate, and check it; arguments of the script hold for what a system leaves open."""
    systems = [System()] if args.systems is None else read_systems(args.systems)
    defaults = {name: getattr(args, name) for name in SAMPLING_NAMES}
    plans = []
    for system in [with_defaults(system, defaults) for system in systems]:
        plan = Plan(system, system.build(pipeline), plan_jobs(args, system, drawings, selected))
        system.check(plan.pipeline)
        if args.threshold is not None:
            plan.pipeline.sketch_processor.register_to_config(threshold=args.threshold)
        plans.append(plan)
    if len(plans[0].jobs) < 2:
        raise ValueError("`num_images_per_sketch` must be at least 2 for a single drawing.")
    return plans


def generation_settings(
    args: EvaluationArguments, plan: Plan, weights: dict[str, str], drawings: list[Drawing]
) -> dict[str, Any]:
    """Return what the images depend on in addition to the drawing's name and the image's number; `weights` are the model's."""
    scheduler = plan.pipeline.scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    plain, system = System(), plan.system
    # What is as in a plain call is left out, so that images made before a setting existed are still known.
    more = ("strength", "guidance_start", "guidance_end")
    return {
        "weights": weights,
        "scheduler": {"class": type(scheduler).__name__, **config},
        "recommended": plan.pipeline.recommended,
        "sketches": file_digest(drawing.path for drawing in drawings),
        "free_hand_strength": args.free_hand_strength or None,
        "dtype": None if args.dtype == "float32" else args.dtype,
        "threshold": args.threshold,
        **{name: getattr(args, name) for name in ("class_labels", "seed")},
        **{name: getattr(system, name) for name in SAMPLING_NAMES},
        **{n: None if getattr(system, n) == getattr(plain, n) else getattr(system, n) for n in more},
        "withhold": system.drop or None,  # by the name that the setting had when the first images were made
    }
