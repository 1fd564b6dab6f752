# SPDX-License-Identifier: Apache-2.0
"""What the three pipelines share: components, checks, conditioning, guidance, the loop and the inversion."""

import difflib
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import DDIMScheduler, PNDMScheduler, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from transformers import ResNetForImageClassification

from diffsketching_pipeline.autoencoding import AutoencoderCall, decode_latents, encode_photos, get_scale_factor
from diffsketching_pipeline.denoising import (
    _MIN_GUIDED_ALPHA_PROD,
    Conditioning,
    NoisePrediction,
    UNetInputs,
    denoise,
    get_alpha_prod,
    get_unet_inputs,
    invert,
    predict_noise,
    sampling_scheduler,
)
from diffsketching_pipeline.guidance import (
    ClassifierGuidanceCallback,
    ColourGuidanceCallback,
    Colours,
    SketchGuidanceCallback,
    blur,
    check_guidance_interval,
    float32_call,
    gradient_mode,
    is_guided_step,
)
from diffsketching_pipeline.image_processor import (
    SketchProcessor,
    enclosed_area,
    is_number,
    parse_palette,
    preprocess_colour_strokes,
    preprocess_mask,
    preprocess_photos,
)
from diffsketching_pipeline.manifest import forget_origins, write_manifest
from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher
from diffsketching_pipeline.pipeline_output import DiffSketchingPipelineOutput
from diffsketching_pipeline.registry import register
from diffsketching_pipeline.verification import check_checkpoint, fetch_manifest


register()
logger = logging.get_logger(__name__)

# What each scale costs in components, and the value at which it does nothing.
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
# Colours are settled in the first part of the guided steps; guided to the end, fabric would be painted flat.
_COLOURED_SHARE = 0.6
# A type checker takes the methods of diffusers' pipelines to be there; the class that is run has no base.
if TYPE_CHECKING:
    _Base = DiffusionPipeline
else:
    _Base = object
_Pipeline = TypeVar("_Pipeline", bound="DiffSketchingMixin")
# Settings beside the number of steps, η and the scales for which a checkpoint may recommend a value in [0, 1].
_RECOMMENDED_SHARES = ("sketch_abstraction", "class_mixture")


@dataclass
class SamplingOptions:
    """The arguments that the calls of all pipelines share; described in [`DiffSketchingPipeline.__call__`]."""

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
    colour_hint: Any = None
    colour_guidance_scale: float = 0.0
    sketch_abstraction: float | None = None

    def __post_init__(self):
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_on_step_end_tensor_inputs = self.callback_on_step_end.tensor_inputs

    @property
    def scales(self) -> dict[str, float | None]:
        """The scales that a checkpoint recommends values for, as they were given."""
        return {name: getattr(self, name) for name in _SCALES}

    def for_noise_of(self, latents, images=None) -> "SamplingOptions":
        """
        The same for the way back from inverted noise: `latents` with `clip_sample=False`, or that of `images`. A scale that
        is not given is then off, because what a checkpoint recommends would lead elsewhere.
        """
        clip_sample = False if images is not None and self.clip_sample is None else self.clip_sample
        if images is None and (latents is None or clip_sample is not False):
            return self
        off: dict[str, Any] = {name: _SCALES[name][0] for name, scale in self.scales.items() if scale is None}
        return replace(self, clip_sample=clip_sample, **off)


@dataclass
class Condition:
    """
    What one result follows: its rows (see [`~denoising.Conditioning`]) before they are joined to a batch.

    Attributes:
        class_labels: `[num_rows]`, or `None` without classes.
        sketch: `[num_rows, 1, height, width]` in pixels, or `None` without a drawing.
        weights: `[num_rows, 1, 1, 1]`, or of the size of x_t `[num_rows, 1, height, width]`; summing to 1.
        null_class_label: class where the drawing is withheld, or `None`.
        sketch_abstraction: how far the drawings may be off, in [0, 1].
    """

    class_labels: torch.Tensor | None
    sketch: torch.Tensor | None
    weights: torch.Tensor
    null_class_label: int | None
    sketch_abstraction: float = 0.0


def join_conditions(conditions: Sequence[Sequence[tuple[Condition, float]]]) -> Conditioning:
    """
    The [`~denoising.Conditioning`] of a batch.

    Args:
        conditions: for each image the conditions it follows and their shares, which sum to 1. All have a class or none
            has, and the same for drawings.
    """
    parts = [(image, *entry) for image, entries in enumerate(conditions) for entry in entries]
    device = parts[0][1].weights.device

    def join(name: str) -> torch.Tensor | None:
        values = [getattr(condition, name) for _, condition, _ in parts]
        return None if values[0] is None else torch.cat(values)

    null = [entries[0][0].null_class_label for entries in conditions]
    weights = [condition.weights * share for _, condition, share in parts]
    if any(weight.shape[-1] > 1 for weight in weights):
        size = max(weight.shape[-2:] for weight in weights)
        weights = [weight.expand(-1, -1, *size) for weight in weights]
    abstraction = [condition.sketch_abstraction for _, condition, _ in parts for _ in range(len(condition.weights))]
    return Conditioning(
        class_labels=join("class_labels"),
        sketch=join("sketch"),
        owner=torch.tensor([image for image, c, _ in parts for _ in range(len(c.weights))], device=device),
        null_class_labels=None if None in null else torch.tensor(null, device=device),
        weights=torch.cat(weights),
        sketch_abstraction=torch.tensor(abstraction, device=device) if any(abstraction) else None,
    )


