# SPDX-License-Identifier: Apache-2.0
"""The pipeline that makes the frames between drawings, photos or classes."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import DDPMScheduler

from diffsketching_pipeline.conditioning import Condition, as_list, join_conditions
from diffsketching_pipeline.images.reading import preprocess_photos
from diffsketching_pipeline.pipeline_base import DiffSketchingMixin, warn_if_sketch_is_unused
from diffsketching_pipeline.pipeline_options import SamplingOptions, check_integer, check_invertible, expand_generator
from diffsketching_pipeline.schedulers import sampling_scheduler, scheduler_step_kwargs


# Beyond this cosine the formula of `slerp` divides by almost nothing.
_PARALLEL = 0.9995


class DiffSketchingInterpolationPipeline(DiffSketchingMixin, DiffusionPipeline):
    r"""
    Pipeline that makes the frames between drawings, photos or classes (DiffSketching, https://arxiv.org/abs/2305.18812).

    Between two keys x_T is interpolated spherically, and the noise predictions under the condition of each are blended
    linearly.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.), and
    [`~pipeline_base.DiffSketchingMixin`] for the components.
    """

    def check_inputs(
        self,
        sketches,
        images,
        class_labels,
        num_frames,
        num_fixed_point_iterations,
        latents,
        options: SamplingOptions,
    ):
        options.check(self, class_labels, sketches is not None, latents)
        check_integer("num_frames", num_frames, at_least=2)
        if images is None:
            if isinstance(self.scheduler, DDPMScheduler):
                raise ValueError(
                    "`scheduler` is a DDPMScheduler, whose noise cannot be interpolated: set `pipe.scheduler ="
                    " DDIMScheduler.from_config(pipe.scheduler.config)`."
                )
            return
        check_invertible(self.scheduler, num_fixed_point_iterations)
        for name, value in (("latents", latents), ("generator", options.generator)):
            if value is not None:
                raise ValueError(
                    f"`{name}` is the noise, and that of `images` comes from their inversion: give one of them."
                )
        if options.eta:
            raise ValueError(f"`eta={options.eta}` would lead away from `images`: leave it at None.")

    def _num_keys(self, **keys) -> int:
        """Return how many keys the arguments speak of; a single drawing or class holds for all."""
        counts = {
            name: len(value) for name, value in keys.items() if isinstance(value, list) or torch.is_tensor(value)
        }
        several = {count for name, count in counts.items() if count > 1 or name in ("images", "latents")}
        if len(several) == 1 and min(several) > 1:
            return min(several)
        found = ", ".join(f"{count} in `{name}`" for name, count in counts.items()) or "none"
        raise ValueError(
            "There have to be two or more keys to interpolate between, as many in each argument that has more than one, but"
            f" there are {found}: give a list of `sketches`, `images`, `class_labels` or `latents`."
        )

    @torch.no_grad()
    def __call__(
        self,
        sketches=None,
        images=None,
        class_labels=None,
        num_frames: int = 16,
        num_inference_steps: int | None = None,
        sketch_guidance_scale: float | None = None,
        classifier_guidance_scale: float | None = None,
        perceptual_guidance_scale: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_callbacks: PipelineCallback | MultiPipelineCallbacks | Sequence[PipelineCallback] | None = None,
        num_fixed_point_iterations: int = 3,
        eta: float | None = None,
        clip_sample: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        negative_class_labels=None,
        sketch_abstraction: float | None = None,
    ):
        r"""
        Frames from the first key over the others to the last.

        The first and last frame, and each key that a frame falls on, are what [`DiffSketchingPipeline`] makes of that key
        with the same noise.

        Args:
            sketches (drawing or a list of them, *optional*):
                One drawing per key, or one for all; see [`DiffSketchingPipeline.__call__`].
            images (list of photos, *optional*):
                One photo per key, which is inverted with its drawing, if it has one, and its class. Frames are then made
                without guidance and without clipping, unless they are asked for, so that the keys come back.
            class_labels (`str`, `int`, `dict` or a list of these and `None`, *optional*):
                One class per key, or one for all. `None` asks `sketch_encoder`.
            num_frames (`int`, defaults to 16):
                Number of frames in all; keys are spread evenly, and all frames are computed in one batch.
            num_fixed_point_iterations (`int`, defaults to 3):
                Of the inversion of `images`; see [`~DiffSketchingPipeline.invert`].
            eta (`float`, *optional*):
                η of DDIM; `None` is the checkpoint's recommendation, or 0.0 where `images` or `latents` are given. The fresh
                noise of a step is interpolated as x_T is.
            generator (`torch.Generator` or a list of them, *optional*):
                A single one makes the noise of all keys, which then differ in their condition alone; a list has one per
                key.
            latents (`torch.Tensor` of shape `[num_keys, channels, height, width]`, *optional*):
                x_T of each key, in the UNet's own space.

        All other arguments are those of [`DiffSketchingPipeline.__call__`].

        Returns:
            [`DiffSketchingPipelineOutput`] or `tuple`: `num_frames` images in order; one class per key.

        Raises:
            ValueError: for fewer than two keys, arguments that speak of different numbers of keys, and as
                [`DiffSketchingPipeline.__call__`].
        """
        # 0. Check inputs
        options = SamplingOptions(
            sketch_guidance_scale=sketch_guidance_scale,
            classifier_guidance_scale=classifier_guidance_scale,
            perceptual_guidance_scale=perceptual_guidance_scale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            guidance_callbacks=guidance_callbacks,
            eta=eta,
            clip_sample=clip_sample,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            negative_class_labels=negative_class_labels,
            sketch_abstraction=sketch_abstraction,
            num_inference_steps=num_inference_steps,
        ).for_noise_of(latents, images)
        self.check_inputs(sketches, images, class_labels, num_frames, num_fixed_point_iterations, latents, options)
        device = self._execution_device
        scheduler = sampling_scheduler(self.scheduler, self.resolve_num_inference_steps(num_inference_steps), device)

        # 1. Read drawings and photos, and count the keys
        groups = self.prepare_sketches(sketches)
        photos = None if images is None else preprocess_photos(images, self.height, self.width).to(device)
        num_keys = self._num_keys(sketches=groups, images=photos, class_labels=as_list(class_labels), latents=latents)
        if groups is not None and len(groups) == 1:
            groups = groups * num_keys

        # 2. The condition of each key
        if isinstance(as_list(class_labels), list) and len(class_labels) == 1:
            class_labels = as_list(class_labels)[0]
        labels, probabilities = self.prepare_class_labels(class_labels, groups, num_keys)
        has_latents = photos is not None or latents is not None
        resolved = options.resolve(
            self, has_sketch=groups is not None, has_class=None not in labels, has_latents=has_latents
        )
        self._last_call = resolved.record
        abstraction = resolved.sketch_abstraction
        keys = self.prepare_conditions(groups, labels, negative_class_labels, sketch_abstraction=abstraction)

        # 3. Put guidance together
        callbacks = resolved.guidance_callbacks()
        if groups is not None:
            warn_if_sketch_is_unused(self, "sketches", callbacks)

        # 4. The noise of each key
        num_generators = num_keys if isinstance(generator, (list, tuple)) else 1
        generators = expand_generator(generator, num_generators, per="key")
        if photos is not None:
            conditioning = join_conditions([[(key, 1.0)] for key in keys])
            latents = self.encode_photos(photos)
            latents = self._invert(scheduler, scheduler.timesteps, latents, conditioning, num_fixed_point_iterations)
        frames = frame_positions(num_keys, num_frames)
        if latents is not None:
            latents = interpolate_noise(self.prepare_latents(num_keys, generators, latents), frames)
        else:
            latents = self.prepare_frame_noise(generators, frames)

        # 5. Denoise the frames, each under the conditions of the keys around it
        conditioning = join_conditions([_blend(keys, *frame) for frame in frames])
        step_kwargs = scheduler_step_kwargs(scheduler, resolved.eta, None)

        def make_step_kwargs() -> dict[str, Any]:
            if "variance_noise" not in inspect.signature(scheduler.step).parameters:
                return step_kwargs
            return {**step_kwargs, "variance_noise": self.prepare_frame_noise(generators, frames)}

        latents = self._denoise(
            scheduler, scheduler.timesteps, latents, conditioning, resolved, callbacks, make_step_kwargs
        )

        # 6. Post-process
        return self._output(self.decode_latents(latents, output_type), labels, probabilities, return_dict)

    def prepare_frame_noise(
        self, generators: list[torch.Generator], frames: Sequence[tuple[int, float]]
    ) -> torch.Tensor:
        """Return fresh noise for each frame, `[num_frames, ...]` as x_t: that of one generator, or between those of the keys."""
        noise = self.prepare_latents(len(generators), generators)
        if len(generators) == 1:
            return noise.expand(len(frames), -1, -1, -1)
        return interpolate_noise(noise, frames)


def frame_positions(num_keys: int, num_frames: int) -> list[tuple[int, float]]:
    """Return for each frame the key at or before it, and how far it is on the way to the next, in [0, 1)."""
    steps = [divmod(frame * (num_keys - 1), num_frames - 1) for frame in range(num_frames)]
    return [(key, remainder / (num_frames - 1)) for key, remainder in steps]


def interpolate_noise(noise: torch.Tensor, frames: Sequence[tuple[int, float]]) -> torch.Tensor:
    """Return [`slerp`] between the keys `[num_keys, channels, height, width]`, at each frame of [`frame_positions`]."""
    return torch.stack([slerp(noise[key], noise[key + 1], share) if share else noise[key] for key, share in frames])


def slerp(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """
    Spherical interpolation (Shoemake, 1985), which keeps the norm that noise has; linear where the two have (nearly) the
    same or opposite directions.
    """
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    if float(cosine.abs()) > _PARALLEL:
        return torch.lerp(start, end, share)
    angle = torch.arccos(cosine)
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)


def _blend(keys: Sequence[Condition], key: int, share: float) -> list[tuple[Condition, float]]:
    return [(keys[key], 1 - share), (keys[key + 1], share)] if share else [(keys[key], 1.0)]
