# SPDX-License-Identifier: Apache-2.0
"""Ways to generate photos with one model that `evaluate.py` compares, and what each costs.

A file for `--systems` maps names to what differs from a plain call of the pipeline:

    full: {}
    unconditional: {drop: [sketch, class], classifier_guidance_scale: 0}
    sdedit: {drop: [sketch], strength: 0.7, classifier_guidance_scale: 0}
    unipc-10: {scheduler: UniPCMultistepScheduler, num_inference_steps: 10}

What is withheld is not told to the UNet. The drawing still serves as start (`strength`), for the perceptual guidance and to
guess the class; the class still serves the classifier's guidance.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import yaml

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.deprecation import warn_renamed
from diffsketching_pipeline.evaluation.image_sets import Drawing
from diffsketching_pipeline.pipeline_options import SamplingOptions
from diffsketching_pipeline.schedulers import (
    SUPPORTED_SCHEDULERS,
    sampling_scheduler,
    scheduler_step_kwargs,
    timesteps_from,
)
from diffsketching_pipeline.unet_surgery import without_class, without_sketch


SCALE_NAMES = ("sketch_guidance_scale", "classifier_guidance_scale", "perceptual_guidance_scale")
SAMPLING_NAMES = ("num_inference_steps", "eta", "sketch_abstraction", *SCALE_NAMES)
CLIPPING_NAMES = ("clip_sample", "clip_sample_range")


class Job(NamedTuple):
    """One image to generate: from which file, for which drawing, to where."""

    drawing: Drawing
    sketch: Path
    seed: int
    path: Path


@dataclass(frozen=True)
class System:
    """
    The differences of a system from a plain call of the pipeline; `None` leaves it to the checkpoint.

    Attributes:
        name: the column of the table, and the folder of the images.
        drop: what the UNet is not told: `"sketch"`, `"class"`, both or nothing.
        scheduler: name of a scheduler of diffusers, with the noise schedule of the checkpoint's own.
        timestep_spacing: the scheduler's spacing, if not the checkpoint's.
        strength, guidance_start, guidance_end, num_inference_steps, eta, sketch_abstraction, sketch_guidance_scale,
            classifier_guidance_scale, perceptual_guidance_scale: arguments of the pipeline's call.
    """

    name: str = "generated"
    drop: tuple[str, ...] = ()
    scheduler: str | None = None
    timestep_spacing: str | None = None
    strength: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    num_inference_steps: int | None = None
    eta: float | None = None
    sketch_abstraction: float | None = None
    sketch_guidance_scale: float | None = None
    classifier_guidance_scale: float | None = None
    perceptual_guidance_scale: float | None = None

    def build(self, pipeline: DiffSketchingPipeline) -> DiffSketchingPipeline:
        """The pipeline that generates for this system; shares what it does not change with the given one."""
        unet, scheduler = pipeline.unet, pipeline.scheduler
        if "sketch" in self.drop and pipeline.takes_sketch:
            unet = without_sketch(unet, pipeline.sample_channels)
        if "class" in self.drop and unet.config.num_class_embeds is not None:
            if pipeline.null_class is None:
                raise ValueError(f"{self._place} has `drop` class, but the UNet has no 'no class'.")
            unet = without_class(unet, pipeline.null_class)
        if self.scheduler is not None or self.timestep_spacing is not None:
            kind = type(scheduler) if self.scheduler is None else getattr(diffusers, self.scheduler)
            changes = {} if self.timestep_spacing is None else {"timestep_spacing": self.timestep_spacing}
            clipping = {name: scheduler.config[name] for name in CLIPPING_NAMES if name in scheduler.config}
            scheduler = kind.from_config(scheduler.config, **changes)
            # A scheduler that does not clip itself forgets that the pipeline is to.
            scheduler.register_to_config(**clipping)
        built = DiffSketchingPipeline.from_pipe(pipeline, unet=unet, scheduler=scheduler)
        built.set_progress_bar_config(disable=True)
        return built

    @property
    def _place(self) -> str:
        return f"the system {self.name!r}"

    @property
    def _options(self) -> SamplingOptions:
        names = (*SAMPLING_NAMES, "guidance_start", "guidance_end")
        return SamplingOptions(**{name: getattr(self, name) for name in names})

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        names = ("strength", "guidance_start", "guidance_end", *SAMPLING_NAMES)
        return {name: getattr(self, name) for name in names}

    def resolve(self, pipeline: DiffSketchingPipeline) -> dict[str, Any]:
        """Return the settings of a call, with the checkpoint's recommendations filled in; `pipeline` is the system's own."""
        resolved = self._options.resolve(pipeline, has_sketch=True, has_class=pipeline.num_classes > 0)
        return {
            "scheduler": type(pipeline.scheduler).__name__,
            "timestep_spacing": pipeline.scheduler.config.timestep_spacing,
            "num_inference_steps": resolved.num_inference_steps,
            "eta": resolved.eta,
            # Where it is no choice it is no condition of a number either.
            **({"sketch_abstraction": resolved.sketch_abstraction} if pipeline.takes_abstraction else {}),
            **resolved.scales,
            "strength": self.strength,
            "guidance_start": self.guidance_start,
            "guidance_end": self.guidance_end,
            # The key of `metrics.json` since before the setting was renamed.
            "withhold": list(self.drop),
        }

    def uses_class(self, pipeline: DiffSketchingPipeline) -> bool:
        """Return whether a class has any influence on the images."""
        told = pipeline.unet.config.num_class_embeds is not None and "class" not in self.drop
        return told or self.resolve(pipeline)["classifier_guidance_scale"] != 0

    def uses_drawing(self, pipeline: DiffSketchingPipeline) -> bool:
        """Return whether the drawing has any influence on the images."""
        guided = self.resolve(pipeline)["perceptual_guidance_scale"] != 0
        told = pipeline.takes_sketch
        return told or guided or self.strength < 1 or self.uses_class(pipeline)

    def check(self, pipeline: DiffSketchingPipeline) -> None:
        """Raises `ValueError` for what its pipeline would refuse in the middle of the work."""
        if self.sketch_abstraction and not pipeline.takes_abstraction:
            raise ValueError(
                f"{self._place} has `sketch_abstraction={self.sketch_abstraction}`, but its UNet has no plane for it."
            )
        try:
            pipeline.check_inputs("drawing", None, 1, self.strength, None, None, self._options)
            steps = self.resolve(pipeline)["num_inference_steps"]
            scheduler = sampling_scheduler(pipeline.scheduler, steps)
            timesteps_from(scheduler, steps, self.strength)
            scheduler_step_kwargs(scheduler, self.eta or 0.0, None)
        except ValueError as error:
            raise ValueError(f"{self._place} cannot generate: {error}") from error

    def sample(
        self, pipeline: DiffSketchingPipeline, jobs: Sequence[Job], class_labels: list[str] | None, **kwargs: Any
    ) -> Any:
        """One image of each job, by the system's own pipeline; `class_labels` of `None` are guessed from the drawing."""
        sketch: list[str] | None = [str(job.sketch) for job in jobs]
        labels: Any = class_labels
        if not self.uses_drawing(pipeline):
            sketch, labels = None, [None] * len(jobs)
        elif not self.uses_class(pipeline) and pipeline.num_classes > 0:
            # Any class will do, and guessing one would cost an evaluation.
            labels = [0] * len(jobs)
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        return pipeline(
            sketch, class_labels=labels, num_images_per_sketch=1, generator=generators, **self.call_kwargs, **kwargs
        )


