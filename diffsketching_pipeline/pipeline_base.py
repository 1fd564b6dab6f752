# SPDX-License-Identifier: Apache-2.0
"""The base of the pipelines: components, what a call prepares of its arguments, the loop, and the inversion."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.callbacks import PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging
from transformers import ResNetForImageClassification

from diffsketching_pipeline.autoencoding import decode_each, encode_each, get_scale_factor
from diffsketching_pipeline.conditioning import (
    ClassVocabulary,
    Condition,
    Conditioning,
    classify_sketch,
    find_class_shares,
    join_conditions,
    make_conditions,
    read_id2label,
)
from diffsketching_pipeline.denoising import UNetInputs, denoise, get_unet_inputs, invert, prepare_noise
from diffsketching_pipeline.guidance import ClassifierGuidanceCallback, GuidedPredictor
from diffsketching_pipeline.images.reading import preprocess_photos
from diffsketching_pipeline.images.sketch_processor import SketchProcessor
from diffsketching_pipeline.pipeline_options import (
    ResolvedOptions,
    SamplingOptions,
    check_inversion,
    check_recommended,
    resolve_num_inference_steps,
)
from diffsketching_pipeline.pipeline_output import DiffSketchingPipelineOutput
from diffsketching_pipeline.registry import register
from diffsketching_pipeline.schedulers import sampling_scheduler


register()
logger = logging.get_logger(__name__)

# A type checker takes the methods of diffusers' pipelines to be there; the class that is run has no base.
if TYPE_CHECKING:
    _Base = DiffusionPipeline
else:
    _Base = object
_Pipeline = TypeVar("_Pipeline", bound="DiffSketchingMixin")


class DiffSketchingMixin(_Base):
    r"""
    Base of the pipelines, in addition to [`DiffusionPipeline`]: a file that travels with a checkpoint may hold one subclass of
    that.

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
            where a guessed class has a second best of at least this share of its probability, both are mixed in proportion; and
            `max_class_entropy`: a warning of drawings of none of the classes above it; see [`~conditioning.class_entropy`].
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
        # Of their classes, each checkpoint with code of its own brings a copy.
        classifier: Optional[ModelMixin] = None,
        sketcher: Optional[ModelMixin] = None,
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
        self.id2label: dict[int, str] = read_id2label(id2label)
        check_recommended(recommended)
        self.recommended: dict[str, Any] = dict(recommended or {})
        check_components(self)

        self.height, self.width = (self.vae_scale_factor * side for side in self.sample_size)
        self.sketch_processor = SketchProcessor(resolution=max(self.height, self.width))
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._num_timesteps = 0
        self._interrupt = False
        self._last_call: dict[str, Any] = {}
        self._predictor: GuidedPredictor | None = None

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
        from diffsketching_pipeline.pipeline_loading import load_checked

        return load_checked(super().from_pretrained, pretrained_model_name_or_path, kwargs)

    @classmethod
    def download(cls, pretrained_model_name, **kwargs):
        """[`DiffusionPipeline.download`] and the checks of [`~DiffSketchingPipeline.from_pretrained`]."""
        from diffsketching_pipeline.pipeline_loading import download_checked

        return download_checked(super().download, pretrained_model_name, kwargs)

    def save_pretrained(self, save_directory, safe_serialization: bool = True, **kwargs):  # type: ignore[override]
        """
        [`DiffusionPipeline.save_pretrained`], with a list of sha256 sums that `from_pretrained` verifies.

        The configs do not keep the folders that the components were loaded from. To push, see
        [`~diffsketching_pipeline.push_pipeline`].

        Raises:
            ValueError: `safe_serialization` is off or `push_to_hub` is on.
        """
        from diffsketching_pipeline.pipeline_loading import save_with_manifest

        save_with_manifest(super().save_pretrained, save_directory, safe_serialization, kwargs)

    @classmethod
    def from_pipe(cls: type[_Pipeline], pipeline, **kwargs: Any) -> _Pipeline:
        """
        [`DiffusionPipeline.from_pipe`], sharing components as they are: each in its own dtype unless one is given.

        The default of diffusers casts the shared modules to float32 in place, under the source pipeline's feet.
        """
        if any(kwargs.get(name) is not None for name in ("torch_dtype", "dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        return share_components(cls, pipeline, kwargs)

    @property
    def components(self) -> dict[str, Any]:
        """
        All that `Pipeline(**pipe.components)` needs to be the same pipeline, or another with the same parts: the modules, and
        the names of classes and the recommended settings where there are any.
        """
        settings = {"id2label": self.id2label, "recommended": self.recommended}
        return {**super().components, **{name: value for name, value in settings.items() if value}}

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: what diffusers has here beside its `components` is among ours."""
        return {}

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
    def sketch_channels(self) -> int:
        """Input channels of a UNet that takes x_t and the drawing."""
        return self.sample_channels + self.vae_scale_factor**2

    @property
    def takes_sketch(self) -> bool:
        """Return whether the UNet is shown the drawing."""
        return self._unet_inputs.sketch > 0

    @property
    def takes_abstraction(self) -> bool:
        """Return whether the UNet is told `sketch_abstraction`."""
        return self._unet_inputs.abstraction > 0

    @property
    def num_classes(self) -> int:
        """Number of classes that a user may name; 0 if there are none."""
        return self.classes.num_classes

    @property
    def null_class(self) -> int | None:
        """Index of the UNet's "no class", or `None` if it has none."""
        return self.classes.null_class

    @property
    def classes(self) -> ClassVocabulary:
        """The classes that a user may name."""
        num_classifier_classes = 0 if self.classifier is None else self.classifier.config.num_classes
        num_embeds = self.unet.config.num_class_embeds
        return ClassVocabulary.of_components(self.id2label, num_embeds, num_classifier_classes)

    @property
    def num_timesteps(self) -> int:
        """Number of network evaluations of the current call, before batching."""
        return self._num_timesteps

    @property
    def guidance_scales(self) -> dict[str, float]:
        """The three scales that the last call used, with what `None` stood for filled in."""
        return dict(self._last_call.get("guidance_scales", {}))

    @property
    def eta(self) -> float:
        """The η that the last call used, with what `None` stood for filled in."""
        return self._last_call.get("eta", 0.0)

    @property
    def sketch_abstraction(self) -> float:
        """The abstraction that the last call used, with what `None` stood for filled in."""
        return self._last_call.get("sketch_abstraction", 0.0)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from `callback_on_step_end` to stop after the current step."""
        return self._interrupt

    @property
    def predictor(self) -> GuidedPredictor:
        """The predictor of the current call; between calls one that keeps nothing."""
        return self._predictor or self._make_predictor(Conditioning())

    def _make_predictor(self, conditioning: Conditioning, **options: Any) -> GuidedPredictor:
        options = {"components": self.components, "pipeline": self, **options}
        return GuidedPredictor(self.unet, self.unet.config, self.scheduler, conditioning, **options)

    def float32_call(self, name: str) -> Callable[..., Any]:
        """See [`~guidance.GuidedPredictor.float32`]; kept until the end of the call."""
        return self.predictor.float32(name)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """See [`~guidance.GuidedPredictor.cached`]; kept until the end of the call."""
        return self.predictor.cached(key, make)

    def get_label_id(self, label: int | str, argument: str = "class_labels") -> int:
        """See [`~conditioning.ClassVocabulary.index_of`]."""
        return self.classes.index_of(label, argument)

    def get_class_shares(self, label) -> dict[int, float]:
        """See [`~conditioning.ClassVocabulary.shares_of`]."""
        return self.classes.shares_of(label)

    def prepare_sketches(self, sketch, fit: str | None = None) -> list[torch.Tensor] | None:
        """
        Return the drawings of each result as `[K_i, 1, height, width]`, -1 = stroke and +1 = paper; `None` for no drawing.

        `fit` is that of [`SketchProcessor`]: `"page"` keeps the place of what is drawn.

        Raises:
            ValueError: naming the file or index of a sketch that cannot be read or is empty.
        """
        if sketch is None:
            return None
        groups = self.sketch_processor.preprocess_groups(sketch, self.height, self.width, fit=fit)
        return [group.to(self._execution_device, torch.float32) for group in groups]

    def prepare_class_labels(
        self, class_labels, groups: list[torch.Tensor] | None, num_rows: int
    ) -> tuple[list[dict[int, float] | None], torch.Tensor | None]:
        """
        Return the classes of each sketch with their shares (`None` = no class) and its probabilities `[num_rows, num_classes]`.

        Labels that are not given are predicted from the drawing by `sketch_encoder`, if there is one.

        Raises:
            ValueError: for an unknown class, a wrong number of labels, or no label where the network needs one.
        """
        predict = None
        if groups is not None and self.sketch_encoder is not None:
            predict = [partial(self.predict_class_probabilities, group) for group in groups]
        needs_class = self.unet.config.num_class_embeds is not None and self.null_class is None
        ratio, max_entropy = (self.recommended.get(name) for name in ("class_mixture", "max_class_entropy"))
        return find_class_shares(self.classes, class_labels, num_rows, predict, ratio, needs_class, max_entropy)

    @torch.no_grad()
    def predict_class_probabilities(self, sketch: torch.Tensor) -> torch.Tensor:
        """Return p(y | s) `[num_classes]` by `sketch_encoder`; see [`~conditioning.classify_sketch`]."""
        return classify_sketch(self.sketch_encoder, sketch, self.num_classes)

    def prepare_conditions(
        self,
        groups: list[torch.Tensor] | None,
        labels: list[dict[int, float] | None],
        negative_class_labels=None,
        sketch_masks: list[torch.Tensor] | None = None,
        sketch_abstraction: float = 0.0,
    ) -> list[Condition]:
        """
        Return what each result follows, from what [`~DiffSketchingPipeline.prepare_sketches`] and
        [`~DiffSketchingPipeline.prepare_class_labels`] made; see [`~conditioning.make_conditions`].
        """
        told = (groups, negative_class_labels, sketch_masks, sketch_abstraction, self._execution_device)
        return make_conditions(self.classes, labels, *told)

    def prepare_latents(self, batch_size: int, generators: list[torch.Generator], latents=None) -> torch.Tensor:
        """
        Return the noise that sampling starts from, float32 `[batch_size, channels, height, width]` in the UNet's own space: of
        `sample_channels` and `sample_size`.

        Raises:
            ValueError: if `latents` has another shape or is not finite.
        """
        shape = (batch_size, self.sample_channels, *self.sample_size)
        return prepare_noise(shape, generators, self._execution_device, latents)

    def resolve_num_inference_steps(self, num_inference_steps: int | None) -> int:
        """Return what was given, else what the checkpoint recommends."""
        return resolve_num_inference_steps(self.recommended, num_inference_steps)

    def _denoise(
        self,
        scheduler,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        conditioning: Conditioning,
        resolved: ResolvedOptions,
        callbacks: Sequence[PipelineCallback],
        step_kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the sampling loop; `after_step(step_index, latents)` may replace the result of a step before callbacks see it."""
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        self._predictor = self._make_predictor(
            conditioning,
            sketch_guidance_scale=resolved.sketch_guidance_scale,
            callbacks=callbacks,
            num_steps=len(timesteps),
            interval=resolved.guidance_interval,
            clip_sample=resolved.clip_sample,
        )
        with self.progress_bar(total=len(timesteps)) as progress_bar:

            def on_step_end(step_index, timestep, latents, prediction):
                progress_bar.update()
                if after_step is not None:
                    latents = after_step(step_index, latents)
                latents = resolved.given.call_on_step_end(self, step_index, timestep, latents, prediction)
                return latents, not self.interrupt

            try:
                return denoise(scheduler, self._predictor, latents, timesteps, step_kwargs, on_step_end)
            finally:
                self._predictor = None

    @torch.no_grad()
    def encode_photos(self, photos: torch.Tensor) -> torch.Tensor:
        """
        Return photos `[batch_size, 3, height, width]` in [-1, 1] in the UNet's own space, without randomness: latents of
        `vae`, or as they are. One at a time, so that none depends on its batch.
        """
        return encode_each(self.vae, photos)

    @torch.no_grad()
    def decode_photos(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Return photos `[batch_size, 3, height, width]` of what the UNet denoises, float32 and not clipped; one at a time, so that
        none depends on its batch.
        """
        return decode_each(self.vae, latents)

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Return x_0 as `output_type` asks for it."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_photos(latents).clamp(-1, 1), output_type=output_type)

    def _output(self, images, labels, probabilities, return_dict: bool):
        self.maybe_free_model_hooks()
        used_labels = [self.classes.names_of(shares) for shares in labels]
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
        Return the noise x_T from which sampling makes these photos, without guidance and without clipping.

        `pipe(sketch, class_labels, 1, num_inference_steps, clip_sample=False, latents=x_T)` is the way back: with the same
        classes, drawings, steps and scheduler. Scales that are not given are off in such a call, because guidance cannot be
        inverted; they may be given, to change the photo.

        Args:
            images (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Photos, scaled and cropped to the model's size; see [`~images.reading.preprocess_photos`].
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
        check_inversion(self, class_labels, sketch is not None, num_fixed_point_iterations, sketch_abstraction)
        num_inference_steps = self.resolve_num_inference_steps(num_inference_steps)
        scheduler = sampling_scheduler(self.scheduler, num_inference_steps, self._execution_device)

        photos = preprocess_photos(images, self.height, self.width).to(self._execution_device)
        groups = self.prepare_sketches(sketch)
        if groups is not None and len(groups) != len(photos):
            raise ValueError(f"`sketch` has to have one entry per photo, {len(photos)}, but has {len(groups)}.")
        labels, _ = self.prepare_class_labels(class_labels, groups, len(photos))
        options = SamplingOptions(sketch_abstraction=sketch_abstraction)
        resolved = options.resolve(self, has_sketch=groups is not None, has_class=None not in labels)
        conditions = self.prepare_conditions(groups, labels, sketch_abstraction=resolved.sketch_abstraction)
        conditioning = join_conditions([[(condition, 1.0)] for condition in conditions])
        latents = self.encode_photos(photos)
        latents = self._invert(scheduler, scheduler.timesteps, latents, conditioning, num_fixed_point_iterations)
        self.maybe_free_model_hooks()
        return latents

    def _invert(self, scheduler, timesteps, latents, conditioning, iterations: int, on_latents=None) -> torch.Tensor:
        """Return x at `timesteps[0]`, the unguided way from x_0 = `latents`; `on_latents` is called with each x on the way."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:

            def on_step_end(step_index, timestep, latents):
                progress_bar.update()
                if on_latents is not None:
                    on_latents(latents)

            return invert(scheduler, self._make_predictor(conditioning), latents, timesteps, iterations, on_step_end)


def share_components(pipeline_class: Any, source: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return a pipeline of another class with the components and settings of `source`, but for those in `kwargs`."""
    settings = {**source.config, **source.components}
    names = inspect.signature(pipeline_class.__init__).parameters
    pipe = pipeline_class(**{**{name: settings[name] for name in names if name in settings}, **kwargs})
    pipe.register_to_config(_name_or_path=source.config.get("_name_or_path"))
    return pipe


def warn_if_sketch_is_unused(
    pipe: DiffSketchingMixin, argument: str, callbacks: Sequence[PipelineCallback], hint: str = ""
) -> None:
    """Log a warning where the drawing, the call's `argument`, changes nothing but the class; `hint` says what would help."""
    uses_sketch = any(not isinstance(callback, ClassifierGuidanceCallback) for callback in callbacks)
    if pipe.takes_sketch or uses_sketch:
        return
    logger.warning(
        f"This call does not use the `{argument}` for anything but its class: the `unet` has"
        f" {pipe.unet.config.in_channels} input channels, and no guidance by the drawing is on. Set"
        f" `perceptual_guidance_scale`{hint}."
    )


def check_components(pipe: DiffSketchingMixin) -> None:
    """
    Raises:
        ValueError: if the components of a pipeline, its classes or its recommendations do not fit together.
    """
    config = pipe.unet.config
    _check_space(pipe)
    if config.sample_size is None:
        raise ValueError("`unet` has to have a `sample_size`, the size of its images, but has None.")
    if pipe.classifier is not None:
        _check_classifier_space(pipe)
    num_labels, num_embeds = len(pipe.id2label), config.num_class_embeds
    if num_labels and num_embeds is not None and num_embeds not in (num_labels, num_labels + 1):
        raise ValueError(
            f"`id2label` has {num_labels} classes, so `unet.config.num_class_embeds` has to be {num_labels} or, with"
            f" one for 'no class', {num_labels + 1}, but is {num_embeds}."
        )
    if num_labels and pipe.classifier is not None and pipe.classifier.config.num_classes != num_labels:
        raise ValueError(
            f"`classifier` knows {pipe.classifier.config.num_classes} classes but `id2label` has {num_labels}."
        )


def _check_space(pipe: DiffSketchingMixin) -> None:
    """Refuse a `unet` whose channels are not those of the photos, or of the latents of `vae`."""
    config, channels = pipe.unet.config, pipe.sample_channels
    space = "photos: one that denoises latents needs its `vae`"
    if pipe.vae is not None:
        space = f"the latents of `vae`, with {channels} channels and {pipe.vae_scale_factor} pixels per latent"
        if pipe.vae.config.in_channels != 3 or pipe.vae.config.out_channels != 3:
            raise ValueError(
                f"`vae` must have 3 channels of photos on both sides, but got {pipe.vae.config.in_channels} and"
                f" {pipe.vae.config.out_channels}."
            )
    try:
        get_unet_inputs(config.in_channels, channels, pipe.vae_scale_factor)
    except ValueError as error:
        raise ValueError(f"{error} Here x_t is in the space of {space}.") from error
    if config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"`unet` has to have {channels} output channels, or {2 * channels} with learned variance, but has"
            f" `out_channels={config.out_channels}`. Here x_t is in the space of {space}."
        )


def _check_classifier_space(pipe: DiffSketchingMixin) -> None:
    found = pipe.classifier.config
    if (found.in_channels, found.sample_size, found.sample_size) != (pipe.sample_channels, *pipe.sample_size):
        raise ValueError(
            f"`classifier` must judge what `unet` denoises, {pipe.sample_channels} channels of"
            f" {pipe.sample_size[1]} x {pipe.sample_size[0]}, but got `in_channels={found.in_channels}` and"
            f" `sample_size={found.sample_size}`."
        )
