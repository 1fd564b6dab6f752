# SPDX-License-Identifier: Apache-2.0
"""The pipeline that turns drawings into photos."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffsketching_pipeline.conditioning import as_list, join_conditions, read_sketch_masks
from diffsketching_pipeline.deprecation import renamed_arguments
from diffsketching_pipeline.guidance import read_colors
from diffsketching_pipeline.images.colors import are_color_strokes
from diffsketching_pipeline.pipeline_base import DiffSketchingMixin, warn_if_sketch_is_unused
from diffsketching_pipeline.pipeline_options import SamplingOptions, check_integer, check_strength, expand_generator
from diffsketching_pipeline.schedulers import sampling_scheduler, scheduler_step_kwargs, timesteps_from


class DiffSketchingPipeline(DiffSketchingMixin, DiffusionPipeline):
    r"""
    Pipeline that turns a drawing into photos of its shape (DiffSketching, https://arxiv.org/abs/2305.18812).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.), and
    [`~pipeline_base.DiffSketchingMixin`] for the components.
    """

    def check_inputs(
        self,
        sketch,
        class_labels,
        num_images_per_sketch,
        strength,
        latents,
        sketch_masks,
        options: SamplingOptions,
    ):
        check_integer("num_images_per_sketch", num_images_per_sketch, at_least=1)
        options.check(self, class_labels, sketch is not None, latents)
        check_strength(strength)
        if strength < 1.0 and sketch is None:
            raise ValueError(
                f"`strength={strength}` starts from the sketch: give a `sketch`, or leave `strength` at 1.0."
            )
        if sketch_masks is not None and sketch is None:
            raise ValueError("`sketch_masks` says where drawings rule: give a `sketch`, or leave it at None.")

    @renamed_arguments(colour_hint="color_hint", colour_guidance_scale="color_guidance_scale")
    @torch.no_grad()
    def __call__(
        self,
        sketch=None,
        class_labels=None,
        num_images_per_sketch: int = 4,
        num_inference_steps: int | None = None,
        sketch_guidance_scale: float | None = None,
        classifier_guidance_scale: float | None = None,
        perceptual_guidance_scale: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_callbacks: PipelineCallback | MultiPipelineCallbacks | Sequence[PipelineCallback] | None = None,
        strength: float = 1.0,
        eta: float | None = None,
        clip_sample: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        negative_class_labels=None,
        sketch_masks=None,
        color_hint=None,
        color_guidance_scale: float = 0.5,
        sketch_abstraction: float | None = None,
        image=None,
    ):
        r"""
        Photos of a drawing.

        Args:
            sketch (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
                One drawing or several, dark strokes on light paper; see [`SketchProcessor`] for all that is accepted. A
                list inside the list holds several drawings for one result, whose predictions are averaged. `None` samples
                without a drawing: one row per class label, else as many as `latents` holds, else one.
            class_labels (`str`, `int`, `dict` or a list of these and `None`, *optional*):
                Class by name or index, one for all sketches or one per sketch. A dict is a mixture: weights of classes, such
                as `{"shirt": 0.7, "dress": 0.3}`, whose predictions are averaged. `None` asks `sketch_encoder`; without
                one it means no class.
            num_images_per_sketch (`int`, defaults to 4):
                Number of photos of each drawing.
            num_inference_steps (`int`, *optional*):
                Number of denoising steps. `None` for this and the scales is the checkpoint's recommendation.
            sketch_guidance_scale (`float`, *optional*):
                Classifier-free guidance on the sketch channel, and on the class of a UNet that knows "no class"; 1.0 is
                off, larger follows drawing and class more closely.
            classifier_guidance_scale (`float`, *optional*):
                w_c of eq. 4; 0.0 is off, larger looks more like the class.
            perceptual_guidance_scale (`float`, *optional*):
                Size of the L_p gradient as a fraction of the noise prediction; 0.0 is off. See
                [`SketchGuidanceCallback`].
            guidance_start, guidance_end (`float`, defaults to 0.0 and 1.0):
                Fractions of the steps between which the three guidances are on; outside, the prediction is plainly
                conditional. Where x_t is pure noise (the first step of a cosine schedule with trailing spacing) nothing is
                guided but by `sketch_guidance_scale`, because any gradient explodes there.
            guidance_callbacks ([`PipelineCallback`] or a list of them, *optional*):
                Further guidance beside that of the scales; see `diffsketching_pipeline.guidance`.
            strength (`float`, defaults to 1.0):
                1.0 starts from pure noise; less starts from the noised drawing, and keeps more of its layout.
            eta (`float`, *optional*):
                η of DDIM in [0, 1], the share of fresh noise in each step: 0.0 is deterministic, 1.0 corrects most of what
                earlier steps got wrong. `None` is the checkpoint's recommendation, or 0.0 where `latents` are given or
                with another scheduler, which refuse values above 0.
            clip_sample (`bool`, *optional*):
                Whether x̂_0 is clamped to [-1, 1] at each step; `None` is the scheduler's setting, `False` is for round
                trips from inverted latents. With a `vae` it is never clamped, and `True` is an error.
            generator (`torch.Generator` or a list of them, *optional*):
                One per image makes each image depend on its own alone; a single one is expanded to that by drawing a
                child seed per image.
            latents (`torch.Tensor` of shape `[len(sketches) * num_images_per_sketch, channels, height, width]`, *optional*):
                x_T, or with `strength` below 1 the noise added to the drawing. It is in the UNet's own space: 3 channels
                of the photos' size, or with a `vae` its latents; see `sample_channels` and `sample_size`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"` (x_0 in the UNet's own space, unclipped and not decoded).
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DiffSketchingPipelineOutput`] or a plain tuple of its three fields.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step_index, timestep, callback_kwargs)` after each step; may return
                `{"latents": ...}` to go on with others.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which of `latents`, `noise_pred` and `pred_original_sample` are in `callback_kwargs`.
            negative_class_labels (`str`, `int` or a list of these and `None`, *optional*):
                Class to move away from, one for all sketches or one per sketch: it takes the place of "no class" in
                classifier-free guidance.
            sketch_masks (list of lists of images, *optional*):
                Where each drawing of a result rules: one list per sketch with a mask for each of its drawings (path,
                `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`; white rules). Where masks overlap, or none is white, the
                drawings are averaged. The drawings keep their place on the page.
            color_hint (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of colors, *optional*):
                Colors that the photos take on, without a change of shape: coarse strokes on a page (what is transparent,
                or else white, is left free), or a palette for what the drawing encloses, such as `["#803010", "navy"]`. With
                strokes the drawings keep their place on the page, too.
            color_guidance_scale (`float`, defaults to 0.5):
                How strongly: 0.0 is off, 1.0 replaces the low frequencies, in the first 60% of the guided steps. See
                [`ColorGuidanceCallback`].
            sketch_abstraction (`float`, *optional*):
                How far the drawing may be off, in [0, 1]: 0.0 traces it, 1.0 draws what is meant. `None` is the
                checkpoint's recommendation, or 0.0. A UNet without a plane for it ignores it, which a warning says.
            image (*optional*):
                Another name of `sketch`, for servers that know no other.

        Examples:
            ```python
            >>> import torch
            >>> from diffsketching_pipeline import DiffSketchingPipeline, bundled_checkpoint

            >>> pipe = DiffSketchingPipeline.from_pretrained(bundled_checkpoint())
            >>> generator = torch.Generator().manual_seed(0)
            >>> out = pipe("examples/drawings/t-shirt.png", num_images_per_sketch=2, generator=generator)
            >>> out.images[0].save("t-shirt.photo.png")
            ```

        Returns:
            [`DiffSketchingPipelineOutput`] or `tuple`

        Raises:
            ValueError: for an argument out of range, a scale whose component the checkpoint lacks, a sketch that cannot
                be read or is empty, or a prediction that is not finite.
        """
        # 0. Check inputs
        if image is not None:
            if sketch is not None:
                raise ValueError("`image` is another name of `sketch`: give one of them.")
            sketch = image
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
            color_hint=color_hint,
            color_guidance_scale=color_guidance_scale,
            sketch_abstraction=sketch_abstraction,
            num_inference_steps=num_inference_steps,
        ).for_noise_of(latents)
        self.check_inputs(sketch, class_labels, num_images_per_sketch, strength, latents, sketch_masks, options)
        device = self._execution_device
        num_inference_steps = self.resolve_num_inference_steps(num_inference_steps)
        scheduler = sampling_scheduler(self.scheduler, num_inference_steps, device)
        timesteps = timesteps_from(scheduler, num_inference_steps, strength)

        # 1. Read the drawings, and where each of several rules
        has_place = sketch_masks is not None or are_color_strokes(color_hint)
        groups = self.prepare_sketches(sketch, fit="page" if has_place else None)
        size = (self.height, self.width)
        masks = read_sketch_masks(sketch_masks, groups, size, self.vae_scale_factor)
        colors = read_colors(color_hint, groups, num_images_per_sketch, size, device)
        num_rows = _count_rows(class_labels, groups, latents, num_images_per_sketch)
        batch_size = num_rows * num_images_per_sketch

        # 2. Find the classes, and what is left at None
        labels, probabilities = self.prepare_class_labels(class_labels, groups, num_rows)
        resolved = options.resolve(
            self, has_sketch=groups is not None, has_class=None not in labels, has_latents=latents is not None
        )
        self._last_call = resolved.record
        conditions = self.prepare_conditions(groups, labels, negative_class_labels, masks, resolved.sketch_abstraction)
        conditioning = join_conditions(
            [[(condition, 1.0)] for condition in conditions for _ in range(num_images_per_sketch)]
        )

        # 3. Put guidance together
        callbacks = resolved.guidance_callbacks(colors)
        if groups is not None and strength == 1.0:
            warn_if_sketch_is_unused(self, "sketch", callbacks, ", or lower `strength`")

        # 4. One generator per image, and the noise
        generators = expand_generator(generator, batch_size)
        step_kwargs = scheduler_step_kwargs(scheduler, resolved.eta, generators)
        latents = self.prepare_latents(batch_size, generators, latents)

        # 5. Start from the noised drawing
        if groups is not None and strength < 1.0:
            start = torch.stack([group.mean(dim=0) for group in groups]).expand(-1, 3, -1, -1)
            start = self.encode_photos(start).repeat_interleave(num_images_per_sketch, dim=0)
            latents = scheduler.add_noise(start, latents, timesteps[:1])

        # 6. Denoise
        latents = self._denoise(scheduler, timesteps, latents, conditioning, resolved, callbacks, step_kwargs)

        # 7. Post-process
        images = self.decode_latents(latents, output_type)
        return self._output(images, labels, probabilities, return_dict)


def _count_rows(class_labels, groups, latents, num_images_per_sketch: int) -> int:
    """Return how many results are asked for, before `num_images_per_sketch`."""
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