class DiffSketchingMixin(_Base):
    r"""
    Base of the pipelines, beside [`DiffusionPipeline`]: a file that travels with a checkpoint may hold one subclass of that.

    Args:
        unet ([`UNet2DModel`]):
            Predicts ε, v or x_0 from the c channels of x_t (3, or those of the latents of a `vae`), from c + f² (and the
            sketch, folded by the f pixels per latent; f = 1 without a `vae`) or c + f² + 1 (and a plane for
            `sketch_abstraction`); class-conditional or not, with learned variance or not. Its `sample_size` is that of x_t.
        scheduler ([`SchedulerMixin`]):
            A [`DDIMScheduler`], [`DDPMScheduler`], [`DPMSolverMultistepScheduler`], [`UniPCMultistepScheduler`] or
            [`PNDMScheduler`].
        classifier ([`NoisyImageClassifier`], *optional*):
            p(y | x_t, t) for classifier guidance (eq. 4), in the space of x_t.
        sketcher ([`PhotoSketcher`], *optional*):
            P, photo to sketch, for perceptual guidance (eq. 5).
        sketch_encoder ([`~transformers.ResNetForImageClassification`], *optional*):
            F_s, one input channel: features of eq. 5, and the class of a sketch when the user names none.
        image_encoder ([`~transformers.ResNetForImageClassification`], *optional*):
            F_i of eq. 6; not used for sampling.
        id2label (`dict[int, str]`, *optional*):
            Name of each class, keys 0 ... n-1. The UNet's class n, if it has one, is "no class". Without it classes are
            integers.
        recommended (`dict[str, float]`, *optional*):
            This checkpoint's values of `num_inference_steps`, `eta`, `sketch_guidance_scale`, `classifier_guidance_scale`,
            `perceptual_guidance_scale` and `sketch_abstraction` for calls that leave them at `None`; and `class_mixture`:
            where a class is guessed and the second best has at least this share of the best one's probability, both are
            mixed in proportion.
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`], *optional*):
            Photos to the latents that `unet` denoises, and back. Without it x_t is in pixels.
    """

    if TYPE_CHECKING:
        # In diffusers any name is an attribute, because each might be one of the config.
        __getattr__: None  # type: ignore[misc, assignment]

    unet: UNet2DModel
    scheduler: SchedulerMixin
    # Each may be `None`; no type checker can follow what says that it is there.
    classifier: Any
    sketcher: Any
    sketch_encoder: Any
    image_encoder: Any
    vae: Any

    model_cpu_offload_seq = "sketch_encoder->classifier->sketcher->image_encoder->unet->vae"  # type: ignore[assignment]
    _optional_components = ["classifier", "sketcher", "sketch_encoder", "image_encoder", "vae"]
    _callback_tensor_inputs = ["latents", "noise_pred", "pred_original_sample"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        classifier: Optional[NoisyImageClassifier] = None,
        sketcher: Optional[PhotoSketcher] = None,
        sketch_encoder: Optional[ResNetForImageClassification] = None,
        image_encoder: Optional[ResNetForImageClassification] = None,
        id2label: Optional[dict] = None,
        recommended: Optional[dict] = None,
        vae: Optional[Union[AutoencoderKL, AutoencoderTiny]] = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            classifier=classifier,
            sketcher=sketcher,
            sketch_encoder=sketch_encoder,
            image_encoder=image_encoder,
            vae=vae,
        )
        self.register_to_config(id2label=id2label, recommended=recommended)
        # JSON turns the keys of a dict into strings.
        self.id2label: dict[int, str] = {int(key): str(value) for key, value in (id2label or {}).items()}
        self.recommended: dict[str, Any] = dict(recommended or {})
        self._check_components()

        self.height, self.width = (self.vae_scale_factor * side for side in self.sample_size)
        self.sketch_processor = SketchProcessor(resolution=max(self.height, self.width))
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._call_cache: dict[Any, Any] = {}
        self._num_timesteps = 0
        self._eta = 0.0
        self._sketch_abstraction = 0.0
        self._guidance_scales: dict[str, float] = {}
        self._interrupt = False

    @classmethod
    def from_pretrained(cls: type[_Pipeline], pretrained_model_name_or_path, **kwargs: Any) -> _Pipeline:
        """
        [`DiffusionPipeline.from_pretrained`] of a folder or a hub id, checked first, and in float32 for every component
        unless a dtype is given.

        Without one diffusers would load its own components in float32 and those of transformers as they were saved.
        Components that are passed in stay as they are. Weights are read from safetensors files only, which are compared
        with the checkpoint's `SHA256SUMS` if it has one; see [`~verification.check_checkpoint`].

        Raises:
            ValueError: for a checkpoint that is damaged, was altered, or brings a pickle or a class of its own; names the
                file.
        """
        if kwargs.get("use_safetensors", True) not in (None, True):
            raise ValueError(
                f"`use_safetensors` has to be True or left out but is {kwargs['use_safetensors']!r}: other files may be"
                " pickles, which can run any program when they are read."
            )
        if os.path.isdir(pretrained_model_name_or_path):
            check_checkpoint(pretrained_model_name_or_path, passed=kwargs, variant=kwargs.get("variant"))
        pipe = super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        # Cast here because diffusers renames its argument for it, from `torch_dtype` to `dtype`.
        if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
            for name, component in pipe.components.items():
                if isinstance(component, torch.nn.Module) and name not in kwargs and component.dtype != torch.float32:
                    component.float()
        return pipe

    @classmethod
    def download(cls, pretrained_model_name, **kwargs):
        """[`DiffusionPipeline.download`] and the checks of [`~DiffSketchingPipeline.from_pretrained`]."""
        try:
            folder = super().download(pretrained_model_name, **{**kwargs, "use_safetensors": True})
        except OSError as error:
            if "the necessary `safetensors` weights" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name}: a component has no safetensors weights. Other files may be pickles, which can run"
                " any program when they are read, so they are never loaded. Ask for safetensors files, or convert them where"
                " that can do no harm."
            ) from error
        options = {name: kwargs.get(name) for name in ("cache_dir", "token")}
        options |= {name: bool(kwargs.get(name)) for name in ("force_download", "local_files_only")}
        fetch_manifest(pretrained_model_name, folder, **options)
        check_checkpoint(folder, where=pretrained_model_name, passed=kwargs, variant=kwargs.get("variant"))
        return folder

    def save_pretrained(self, save_directory, safe_serialization: bool = True, **kwargs):  # type: ignore[override]
        """
        [`DiffusionPipeline.save_pretrained`], with a list of sha256 sums that `from_pretrained` verifies.

        The configs do not keep the folders that the components were loaded from. To push, see
        [`~diffsketching_pipeline.push_pipeline`].

        Raises:
            ValueError: `safe_serialization` is off or `push_to_hub` is on.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` has to be True: pickles are never loaded.")
        if kwargs.get("push_to_hub"):
            raise ValueError("`push_to_hub` is not supported here: use `diffsketching_pipeline.push_pipeline`.")
        super().save_pretrained(save_directory, **kwargs)
        forget_origins(save_directory)
        write_manifest(save_directory)

    @classmethod
    def from_pipe(cls: type[_Pipeline], pipeline, **kwargs: Any) -> _Pipeline:
        """
        [`DiffusionPipeline.from_pipe`], sharing components as they are: each in its own dtype unless one is given.

        The default of diffusers casts the shared modules to float32 in place, under the source pipeline's feet.
        """
        if any(kwargs.get(name) is not None for name in ("torch_dtype", "dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        source = {**pipeline.config, **pipeline.components}
        parameters = inspect.signature(cls.__init__).parameters
        pipe = cls(**{**{name: source[name] for name in parameters if name in source}, **kwargs})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe

    def _check_components(self) -> None:
        config = self.unet.config
        self._check_space()
        if config.sample_size is None:
            raise ValueError("`unet` has to have a `sample_size`, the size of its images, but has None.")
        if self.classifier is not None:
            self._check_classifier_space()
        num_labels, num_embeds = len(self.id2label), config.num_class_embeds
        if sorted(self.id2label) != list(range(num_labels)):
            raise ValueError(f"`id2label` has to have the keys 0 ... n-1 but has {sorted(self.id2label)}.")
        if num_labels and num_embeds is not None and num_embeds not in (num_labels, num_labels + 1):
            raise ValueError(
                f"`id2label` has {num_labels} classes, so `unet.config.num_class_embeds` has to be {num_labels} or, with"
                f" one for 'no class', {num_labels + 1}, but is {num_embeds}."
            )
        if num_labels and self.classifier is not None and self.classifier.config.num_classes != num_labels:
            raise ValueError(
                f"`classifier` knows {self.classifier.config.num_classes} classes but `id2label` has {num_labels}."
            )
        unknown = set(self.recommended) - {"num_inference_steps", "eta", *_SCALES, *_RECOMMENDED_SHARES}
        if unknown:
            raise ValueError(f"`recommended` has unknown keys {sorted(unknown)}.")
        for name in _RECOMMENDED_SHARES:
            share = self.recommended.get(name, 0.0)
            if not is_number(share) or not 0.0 <= share <= 1.0:
                raise ValueError(f"`recommended` must have a `{name}` in [0, 1], but got {share!r}.")

    def _check_space(self) -> None:
        """Refuses a `unet` whose channels are not those of the photos, or of the latents of `vae`."""
        config, channels = self.unet.config, self.sample_channels
        space = "photos: one that denoises latents needs its `vae`"
        if self.vae is not None:
            space = f"the latents of `vae`, with {channels} channels and {self.vae_scale_factor} pixels per latent"
            if self.vae.config.in_channels != 3 or self.vae.config.out_channels != 3:
                raise ValueError(
                    f"`vae` must have 3 channels of photos on both sides, but got {self.vae.config.in_channels} and"
                    f" {self.vae.config.out_channels}."
                )
        try:
            get_unet_inputs(config.in_channels, channels, self.vae_scale_factor)
        except ValueError as error:
            raise ValueError(f"{error} Here x_t is in the space of {space}.") from error
        if config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"`unet` has to have {channels} output channels, or {2 * channels} with learned variance, but has"
                f" `out_channels={config.out_channels}`. Here x_t is in the space of {space}."
            )

    def _check_classifier_space(self) -> None:
        found = self.classifier.config
        if (found.in_channels, found.sample_size, found.sample_size) != (self.sample_channels, *self.sample_size):
            raise ValueError(
                f"`classifier` must judge what `unet` denoises, {self.sample_channels} channels of"
                f" {self.sample_size[1]} x {self.sample_size[0]}, but got `in_channels={found.in_channels}` and"
                f" `sample_size={found.sample_size}`."
            )

    @property
    def vae_scale_factor(self) -> int:
        """f, the pixels per latent along a side; 1 without a `vae`."""
        return get_scale_factor(self.vae)

    @property
    def sample_channels(self) -> int:
        """c, the channels of what the UNet denoises: 3, or those of the latents of `vae`."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of what the UNet denoises; `height` and `width` are those of photos and drawings in pixels."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def _unet_inputs(self) -> UNetInputs:
        return get_unet_inputs(self.unet.config.in_channels, self.sample_channels, self.vae_scale_factor)

    @property
    def takes_sketch(self) -> bool:
        """Whether the UNet is shown the drawing."""
        return self._unet_inputs.sketch > 0

    @property
    def takes_abstraction(self) -> bool:
        """Whether the UNet is told `sketch_abstraction`."""
        return self._unet_inputs.abstraction > 0

    @property
    def num_classes(self) -> int:
        """Number of classes that a user may name; 0 if there are none."""
        if self.id2label:
            return len(self.id2label)
        if self.unet.config.num_class_embeds is not None:
            return self.unet.config.num_class_embeds
        return self.classifier.config.num_classes if self.classifier is not None else 0

    @property
    def null_class(self) -> int | None:
        """Index of the UNet's "no class", or `None` if it has none."""
        num_embeds = self.unet.config.num_class_embeds
        return len(self.id2label) if self.id2label and num_embeds == len(self.id2label) + 1 else None

    @property
    def num_timesteps(self) -> int:
        """Number of network evaluations of the current call, before batching."""
        return self._num_timesteps

    @property
    def guidance_scales(self) -> dict[str, float]:
        """The three scales that the last call used, with what `None` stood for filled in."""
        return dict(self._guidance_scales)

    @property
    def eta(self) -> float:
        """The η that the last call used, with what `None` stood for filled in."""
        return self._eta

    @property
    def sketch_abstraction(self) -> float:
        """The abstraction that the last call used, with what `None` stood for filled in."""
        return self._sketch_abstraction

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from `callback_on_step_end` to stop after the current step."""
        return self._interrupt

    def float32_call(self, name: str) -> Callable[..., Any]:
        """The component `name` as a callable that computes in float32; kept until the end of the call."""
        return self.cached(("float32", name), lambda: float32_call(getattr(self, name), self._execution_device))

    def float32_decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        Photos of what the UNet denoises, in float32 and differentiable, for what looks at x̂_0; kept until the end of the
        call. The input itself without a `vae`.
        """
        return self._float32_coder("decoder", decode_latents)

    def float32_encoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The way back of [`~DiffSketchingPipeline.float32_decoder`]."""
        return self._float32_coder("encoder", encode_photos)

    def _float32_coder(
        self, name: str, function: Callable[..., torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.vae is None:
            return lambda images: images
        return self.cached(
            ("float32", name), lambda: float32_call(AutoencoderCall(self.vae, function), self._execution_device)
        )

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept under `key` until the end of the call: for what a callback would else recompute at each step."""
        if key not in self._call_cache:
            self._call_cache[key] = make()
        return self._call_cache[key]

    def get_label_id(self, label: int | str, argument: str = "class_labels") -> int:
        """
        Index of a class given by name (case-insensitive) or index.

        Raises:
            ValueError: if there is no such class; names the argument and close classes.
        """
        if isinstance(label, str):
            names = {name.lower(): index for index, name in self.id2label.items()}
            if label.lower() in names:
                return names[label.lower()]
            close = difflib.get_close_matches(label.lower(), names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            known = ", ".join(self.id2label.values()) or "integers only: this checkpoint has no `id2label`"
            raise ValueError(f"`{argument}` has the unknown class {label!r}: {hint}The classes are: {known}.")
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise ValueError(f"`{argument}` has to hold names, integers or None but has {label!r}.")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"`{argument}` has to be between 0 and {self.num_classes - 1} but has {int(label)}.")
        return int(label)

    def check_options(self, options: SamplingOptions, class_labels, has_sketch: bool, latents=None) -> None:
        """Refuse what is wrong with the arguments that all pipelines share, before anything is computed."""
        self._check_has_classes(class_labels)
        for name, scale in options.scales.items():
            self._check_scale(name, scale, has_sketch)
        self._check_negative_class(options, has_sketch)
        check_guidance_interval(options.guidance_start, options.guidance_end)
        for callback in _flatten_callbacks(options.guidance_callbacks):
            unknown = set(callback.tensor_inputs) - set(self._guidance_tensor_inputs)
            if unknown:
                raise ValueError(
                    f"`guidance_callbacks` has a {type(callback).__name__} that asks for {sorted(unknown)}; there are"
                    f" {self._guidance_tensor_inputs}."
                )
            self._check_callback_components(callback, has_sketch)
        scale = options.colour_guidance_scale
        if not is_number(scale) or not 0.0 <= scale <= 1.0:
            raise ValueError(f"`colour_guidance_scale` has to be in [0, 1] but is {scale!r}.")
        if options.eta is not None and not 0.0 <= options.eta <= 1.0:
            raise ValueError(f"`eta` has to be in [0, 1] or None but is {options.eta}.")
        if options.clip_sample not in (None, True, False):
            raise ValueError(f"`clip_sample` has to be None, True or False but is {options.clip_sample!r}.")
        if options.clip_sample and self.vae is not None:
            raise ValueError(
                "`clip_sample` must be None or False with a `vae`, whose latents have no range to be clipped to, but got"
                " True."
            )
        self._check_abstraction(options.sketch_abstraction, has_sketch)
        if options.output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent' but is {options.output_type!r}.")
        if latents is not None and not torch.is_tensor(latents):
            raise ValueError(f"`latents` has to be a tensor but is {type(latents).__name__}.")
        generator = options.generator
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(item is None or isinstance(item, torch.Generator) for item in generators):
            raise ValueError("`generator` has to be a `torch.Generator`, a list of them, or None.")
        if isinstance(generator, (list, tuple)) and None in generator:
            raise ValueError("`generator` has to be a `torch.Generator` for each image, but the list has a None.")
        unknown = set(options.callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs} but has"
                f" {sorted(unknown)}."
            )

    _guidance_tensor_inputs = [
        "latents",
        "noise_pred",
        "pred_original_sample",
        "alpha_prod",
        "class_labels",
        "sketch",
        "owner",
        "row_shares",
        "noise_pred_delta",
    ]

    def _check_abstraction(self, sketch_abstraction, has_sketch: bool) -> None:
        if sketch_abstraction is None:
            return
        if not is_number(sketch_abstraction) or not 0.0 <= sketch_abstraction <= 1.0:
            raise ValueError(f"`sketch_abstraction` must be in [0, 1] or None, but got {sketch_abstraction!r}.")
        if sketch_abstraction > 0.0 and not has_sketch:
            raise ValueError(
                f"`sketch_abstraction={sketch_abstraction}` needs a drawing: give a `sketch`, or leave it at None."
            )

    def _check_has_classes(self, class_labels) -> None:
        labels = as_list(class_labels)
        if isinstance(labels, list) and not labels:
            raise ValueError("`class_labels` is empty: give at least one, or None.")
        if class_labels is not None and self.num_classes == 0:
            raise ValueError(
                f"`class_labels` is {class_labels!r} but this checkpoint has no classes: leave it at None."
            )

    def _check_scale(self, name, scale, has_sketch: bool) -> None:
        if scale is None:
            return
        if not is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"`{name}` has to be a finite number or None but is {scale!r}.")
        off, components = _SCALES[name]
        if scale == off:
            return
        for component in components:
            if getattr(self, component) is None:
                raise ValueError(
                    f"`{name}={scale}` needs the component `{component}`, which this checkpoint does not have: load one"
                    f" with `{_COMPONENT_CLASSES[component]}.from_pretrained` and pass `{component}=...` to"
                    f" `from_pretrained`, or leave `{name}` at {off}."
                )
        if name == "sketch_guidance_scale" and not self.takes_sketch:
            raise ValueError(
                f"`{name}={scale}` needs a component `unet` with {self._sketch_channels} input channels, and this one has"
                f" {self.unet.config.in_channels}: see `expand_unet_for_sketch`, or leave `{name}` at {off}."
            )
        if name != "classifier_guidance_scale" and not has_sketch:
            raise ValueError(f"`{name}={scale}` needs a drawing: give a `sketch`, or leave `{name}` at {off}.")

    def _check_negative_class(self, options: SamplingOptions, has_sketch: bool) -> None:
        if options.negative_class_labels is None:
            return
        negative = as_list(options.negative_class_labels)
        for label in negative if isinstance(negative, list) else [negative]:
            if label is not None:
                self.get_label_id(label, "negative_class_labels")
            elif self.null_class is None:
                raise ValueError(
                    f"`negative_class_labels={negative!r}` has a None, but this checkpoint's `unet` has no 'no class' to"
                    " stand for it: give a class for each sketch."
                )
        scale = options.sketch_guidance_scale
        if scale is None:
            scale = self.recommended.get("sketch_guidance_scale", 1.0)
        if not has_sketch or self.unet.config.num_class_embeds is None or not self.takes_sketch or scale == 1:
            raise ValueError(
                f"`negative_class_labels={options.negative_class_labels!r}` takes the place of the class where guidance"
                " withholds the drawing: give a `sketch`, a `sketch_guidance_scale` above 1 and a `unet` with classes and"
                f" {self._sketch_channels} input channels, or leave it at None."
            )

    @property
    def _sketch_channels(self) -> int:
        """Input channels of a UNet that takes x_t and the drawing."""
        return self.sample_channels + self.vae_scale_factor**2

    def _check_callback_components(self, callback, has_sketch: bool) -> None:
        if isinstance(callback, ClassifierGuidanceCallback):
            self._check_scale("classifier_guidance_scale", callback.config.scale, has_sketch)
        elif isinstance(callback, SketchGuidanceCallback):
            self._check_scale("perceptual_guidance_scale", callback.config.scale, has_sketch)

    def prepare_sketches(self, sketch, fit: str | None = None) -> list[torch.Tensor] | None:
        """
        The drawings of each result as `[K_i, 1, height, width]`, -1 = stroke and +1 = paper; `None` for no drawing.

        `fit` is that of [`SketchProcessor`]: `"page"` keeps the place of what is drawn.

        Raises:
            ValueError: naming the file or index of a sketch that cannot be read or is empty.
        """
        if sketch is None:
            return None
        groups = self.sketch_processor.preprocess_groups(sketch, self.height, self.width, fit=fit)
        return [group.to(self._execution_device, torch.float32) for group in groups]

    def prepare_sketch_masks(self, masks, groups: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
        """
        Share of each drawing of a result at each place of x_t, `[K_i, 1, height, width]` of the size that the UNet
        denoises, summing to 1: that of a latent is the mean over its pixels. `None` for equal shares.

        Raises:
            ValueError: if there is not one mask per drawing, or one cannot be read.
        """
        if masks is None or groups is None:
            return None
        shape = [len(group) for group in groups]
        if not isinstance(masks, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in masks):
            raise ValueError("`sketch_masks` has to be a list with, for each sketch, a list of a mask per drawing.")
        if [len(group) for group in masks] != shape:
            raise ValueError(
                f"`sketch_masks` has to have one mask per drawing, {shape} of them, but has"
                f" {[len(group) for group in masks]}."
            )
        shares = []
        for row, group in enumerate(masks):
            images = [preprocess_mask(mask, f"mask {k} of sketch {row}") for k, mask in enumerate(group)]
            fitted = [ImageOps.pad(image, (self.width, self.height), Image.Resampling.BOX) for image in images]
            weights = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))[:, None] / 255
            total = weights.sum(dim=0)
            pixels = torch.where(total > 0, weights / total.clamp_min(1e-6), 1 / len(weights))
            shares.append(pixels if self.vae is None else F.avg_pool2d(pixels, self.vae_scale_factor))
        return shares

    def prepare_colours(
        self,
        colour_hint,
        groups: list[torch.Tensor] | None,
        num_images: int,
        box: tuple[float, float, float, float] | None = None,
        inside: torch.Tensor | None = None,
    ) -> Colours | None:
        """
        What [`ColourGuidanceCallback`] aims at, from coarse strokes or a palette.

        Args:
            box: part of a page of strokes that is stretched to the model's size; see
                [`~image_processor.preprocess_colour_strokes`].
            inside: bool `[1, 1, height, width]`, where colours are guided; everywhere if left out.

        Raises:
            ValueError: for a hint that cannot be read or is empty, strokes with none inside, or a palette without a drawing.
        """
        if colour_hint is None:
            return None
        palette = parse_palette(colour_hint)
        if palette is None:
            strokes = preprocess_colour_strokes(colour_hint, self.height, self.width, box)
            candidates, cover = (layer[None].to(self._execution_device) for layer in strokes)
            if inside is not None and not bool((cover > 0)[inside].any()):
                raise ValueError(
                    "`colour_hint` has no stroke inside of what may change: paint there, or enlarge `mask_image`."
                )
            mask = blur(cover)
        elif groups is None:
            raise ValueError("`colour_hint` is a palette, which colours what a drawing encloses: give a `sketch`.")
        else:
            candidates = palette.to(self._execution_device)
            mask = torch.stack([enclosed_area(group) for group in groups]).repeat_interleave(num_images, dim=0)
            mask = mask.to(self._execution_device)
        return Colours(candidates, mask if inside is None else mask * inside)

    def prepare_class_labels(
        self, class_labels, groups: list[torch.Tensor] | None, num_rows: int
    ) -> tuple[list[dict[int, float] | None], torch.Tensor | None]:
        """
        Classes of each sketch with their shares (`None` = no class) and its probabilities `[num_rows, num_classes]`.

        Labels that are not given are predicted from the drawing by `sketch_encoder`, if there is one.

        Raises:
            ValueError: for an unknown class, a wrong number of labels, or no label where the network needs one.
        """
        labels = as_list(class_labels)
        if not isinstance(labels, list):
            labels = [labels] * num_rows
        if len(labels) != num_rows:
            raise ValueError(
                f"`class_labels` has to have one entry per sketch (or photo), {num_rows}, but has {len(labels)}."
            )
        shares = [None if label is None else self.get_class_shares(label) for label in labels]
        if self.num_classes == 0:
            return shares, None
        probabilities = torch.zeros(num_rows, self.num_classes)
        for row, mixture in enumerate(shares):
            if mixture is None and groups is not None and self.sketch_encoder is not None:
                probabilities[row] = self.predict_class_probabilities(groups[row])
                shares[row] = self._guess_class(probabilities[row])
            elif mixture is not None:
                probabilities[row, list(mixture)] = torch.tensor(list(mixture.values()))
            elif self.unet.config.num_class_embeds is not None and self.null_class is None:
                raise ValueError(
                    "`class_labels` is needed: this checkpoint's `unet` has no 'no class', and without a `sketch` and a"
                    " `sketch_encoder` the class cannot be predicted."
                )
        return shares, probabilities

    def _guess_class(self, probabilities: torch.Tensor) -> dict[int, float]:
        """The best class of `[num_classes]`, or the two best where the checkpoint recommends to mix those that are near."""
        best, *others = probabilities.argsort(descending=True, stable=True).tolist()
        ratio = self.recommended.get("class_mixture")
        if ratio is None or not others or probabilities[others[0]] < ratio * probabilities[best]:
            return {int(probabilities.argmax()): 1.0}
        pair = [best, others[0]]
        return dict(zip(pair, (probabilities[pair] / probabilities[pair].sum()).tolist(), strict=True))

    def get_class_shares(self, label) -> dict[int, float]:
        """
        Class indices and their shares, which sum to 1, of a class or of a mixture such as `{"shirt": 2, "dress": 1}`.

        Raises:
            ValueError: if there is no such class, or the weights of a mixture are not numbers of at least 0 with a
                positive sum.
        """
        if not isinstance(label, Mapping):
            return {self.get_label_id(label): 1.0}
        weights = list(label.values())
        if not all(is_number(weight) and math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"`class_labels` has a mixture whose weights are not all numbers of at least 0: {label!r}."
            )
        if not sum(weights) > 0:
            raise ValueError(
                f"`class_labels` has a mixture whose weights do not sum to something positive: {label!r}."
            )
        shares: dict[int, float] = {}
        for name, weight in label.items():
            index = self.get_label_id(name)
            if weight > 0:
                shares[index] = shares.get(index, 0.0) + weight / sum(weights)
        return shares

    def get_class_names(self, shares: dict[int, float] | None) -> Any:
        """What was used, in a form that `class_labels` takes: a name or index, a mixture of them, or `None`."""
        if shares is None:
            return None
        names = {self.id2label.get(index, index): share for index, share in shares.items()}
        return next(iter(names)) if len(names) == 1 else names

    @torch.no_grad()
    def predict_class_probabilities(self, sketch: torch.Tensor) -> torch.Tensor:
        """
        p(y | s) by `sketch_encoder`, `[num_classes]`; the mean over the drawings `[K, 1, height, width]` of one result. An
        encoder whose config names the `image_size` it was trained at is shown them at that size.
        """
        size = getattr(self.sketch_encoder.config, "image_size", None)
        if size is not None and sketch.shape[-1] != size:
            # By area no thin line is lost.
            sketch = F.interpolate(sketch, size=(size, size), mode="area")
        logits = self.sketch_encoder(sketch.to(self.sketch_encoder.dtype)).logits
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`sketch_encoder` knows {logits.shape[1]} classes but the checkpoint has {self.num_classes}."
            )
        return logits.float().softmax(dim=-1).mean(dim=0).cpu()

    def prepare_conditions(
        self,
        groups: list[torch.Tensor] | None,
        labels: list[dict[int, float] | None],
        negative_class_labels=None,
        sketch_masks: list[torch.Tensor] | None = None,
        sketch_abstraction: float = 0.0,
    ) -> list[Condition]:
        """
        What each result follows, from what [`~DiffSketchingPipeline.prepare_sketches`] and
        [`~DiffSketchingPipeline.prepare_class_labels`] made.

        Args:
            negative_class_labels: as for the call.
            sketch_masks: share of each drawing of a result at each place of x_t, `[K_i, 1, height, width]`; equal if left
                out.
            sketch_abstraction: that of all drawings.
        """
        known = [{self.null_class: 1.0} if shares is None else shares for shares in labels]
        has_class = not any(None in shares for shares in known)
        null = self._null_class_labels(negative_class_labels, len(labels)) if has_class else [None] * len(labels)
        conditions = []
        for row, shares in enumerate(known):
            drawings = None if groups is None else groups[row]
            count = 1 if drawings is None else len(drawings)
            class_shares = torch.tensor(list(shares.values()), device=self._execution_device)
            equal = class_shares.new_full((count, 1, 1, 1), 1 / count)
            weights = equal if sketch_masks is None else sketch_masks[row].to(equal)
            conditions.append(
                Condition(
                    torch.tensor(list(shares), device=weights.device).repeat(count) if has_class else None,
                    None if drawings is None else drawings.repeat_interleave(len(shares), dim=0),
                    weights.repeat_interleave(len(shares), dim=0) * class_shares.repeat(count).reshape(-1, 1, 1, 1),
                    null[row],
                    0.0 if drawings is None else sketch_abstraction,
                )
            )
        return conditions

    def _null_class_labels(self, negative_class_labels, num_rows: int) -> list[int | None]:
        negative = as_list(negative_class_labels)
        if not isinstance(negative, list):
            negative = [negative] * num_rows
        if len(negative) != num_rows:
            raise ValueError(
                f"`negative_class_labels` has to have one entry per sketch, {num_rows}, but has {len(negative)}."
            )
        return [
            self.null_class if label is None else self.get_label_id(label, "negative_class_labels")
            for label in negative
        ]

    def prepare_generators(self, generator, batch_size: int, per: str = "image") -> list[torch.Generator]:
        """
        One generator per image (or what `per` says), so that an image does not depend on its batch. A single one, or torch's
        default, is expanded by drawing one child seed per image from it.

        Raises:
            ValueError: if a list has another length than `batch_size`.
        """
        if isinstance(generator, (list, tuple)):
            if len(generator) != batch_size:
                raise ValueError(
                    f"`generator` has to have one entry per {per}, {batch_size}, but has {len(generator)}."
                )
            return list(generator)
        device = "cpu" if generator is None else generator.device
        seeds = [torch.randint(2**63 - 1, (1,), generator=generator, device=device) for _ in range(batch_size)]
        return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def prepare_latents(self, batch_size: int, generators: list[torch.Generator], latents=None) -> torch.Tensor:
        """
        The noise that sampling starts from, float32 `[batch_size, channels, height, width]` in the UNet's own space: of
        `sample_channels` and `sample_size`.

        Raises:
            ValueError: if `latents` has another shape or is not finite.
        """
        shape = (batch_size, self.sample_channels, *self.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=generators, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"`latents` has to have shape {shape} but has {tuple(latents.shape)}.")
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("`latents` has a NaN or an infinity.")
        return latents.to(self._execution_device, torch.float32)

    def get_timesteps(self, scheduler, num_inference_steps: int, strength: float) -> torch.Tensor:
        """
        The timesteps left to go when sampling starts at `strength`; all of them at 1.0.

        Raises:
            ValueError: if `strength` leaves no step, or the scheduler cannot start in the middle.
        """
        if strength == 1.0:
            return scheduler.timesteps
        if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
            raise ValueError(f"`strength={strength}` needs a PNDMScheduler with `skip_prk_steps=True`.")
        steps = int(num_inference_steps * strength)
        if steps < 1:
            raise ValueError(f"`strength={strength}` leaves none of {num_inference_steps} steps: raise one of them.")
        start = len(scheduler.timesteps) - steps
        if isinstance(scheduler, PNDMScheduler):
            # Its second evaluation corrects the first step, wherever it starts: the second timestep comes twice.
            return torch.cat([scheduler.timesteps[start:][:2], scheduler.timesteps[start:][1:]])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return scheduler.timesteps[start:]

    def resolve_num_inference_steps(self, num_inference_steps: int | None) -> int:
        """What was given, else what the checkpoint recommends."""
        if num_inference_steps is not None:
            return num_inference_steps
        return self.recommended.get("num_inference_steps", _DEFAULT_NUM_INFERENCE_STEPS)

    def prepare_sketch_abstraction(self, sketch_abstraction: float | None, has_sketch: bool) -> float:
        """
        What was given, else what the checkpoint recommends; 0.0 without a drawing, or for a network that is not told, of
        which a warning says so. It is [`~DiffSketchingPipeline.sketch_abstraction`] from here on.
        """
        usable = has_sketch and self.takes_abstraction
        if sketch_abstraction and not usable:
            logger.warning(
                f"This call does not use `sketch_abstraction={sketch_abstraction}`: the `unet` has"
                f" {self.unet.config.in_channels} input channels, and none of them is a plane for it."
            )
        if sketch_abstraction is None:
            sketch_abstraction = self.recommended.get("sketch_abstraction", 0.0)
        self._sketch_abstraction = float(sketch_abstraction) if usable else 0.0
        return self._sketch_abstraction

    def _num_rows(self, class_labels, groups, latents, num_images_per_sketch: int) -> int:
        if groups is not None:
            return len(groups)
        if isinstance(as_list(class_labels), list):
            return len(as_list(class_labels))
        if latents is not None:
            if len(latents) % num_images_per_sketch:
                raise ValueError(
                    f"`latents` has {len(latents)} rows, which `num_images_per_sketch={num_images_per_sketch}` does not"
                    " divide."
                )
            return len(latents) // num_images_per_sketch
        return 1

    def _resolve_eta(self, eta: float | None, has_latents: bool) -> float:
        if eta is not None:
            return float(eta)
        # Given noise, inverted from a photo maybe, is to lead to one result; other schedulers have no η.
        if has_latents or not isinstance(self.scheduler, DDIMScheduler):
            return 0.0
        return float(self.recommended.get("eta", 0.0))

    def _resolve_scales(self, scales: dict[str, float | None], has_sketch: bool, has_class: bool) -> dict[str, float]:
        resolved = {}
        for name, (off, components) in _SCALES.items():
            usable = all(getattr(self, component) is not None for component in components)
            if name == "sketch_guidance_scale":
                usable = self.takes_sketch
            usable = usable and (has_class if name == "classifier_guidance_scale" else has_sketch)
            given = scales[name]
            resolved[name] = (
                float(given) if given is not None else float(self.recommended.get(name, off)) if usable else off
            )
        return resolved

    def prepare_guidance(
        self, options: SamplingOptions, has_sketch: bool, has_class: bool, colours: Colours | None = None
    ) -> MultiPipelineCallbacks:
        """
        The guidance callbacks of one call; the scales it uses are [`~DiffSketchingPipeline.guidance_scales`] from here on.

        Raises:
            ValueError: for classifier guidance without a class.
        """
        scales = self._resolve_scales(options.scales, has_sketch, has_class)
        self._guidance_scales = scales
        interval = {"guidance_start": options.guidance_start, "guidance_end": options.guidance_end}
        callbacks: list[PipelineCallback] = []
        if scales["classifier_guidance_scale"] != 0.0:
            callbacks.append(ClassifierGuidanceCallback(scale=scales["classifier_guidance_scale"], **interval))
        if scales["perceptual_guidance_scale"] != 0.0:
            callbacks.append(SketchGuidanceCallback(scale=scales["perceptual_guidance_scale"], **interval))
        if colours is not None and options.colour_guidance_scale != 0.0:
            end = interval["guidance_start"] + _COLOURED_SHARE * (
                interval["guidance_end"] - interval["guidance_start"]
            )
            callbacks.append(
                ColourGuidanceCallback(colours, options.colour_guidance_scale, interval["guidance_start"], end)
            )
        callbacks += _flatten_callbacks(options.guidance_callbacks)
        for callback in callbacks:
            if isinstance(callback, ClassifierGuidanceCallback) and callback.config.scale != 0.0 and not has_class:
                raise ValueError(
                    f"`classifier_guidance_scale={callback.config.scale}` needs a class for each image: give"
                    " `class_labels`."
                )
        return MultiPipelineCallbacks(callbacks)

    def _warn_if_sketch_is_unused(self, argument: str, guidance: MultiPipelineCallbacks, hint: str = "") -> None:
        uses_sketch = any(not isinstance(callback, ClassifierGuidanceCallback) for callback in guidance.callbacks)
        if self.takes_sketch or uses_sketch:
            return
        logger.warning(
            f"This call does not use the `{argument}` for anything but its class: the `unet` has"
            f" {self.unet.config.in_channels} input channels, and no guidance by the drawing is on. Set"
            f" `perceptual_guidance_scale`{hint}."
        )

    def predict_guided_noise(
        self,
        scheduler,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        step_index: int,
        conditioning: Conditioning,
        guidance: MultiPipelineCallbacks,
        sketch_guidance_scale: float,
        clip_sample: bool,
    ) -> NoisePrediction:
        """
        The base prediction of one network pass, with what each active guidance callback adds to its ε: none where x_t is
        pure noise (ᾱ_t below `_MIN_GUIDED_ALPHA_PROD`).
        """
        alpha_prod = get_alpha_prod(scheduler, timestep, latents)
        is_noise = bool((alpha_prod < _MIN_GUIDED_ALPHA_PROD).all())
        active = [] if is_noise else _active_callbacks(guidance, step_index, self.num_timesteps)
        through_unet = any(getattr(callback, "through_unet", False) for callback in active)

        def predict(unet, latents, conditioning):
            return predict_noise(
                unet,
                self.unet.config,
                self.scheduler,
                latents,
                timestep,
                conditioning,
                sketch_guidance_scale,
                clip_sample,
                scheduler.config.get("clip_sample_range", 1.0),
            )

        if through_unet:
            with gradient_mode():
                latents = latents.detach().clone().requires_grad_(True)
                attached = Conditioning(*(None if x is None else x.clone() for x in _fields(conditioning)))
                base = predict(self.float32_call("unet"), latents, attached)
        else:
            base = predict(self.unet, latents, conditioning)
        if not active:
            return base

        callback_kwargs = {
            "latents": latents,
            "noise_pred": base.noise_pred,
            "pred_original_sample": base.pred_original_sample,
            "alpha_prod": alpha_prod,
            "class_labels": conditioning.class_labels,
            "sketch": conditioning.sketch,
            "owner": conditioning.owner,
            "row_shares": None if conditioning.weights is None else conditioning.weights.mean(dim=(1, 2, 3)),
            "noise_pred_delta": torch.zeros_like(latents),
        }
        callback_kwargs = MultiPipelineCallbacks(active)(self, step_index, timestep, callback_kwargs)
        if callback_kwargs["noise_pred"] is not base.noise_pred:
            raise ValueError(
                "`guidance_callbacks` has a callback that replaced `noise_pred`, which is the same for every callback: add"
                " its term to `noise_pred_delta` instead."
            )
        noise_pred = base.noise_pred.detach() + callback_kwargs["noise_pred_delta"].detach()
        variance = None if base.variance is None else base.variance.detach()
        return NoisePrediction(noise_pred, base.pred_original_sample.detach(), variance)

    def _denoise(
        self,
        scheduler,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        conditioning: Conditioning,
        guidance: MultiPipelineCallbacks,
        options: SamplingOptions,
        step_kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The sampling loop with guidance, progress bar and callbacks; `after_step(step_index, latents)` may replace what a
        step led to before anybody sees it.
        """
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        clip_sample = options.clip_sample
        if clip_sample is None:
            # The scheduler's setting is about pixels.
            clip_sample = self.vae is None and bool(self.scheduler.config.get("clip_sample", False))
        sketch_scale = self._guidance_scales["sketch_guidance_scale"]

        with self.progress_bar(total=len(timesteps)) as progress_bar:

            def predict(latents, timestep, step_index):
                guided = is_guided_step(step_index, self.num_timesteps, options.guidance_start, options.guidance_end)
                return self.predict_guided_noise(
                    scheduler,
                    latents,
                    timestep,
                    step_index,
                    conditioning,
                    guidance,
                    sketch_scale if guided else 1.0,
                    clip_sample,
                )

            def on_step_end(step_index, timestep, latents, prediction):
                progress_bar.update()
                if after_step is not None:
                    latents = after_step(step_index, latents)
                if options.callback_on_step_end is not None:
                    values = {
                        "latents": latents,
                        "noise_pred": prediction.noise_pred,
                        "pred_original_sample": prediction.pred_original_sample,
                    }
                    kwargs = {name: values[name] for name in options.callback_on_step_end_tensor_inputs}
                    replaced = options.callback_on_step_end(self, step_index, timestep, kwargs) or {}
                    latents = replaced.get("latents", latents)
                return latents, not self.interrupt

            try:
                return denoise(scheduler, predict, latents, timesteps, step_kwargs, on_step_end)
            finally:
                self._call_cache.clear()

    @torch.no_grad()
    def encode_photos(self, photos: torch.Tensor) -> torch.Tensor:
        """
        Photos `[batch_size, 3, height, width]` in [-1, 1] in the UNet's own space, without randomness: latents of `vae`, or
        as they are. One at a time, so that none depends on its batch.
        """
        if self.vae is None:
            return photos
        return torch.cat([encode_photos(self.vae, photo) for photo in photos.split(1)])

    @torch.no_grad()
    def decode_photos(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Photos `[batch_size, 3, height, width]` of what the UNet denoises, float32 and not clipped; one at a time, so that
        none depends on its batch.
        """
        if self.vae is None:
            return latents
        return torch.cat([decode_latents(self.vae, latent) for latent in latents.split(1)])

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """x_0 as `output_type` asks for it."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_photos(latents).clamp(-1, 1), output_type=output_type)

    def _output(self, images, labels, probabilities, return_dict: bool):
        self.maybe_free_model_hooks()
        used_labels = [self.get_class_names(shares) for shares in labels]
        if not return_dict:
            return images, used_labels, probabilities
        return DiffSketchingPipelineOutput(images=images, class_labels=used_labels, class_probabilities=probabilities)

    @torch.no_grad()
    def invert(
        self,
        images,
        class_labels=None,
        sketch=None,
        num_inference_steps: int | None = None,
        num_fixed_point_iterations: int = 3,
        sketch_abstraction: float | None = None,
    ) -> torch.Tensor:
        """
        The noise x_T from which sampling makes these photos, without guidance and without clipping.

        `pipe(sketch, class_labels, 1, num_inference_steps, clip_sample=False, latents=x_T)` is the way back: with the same
        classes, drawings, steps and scheduler. Scales that are not given are off in such a call, because guidance cannot be
        inverted; they may be given, to change the photo.

        Args:
            images (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Photos, scaled and cropped to the model's size; see [`~image_processor.preprocess_photos`].
            class_labels, sketch:
                As for the call, one per photo. Without a sketch the null sketch is used, so that one x_T serves any
                drawing of the photo.
            num_inference_steps (`int`, *optional*):
                Number of steps there and back. `None` is the checkpoint's recommendation; 50 loses less than 25.
            num_fixed_point_iterations (`int`, defaults to 3):
                Further network evaluations per step, which bring the way back closer to the photo as long as the network
                is smooth between two steps: more steps help where more iterations do not. 0 is textbook DDIM inversion.
            sketch_abstraction (`float`, *optional*):
                That of `sketch`, as for the call.

        Returns:
            `torch.Tensor`: x_T, float32 `[batch_size, channels, height, width]` in the UNet's own space.

        Raises:
            ValueError: for a scheduler other than `DDIMScheduler`, photos that cannot be read or are of another size, or
                a wrong class, number of classes or number of drawings.
        """
        self._check_invertible(num_fixed_point_iterations)
        self._check_has_classes(class_labels)
        self._check_abstraction(sketch_abstraction, sketch is not None)
        if sketch is not None and not self.takes_sketch:
            raise ValueError(
                f"`sketch` needs a `unet` with {self._sketch_channels} input channels to be inverted with: leave it at None."
            )
        num_inference_steps = self.resolve_num_inference_steps(num_inference_steps)
        scheduler = sampling_scheduler(self.scheduler, num_inference_steps, self._execution_device)

        photos = preprocess_photos(images, self.height, self.width).to(self._execution_device)
        groups = self.prepare_sketches(sketch)
        if groups is not None and len(groups) != len(photos):
            raise ValueError(f"`sketch` has to have one entry per photo, {len(photos)}, but has {len(groups)}.")
        labels, _ = self.prepare_class_labels(class_labels, groups, len(photos))
        abstraction = self.prepare_sketch_abstraction(sketch_abstraction, groups is not None)
        conditions = self.prepare_conditions(groups, labels, sketch_abstraction=abstraction)
        conditioning = join_conditions([[(condition, 1.0)] for condition in conditions])
        latents = self.encode_photos(photos)
        latents = self._invert(scheduler, scheduler.timesteps, latents, conditioning, num_fixed_point_iterations)
        self.maybe_free_model_hooks()
        return latents

    def _check_invertible(self, iterations) -> None:
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(
                f"`invert` needs a DDIMScheduler, but `scheduler` is a {type(self.scheduler).__name__}: set `pipe.scheduler"
                " = DDIMScheduler.from_config(pipe.scheduler.config)`."
            )
        check_integer("num_fixed_point_iterations", iterations, at_least=0)

    def _invert(
        self,
        scheduler,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        conditioning: Conditioning,
        iterations: int,
        on_latents: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """x at `timesteps[0]`, the unguided way from x_0 = `latents`; `on_latents` is called with x at each of them."""

        def predict(latents, timestep, step_index):
            return predict_noise(
                self.unet, self.unet.config, self.scheduler, latents, timestep, conditioning, clip_sample=False
            )

        with self.progress_bar(total=len(timesteps)) as progress_bar:

            def on_step_end(step_index, timestep, latents):
                progress_bar.update()
                if on_latents is not None:
                    on_latents(latents)

            return invert(scheduler, predict, latents, timesteps, iterations, on_step_end)


def _active_callbacks(guidance: MultiPipelineCallbacks, step_index: int, num_steps: int) -> list[PipelineCallback]:
    return [
        callback
        for callback in guidance.callbacks
        if not hasattr(callback, "is_active") or callback.is_active(step_index, num_steps)
    ]


def _fields(conditioning: Conditioning) -> tuple:
    return tuple(getattr(conditioning, field.name) for field in fields(conditioning))


def check_integer(name: str, value: Any, at_least: int) -> None:
    """
    Raises:
        ValueError: if the argument `name` is no integer, or a smaller one.
    """
    if not is_number(value, numbers.Integral) or value < at_least:
        raise ValueError(f"`{name}` has to be an integer of at least {at_least} but is {value!r}.")


def check_strength(strength: float) -> None:
    """
    Raises:
        ValueError: if it is outside of (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"`strength` has to be in (0, 1] but is {strength}.")


def as_list(class_labels: Any) -> Any:
    """A list of labels from any kind of sequence; one label as it is."""
    if torch.is_tensor(class_labels) or isinstance(class_labels, np.ndarray):
        return class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, (list, tuple)) else class_labels


def _flatten_callbacks(callbacks) -> list[PipelineCallback]:
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
