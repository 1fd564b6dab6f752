# SPDX-License-Identifier: Apache-2.0
"""The arguments that the calls of all pipelines share: what is wrong with them, and what those that are left out stand for."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import DDIMScheduler, SchedulerMixin
from diffusers.utils import logging

from diffsketching_pipeline.conditioning import ClassVocabulary, as_list
from diffsketching_pipeline.denoising import NoisePrediction
from diffsketching_pipeline.guidance import (
    GUIDANCE_TENSOR_INPUTS,
    ClassifierGuidanceCallback,
    ColorGuidanceCallback,
    Colors,
    SketchGuidanceCallback,
    check_guidance_interval,
)
from diffsketching_pipeline.images.reading import is_number
from diffsketching_pipeline.messages import brief


logger = logging.get_logger(__name__)

# The value at which each scale does nothing, and the components that any other needs.
_SCALES: dict[str, tuple[float, tuple[str, ...]]] = {
    "sketch_guidance_scale": (1.0, ()),
    "classifier_guidance_scale": (0.0, ("classifier",)),
    "perceptual_guidance_scale": (0.0, ("sketcher", "sketch_encoder")),
}
_COMPONENT_CLASSES = {
    "classifier": "NoisyImageClassifier",
    "sketcher": "PhotoSketcher",
    "sketch_encoder": "ResNetForImageClassification",
}
_DEFAULT_NUM_INFERENCE_STEPS = 50
# Colors are settled in the first part of the guided steps; guided to the end, fabric would be painted flat.
_COLORED_SHARE = 0.6
# Settings other than the number of steps and the scales for which a checkpoint may recommend a value in [0, 1].
_RECOMMENDED_SHARES = ("eta", "sketch_abstraction", "class_mixture", "max_class_entropy")
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


if TYPE_CHECKING:

    class CalledPipeline(Protocol):
        """The members used of the called pipeline; see [`~pipeline_base.DiffSketchingMixin`], which imports this module."""

        unet: UNet2DModel
        scheduler: SchedulerMixin
        vae: Any
        recommended: dict[str, Any]
        _callback_tensor_inputs: list[str]

        @property
        def classes(self) -> ClassVocabulary: ...

        @property
        def sketch_channels(self) -> int: ...

        @property
        def takes_sketch(self) -> bool: ...

        @property
        def takes_abstraction(self) -> bool: ...


@dataclass
class SamplingOptions:
    """Hold the arguments that the calls of all pipelines share; described in [`DiffSketchingPipeline.__call__`]."""

    sketch_guidance_scale: float | None = None
    classifier_guidance_scale: float | None = None
    perceptual_guidance_scale: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_callbacks: PipelineCallback | MultiPipelineCallbacks | Sequence[PipelineCallback] | None = None
    eta: float | None = None
    clip_sample: bool | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    output_type: str = "pil"
    callback_on_step_end: Callable[..., dict] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    negative_class_labels: Any = None
    color_hint: Any = None
    color_guidance_scale: float = 0.0
    sketch_abstraction: float | None = None
    num_inference_steps: int | None = None

    def __post_init__(self):
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_on_step_end_tensor_inputs = self.callback_on_step_end.tensor_inputs

    @property
    def scales(self) -> dict[str, float | None]:
        """The scales that a checkpoint recommends values for, as they were given."""
        return {name: getattr(self, name) for name in _SCALES}

    def for_noise_of(self, latents, images=None) -> "SamplingOptions":
        """
        Return the same for the way back from inverted noise: `latents` with `clip_sample=False`, or that of `images`. A scale
        that is not given is then off, because what a checkpoint recommends would lead elsewhere.
        """
        clip_sample = False if images is not None and self.clip_sample is None else self.clip_sample
        if images is None and (latents is None or clip_sample is not False):
            return self
        off: dict[str, Any] = {name: _SCALES[name][0] for name, scale in self.scales.items() if scale is None}
        return replace(self, clip_sample=clip_sample, **off)

    def check(self, pipe: "CalledPipeline", class_labels, has_sketch: bool, latents=None) -> None:
        """
        Refuse what is wrong before anything is computed.

        Args:
            pipe: the pipeline that is called.
            class_labels, latents: those of the call.
            has_sketch: whether the network will be shown a drawing.

        Raises:
            ValueError: for an argument out of range, or one that needs a component, a class or a drawing that is not there.
        """
        check_has_classes(pipe, class_labels)
        for name, scale in self.scales.items():
            _check_scale(pipe, name, scale, has_sketch)
        self._check_negative_class(pipe, has_sketch)
        check_guidance_interval(self.guidance_start, self.guidance_end)
        self._check_guidance_callbacks(pipe, has_sketch)
        scale = self.color_guidance_scale
        if not is_number(scale) or not 0.0 <= scale <= 1.0:
            raise ValueError(f"`color_guidance_scale` has to be in [0, 1] but is {scale!r}.")
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"`eta` has to be in [0, 1] or None but is {self.eta}.")
        if self.clip_sample not in (None, True, False):
            raise ValueError(f"`clip_sample` has to be None, True or False but is {self.clip_sample!r}.")
        if self.clip_sample and pipe.vae is not None:
            raise ValueError(
                "`clip_sample` must be None or False with a `vae`, whose latents have no range to be clipped to, but got"
                " True."
            )
        check_abstraction(self.sketch_abstraction, has_sketch)
        if self.output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent' but is {self.output_type!r}.")
        if latents is not None and not torch.is_tensor(latents):
            raise ValueError(f"`latents` has to be a tensor but is {type(latents).__name__}.")
        self._check_generator()
        unknown = set(self.callback_on_step_end_tensor_inputs or ()) - set(pipe._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {pipe._callback_tensor_inputs} but has"
                f" {sorted(unknown)}."
            )

    def call_on_step_end(
        self,
        pipe: "CalledPipeline",
        step_index: int,
        timestep: Any,
        latents: torch.Tensor,
        prediction: NoisePrediction,
    ) -> torch.Tensor:
        """Return the latents to go on with after a step, which `callback_on_step_end` may replace."""
        if self.callback_on_step_end is None:
            return latents
        values = {"latents": latents, **prediction._asdict()}
        kwargs = {name: values[name] for name in self.callback_on_step_end_tensor_inputs}
        replaced = self.callback_on_step_end(pipe, step_index, timestep, kwargs) or {}
        return replaced.get("latents", latents)

    def _check_generator(self) -> None:
        given = self.generator
        entries = given if isinstance(given, (list, tuple)) else [given]
        if given is not None and not all(isinstance(entry, torch.Generator) for entry in entries):
            raise ValueError(
                f"`generator` must be a `torch.Generator`, a list with one for each image, or None, but got {given!r}."
            )

    def _check_guidance_callbacks(self, pipe: "CalledPipeline", has_sketch: bool) -> None:
        for callback in _flatten_callbacks(self.guidance_callbacks):
            unknown = set(callback.tensor_inputs) - set(GUIDANCE_TENSOR_INPUTS)
            if unknown:
                raise ValueError(
                    f"`guidance_callbacks` has a {type(callback).__name__} that asks for {sorted(unknown)}; there are"
                    f" {GUIDANCE_TENSOR_INPUTS}."
                )
            if isinstance(callback, ClassifierGuidanceCallback):
                _check_scale(pipe, "classifier_guidance_scale", callback.config.scale, has_sketch)
            elif isinstance(callback, SketchGuidanceCallback):
                _check_scale(pipe, "perceptual_guidance_scale", callback.config.scale, has_sketch)

    def _check_negative_class(self, pipe: "CalledPipeline", has_sketch: bool) -> None:
        if self.negative_class_labels is None:
            return
        negative = as_list(self.negative_class_labels)
        for label in negative if isinstance(negative, list) else [negative]:
            if label is not None:
                pipe.classes.index_of(label, "negative_class_labels")
            elif pipe.classes.null_class is None:
                raise ValueError(
                    f"`negative_class_labels={negative!r}` has a None, but this checkpoint's `unet` has no 'no class' to"
                    " stand for it: give a class for each sketch."
                )
        scale = self.sketch_guidance_scale
        if scale is None:
            scale = pipe.recommended.get("sketch_guidance_scale", 1.0)
        if not has_sketch or pipe.unet.config.num_class_embeds is None or not pipe.takes_sketch or scale == 1:
            raise ValueError(
                f"`negative_class_labels={self.negative_class_labels!r}` takes the place of the class where guidance"
                " withholds the drawing: give a `sketch`, a `sketch_guidance_scale` above 1 and a `unet` with classes and"
                f" {pipe.sketch_channels} input channels, or leave it at None."
            )

    def resolve(
        self, pipe: "CalledPipeline", *, has_sketch: bool, has_class: bool, has_latents: bool = False
    ) -> "ResolvedOptions":
        """
        Return what a call uses, with the checkpoint's recommendation for what was left at `None`.

        Args:
            pipe: the pipeline that is called.
            has_sketch: whether the network is shown a drawing.
            has_class: whether each result has a class.
            has_latents: whether the noise is given, from a photo maybe.

        Raises:
            ValueError: for classifier guidance without a class.
        """
        scales = {name: self._resolve_scale(pipe, name, has_sketch, has_class) for name in _SCALES}
        clip_sample = self.clip_sample
        if clip_sample is None:
            # The scheduler's setting is about pixels.
            clip_sample = pipe.vae is None and bool(pipe.scheduler.config.get("clip_sample", False))
        resolved = ResolvedOptions(
            given=self,
            num_inference_steps=resolve_num_inference_steps(pipe.recommended, self.num_inference_steps),
            eta=self._resolve_eta(pipe, has_latents),
            sketch_abstraction=self._resolve_abstraction(pipe, has_sketch),
            clip_sample=clip_sample,
            **scales,
        )
        if not has_class:
            resolved.check_needs_no_class()
        return resolved

    def _resolve_scale(self, pipe: "CalledPipeline", name: str, has_sketch: bool, has_class: bool) -> float:
        given, (off, components) = getattr(self, name), _SCALES[name]
        if given is not None:
            return float(given)
        usable = all(getattr(pipe, component) is not None for component in components)
        if name == "sketch_guidance_scale":
            usable = pipe.takes_sketch
        usable = usable and (has_class if name == "classifier_guidance_scale" else has_sketch)
        return float(pipe.recommended.get(name, off)) if usable else off

    def _resolve_eta(self, pipe: "CalledPipeline", has_latents: bool) -> float:
        if self.eta is not None:
            return float(self.eta)
        # Given noise, inverted from a photo maybe, is to lead to one result; other schedulers have no η.
        if has_latents or not isinstance(pipe.scheduler, DDIMScheduler):
            return 0.0
        return float(pipe.recommended.get("eta", 0.0))

    def _resolve_abstraction(self, pipe: "CalledPipeline", has_sketch: bool) -> float:
        abstraction, usable = self.sketch_abstraction, has_sketch and pipe.takes_abstraction
        if abstraction and not usable:
            logger.warning(
                f"This call does not use `sketch_abstraction={abstraction}`: the `unet` has"
                f" {pipe.unet.config.in_channels} input channels, and none of them is a plane for it."
            )
        if abstraction is None:
            abstraction = pipe.recommended.get("sketch_abstraction", 0.0)
        return float(abstraction) if usable else 0.0


@dataclass(frozen=True)
class ResolvedOptions:
    """
    Hold what a call uses.

    Attributes:
        given: the arguments as they were given.
        num_inference_steps, eta, sketch_abstraction, clip_sample: as for the call, none of them `None`.
        sketch_guidance_scale, classifier_guidance_scale, perceptual_guidance_scale: the same.
    """

    given: SamplingOptions
    num_inference_steps: int
    eta: float
    sketch_abstraction: float
    clip_sample: bool
    sketch_guidance_scale: float
    classifier_guidance_scale: float
    perceptual_guidance_scale: float

    @property
    def scales(self) -> dict[str, float]:
        """The three scales by name."""
        return {name: getattr(self, name) for name in _SCALES}

    @property
    def record(self) -> dict[str, Any]:
        """Return what the pipeline tells of its last call, without what was given to it: that may be large."""
        return {"guidance_scales": self.scales, "eta": self.eta, "sketch_abstraction": self.sketch_abstraction}

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """Fractions of the steps between which guidance is on."""
        return self.given.guidance_start, self.given.guidance_end

    def guidance_callbacks(self, colors: Colors | None = None) -> list[PipelineCallback]:
        """Return the callbacks that the scales stand for, and those that were given; `colors` are what a hint asks for."""
        start, end = self.guidance_interval
        callbacks: list[PipelineCallback] = []
        if self.classifier_guidance_scale != 0.0:
            callbacks.append(ClassifierGuidanceCallback(self.classifier_guidance_scale, start, end))
        if self.perceptual_guidance_scale != 0.0:
            scale = self.perceptual_guidance_scale
            callbacks.append(SketchGuidanceCallback(scale, guidance_start=start, guidance_end=end))
        if colors is not None and self.given.color_guidance_scale != 0.0:
            colored_end = start + _COLORED_SHARE * (end - start)
            callbacks.append(ColorGuidanceCallback(colors, self.given.color_guidance_scale, start, colored_end))
        return callbacks + _flatten_callbacks(self.given.guidance_callbacks)

    def check_needs_no_class(self) -> None:
        """
        Raises:
            ValueError: if there is classifier guidance.
        """
        for callback in self.guidance_callbacks():
            if isinstance(callback, ClassifierGuidanceCallback) and callback.config.scale != 0.0:
                raise ValueError(
                    f"`classifier_guidance_scale={callback.config.scale}` needs a class for each image: give"
                    " `class_labels`."
                )


def resolve_num_inference_steps(recommended: dict[str, Any], num_inference_steps: int | None) -> int:
    """Return the number of steps that was given, else the one that the checkpoint recommends."""
    if num_inference_steps is not None:
        return num_inference_steps
    return recommended.get("num_inference_steps", _DEFAULT_NUM_INFERENCE_STEPS)


def check_recommended(recommended: Any, where: str = "This pipeline") -> None:
    """
    Args:
        recommended: what a checkpoint recommends, or `None`.
        where: what has it, for errors.

    Raises:
        ValueError: for what is no dict, a setting that there is not, or a value out of range.
    """
    if recommended is None:
        return
    if not isinstance(recommended, Mapping):
        raise ValueError(f"{where}: `recommended` must be a dict of settings, but got {brief(recommended)}.")
    unknown = set(recommended) - {"num_inference_steps", *_SCALES, *_RECOMMENDED_SHARES}
    if unknown:
        raise ValueError(f"{where}: `recommended` has unknown keys {brief(sorted(map(str, unknown)))}.")
    for name, value in recommended.items():
        if name == "num_inference_steps":
            check_integer("recommended.num_inference_steps", value, at_least=1)
        elif name in _RECOMMENDED_SHARES and not (is_number(value) and 0.0 <= value <= 1.0):
            raise ValueError(f"{where}: `recommended` must have a `{name}` in [0, 1], but got {brief(repr(value))}.")
        elif not is_number(value) or not math.isfinite(value):
            raise ValueError(f"{where}: `recommended` must have a finite `{name}`, but got {brief(repr(value))}.")


def check_has_classes(pipe: "CalledPipeline", class_labels: Any) -> None:
    """
    Raises:
        ValueError: if `class_labels` is an empty list, or given to a checkpoint without classes.
    """
    labels = as_list(class_labels)
    if isinstance(labels, list) and not labels:
        raise ValueError("`class_labels` is empty: give at least one, or None.")
    if class_labels is not None and pipe.classes.num_classes == 0:
        raise ValueError(f"`class_labels` is {class_labels!r} but this checkpoint has no classes: leave it at None.")


def check_abstraction(sketch_abstraction: Any, has_sketch: bool) -> None:
    """
    Raises:
        ValueError: if it is outside of [0, 1], or above 0 without a drawing.
    """
    if sketch_abstraction is None:
        return
    if not is_number(sketch_abstraction) or not 0.0 <= sketch_abstraction <= 1.0:
        raise ValueError(f"`sketch_abstraction` must be in [0, 1] or None, but got {sketch_abstraction!r}.")
    if sketch_abstraction > 0.0 and not has_sketch:
        raise ValueError(
            f"`sketch_abstraction={sketch_abstraction}` needs a drawing: give a `sketch`, or leave it at None."
        )


def check_integer(name: str, value: Any, at_least: int) -> None:
    """
    Raises:
        ValueError: if the argument `name` is no integer, or a smaller one.
    """
    if not is_number(value, numbers.Integral) or value < at_least:
        raise ValueError(f"`{name}` has to be an integer of at least {at_least} but is {brief(repr(value))}.")


def check_invertible(scheduler: Any, num_fixed_point_iterations: Any) -> None:
    """
    Raises:
        ValueError: for a scheduler whose steps cannot be inverted, or a number of iterations that is none.
    """
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"`invert` needs a DDIMScheduler, but `scheduler` is a {type(scheduler).__name__}: set `pipe.scheduler"
            " = DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    check_integer("num_fixed_point_iterations", num_fixed_point_iterations, at_least=0)


def check_inversion(
    pipe: "CalledPipeline",
    class_labels: Any,
    has_sketch: bool,
    num_fixed_point_iterations: Any,
    sketch_abstraction: Any,
) -> None:
    """
    Refuse what is wrong with the arguments of `invert` before anything is computed.

    Raises:
        ValueError: as [`check_invertible`], for classes or an abstraction that are not there, or a drawing that the network
            is not shown.
    """
    check_invertible(pipe.scheduler, num_fixed_point_iterations)
    check_has_classes(pipe, class_labels)
    check_abstraction(sketch_abstraction, has_sketch)
    if has_sketch and not pipe.takes_sketch:
        raise ValueError(
            f"`sketch` needs a `unet` with {pipe.sketch_channels} input channels to be inverted with: leave it at None."
        )


def check_strength(strength: float) -> None:
    """
    Raises:
        ValueError: if it is outside of (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"`strength` has to be in (0, 1] but is {strength}.")