def read_systems(path: str) -> list[System]:
    """
    The systems of a YAML file of `name: {setting: value}`.

    Raises:
        ValueError: no such file, another content, or a setting that does not exist or has another type; names it.
    """
    if not Path(path).is_file():
        raise ValueError(f"`systems` must be a YAML file, but {path!r} is no file.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`systems` {path!r} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"`systems` must map names to settings, but {path!r} holds {type(content).__name__}.")
    return [_read_system(str(name), settings or {}, path) for name, settings in content.items()]


def _read_system(name: str, settings: Any, path: str) -> System:
    place = f"`systems` {path!r}: {name!r}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ValueError(f"{place} must be a name of letters, digits and `_.+-`: it becomes a folder.")
    if not isinstance(settings, dict):
        raise ValueError(f"{place} must hold `setting: value`, but holds {settings!r}.")
    if "withhold" in settings:
        warn_renamed("withhold", "drop")
        if "drop" in settings:
            raise ValueError(f"{place} has `withhold`, the old name of `drop`, too: give one of them.")
        settings = {"drop" if key == "withhold" else key: value for key, value in settings.items()}
    known = [f.name for f in fields(System) if f.name != "name"]
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(str(key), known)
            hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}."
            raise ValueError(f"{place} has the unknown setting {key!r}: {hint}")
    settings = dict(settings)
    drop = settings.pop("drop", [])
    drop = [drop] if isinstance(drop, str) else drop
    if not isinstance(drop, list) or not set(drop) <= {"sketch", "class"}:
        raise ValueError(f"{place} must have `drop` sketch, class or [sketch, class], but has {drop!r}.")
    scheduler, names = settings.get("scheduler"), [kind.__name__ for kind in SUPPORTED_SCHEDULERS]
    if scheduler is not None and scheduler not in names:
        raise ValueError(f"{place} has the `scheduler` {scheduler!r}: there are {', '.join(names)}.")
    for key, value in settings.items():
        if key in ("scheduler", "timestep_spacing"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{place} must have a number for `{key}`, but has {value!r}.")
    return System(name=name, drop=tuple(sorted(set(drop))), **settings)


def with_defaults(system: System, defaults: dict[str, Any]) -> System:
    """A system with `defaults` in the place of what it leaves to the checkpoint, and of what it can be told at all."""
    if "sketch" in system.drop:
        defaults = {**defaults, "sketch_abstraction": None}
    return replace(system, **{name: value for name, value in defaults.items() if getattr(system, name) is None})