def expand_generator(generator: Any, batch_size: int, per: str = "image") -> list[torch.Generator]:
    """
    Return one generator per image (or what `per` says), so that an image does not depend on its batch. A single one, or
    torch's default, is expanded by drawing one child seed per image from it.

    Raises:
        ValueError: if a list has another length than `batch_size`.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch_size:
            raise ValueError(f"`generator` has to have one entry per {per}, {batch_size}, but has {len(generator)}.")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = [torch.randint(2**63 - 1, (1,), generator=generator, device=device) for _ in range(batch_size)]
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def _check_scale(pipe: "CalledPipeline", name: str, scale: Any, has_sketch: bool) -> None:
    if scale is None:
        return
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"`{name}` has to be a finite number or None but is {scale!r}.")
    off, components = _SCALES[name]
    if scale == off:
        return
    for component in components:
        if getattr(pipe, component) is None:
            raise ValueError(
                f"`{name}={scale}` needs the component `{component}`, which this checkpoint does not have: load one"
                f" with `{_COMPONENT_CLASSES[component]}.from_pretrained` and pass `{component}=...` to"
                f" `from_pretrained`, or leave `{name}` at {off}."
            )
    if name == "sketch_guidance_scale" and not pipe.takes_sketch:
        raise ValueError(
            f"`{name}={scale}` needs a component `unet` with {pipe.sketch_channels} input channels, and this one has"
            f" {pipe.unet.config.in_channels}: see `expand_unet_for_sketch`, or leave `{name}` at {off}."
        )
    if name != "classifier_guidance_scale" and not has_sketch:
        raise ValueError(f"`{name}={scale}` needs a drawing: give a `sketch`, or leave `{name}` at {off}.")


def _flatten_callbacks(callbacks: Any) -> list[PipelineCallback]:
    if callbacks is None:
        return []
    if isinstance(callbacks, MultiPipelineCallbacks):
        callbacks = callbacks.callbacks
    if isinstance(callbacks, PipelineCallback):
        callbacks = [callbacks]
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(c, PipelineCallback) for c in callbacks):
        raise ValueError(
            "`guidance_callbacks` has to be a `PipelineCallback`, a `MultiPipelineCallbacks` or a list of callbacks but"
            f" is {callbacks!r}."
        )
    return list(callbacks)
