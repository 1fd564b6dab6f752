# SPDX-License-Identifier: Apache-2.0
"""The pipeline that changes a part of a photo into the shape of a drawing."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from scipy import ndimage
from skimage.morphology import convex_hull_image

from diffsketching_pipeline.conditioning import join_conditions
from diffsketching_pipeline.deprecation import renamed_arguments
from diffsketching_pipeline.guidance import read_colors
from diffsketching_pipeline.images.colors import are_color_strokes
from diffsketching_pipeline.images.reading import is_number, preprocess_mask, preprocess_photos, read_photo
from diffsketching_pipeline.images.sketch_processor import SketchProcessor
from diffsketching_pipeline.pipeline_base import DiffSketchingMixin, warn_if_sketch_is_unused
from diffsketching_pipeline.pipeline_options import (
    SamplingOptions,
    check_integer,
    check_invertible,
    check_strength,
    expand_generator,
)
from diffsketching_pipeline.schedulers import forward_step, sampling_scheduler, scheduler_step_kwargs, timesteps_from


# A drawing is read from the whole page at the scale that makes the part as large as the model. Such a page is at most this
# many times larger than that, which bounds what reading it costs, and at most as large as `SketchProcessor` makes them.
_MAX_PAGE_SCALE = 16
_MAX_PAGE_SIDE = 4096
# Strokes are read at this many pixels of the page's longer side to find what they enclose.
_PAGE_SIDE = 256
# How far the page of a drawing may differ from the photo's in aspect ratio.
_ASPECT_TOLERANCE = 0.03


class EditedRegion(NamedTuple):
    """
    The part of a photo that the model sees.

    Attributes:
        photo: the whole photo, RGB or RGBA.
        box: left, top, right and bottom of the part, in pixels of the photo.
        mask: `[height, width]` of the whole photo, True where it may change.
    """

    photo: Image.Image
    box: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the part in pixels of the photo."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def crop_mask(self) -> np.ndarray:
        """The mask of the part."""
        left, top, right, bottom = self.box
        return self.mask[top:bottom, left:right]

    def depth(self) -> np.ndarray:
        """Distance of each pixel of the part to the nearest that may not change, in pixels; infinite if all may."""
        left, top, right, bottom = self.box
        # The part holds all of the mask, so that one more pixel around it holds the nearest outside.
        first_row, first_column = max(0, top - 1), max(0, left - 1)
        mask = self.mask[first_row : bottom + 1, first_column : right + 1]
        # Without an outside SciPy would measure from a point beyond the corner.
        depth = np.full(mask.shape, np.inf) if mask.all() else ndimage.distance_transform_edt(mask)
        return depth[top - first_row :, left - first_column :][: bottom - top, : right - left]


class DiffSketchingEditPipeline(DiffSketchingMixin, DiffusionPipeline):
    r"""
    Pipeline that changes a part of a photo into the shape of a drawing (DiffSketching, https://arxiv.org/abs/2305.18812).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.), and
    [`~pipeline_base.DiffSketchingMixin`] for the components. The `scheduler` has to be a [`DDIMScheduler`], and the
    `sketcher` tells the network what lies around the mask.
    """

    def check_inputs(
        self,
        sketch,
        class_labels,
        num_images_per_sketch,
        strength,
        fractions: dict[str, float],
        num_resample_steps,
        num_fixed_point_iterations,
        options: SamplingOptions,
    ):
        check_integer("num_images_per_sketch", num_images_per_sketch, at_least=1)
        has_sketch = sketch is not None or self.sketcher is not None
        options.check(self, class_labels, has_sketch)
        check_invertible(self.scheduler, num_fixed_point_iterations)
        check_strength(strength)
        for name, value in fractions.items():
            if not is_number(value) or not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` has to be in [0, 1] but is {value!r}.")
        check_integer("num_resample_steps", num_resample_steps, at_least=1)

    def prepare_mask_image(self, image, mask_image=None, sketch=None, mask_padding: float = 0.05) -> Image.Image:
        """
        Return what may change, as `__call__` takes it from the same arguments: a `PIL.Image.Image` of mode L and the photo's size,
        255 where the photo may change.

        Raises:
            ValueError: if the photo or the mask cannot be read, the mask has another size or is empty, or there is neither
                a mask nor a drawing.
        """
        photo = read_photo(image, "`image`")
        if mask_image is None:
            if sketch is None:
                raise ValueError("`mask_image` and `sketch` are None: give at least one, to say what may change.")
            return self._mask_of_strokes(photo.size, sketch, mask_padding)
        if _is_box(mask_image):
            return _mask_of_box(photo.size, mask_image)
        mask = preprocess_mask(mask_image, "`mask_image`")
        if mask.size != photo.size:
            raise ValueError(
                f"`mask_image` has to have the photo's size, {photo.width} x {photo.height} pixels, but has {mask.width} x"
                f" {mask.height}."
            )
        mask = mask.point(lambda level: 255 * (level > 127))
        if mask.getbbox() is None:
            raise ValueError("`mask_image` is empty: make it white (above 127) where the photo may change.")
        return mask

    def _mask_of_strokes(self, size: tuple[int, int], sketch, mask_padding: float) -> Image.Image:
        """Return what strokes that lie together enclose or span, grown by `mask_padding` of the photo's longer side."""
        scale = _PAGE_SIDE / max(size)
        width, height = (max(8, round(side * scale)) for side in size)
        strokes = self.prepare_strokes(sketch, size, (width, height))[0, 0].numpy() < 0
        padding = mask_padding * _PAGE_SIDE
        near, count = ndimage.label(ndimage.distance_transform_edt(~strokes) <= 2 * padding)
        area = np.zeros_like(strokes)
        for index in range(1, count + 1):
            area |= convex_hull_image(strokes & (near == index))
        area = ndimage.distance_transform_edt(~area) <= padding
        return Image.fromarray(area).convert("L").resize(size, Image.Resampling.NEAREST)

    def prepare_strokes(self, sketch, photo_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """
        Return the drawing in its place on the photo's page, `[1, 1, height, width]`.

        Args:
            photo_size, size: width and height of the photo, and of the result, in pixels.

        Raises:
            ValueError: if it cannot be read, is not one drawing, is empty, or its page has another aspect ratio.
        """
        _check_page("sketch", read_photo(sketch, "`sketch`").size, photo_size)
        config: Any = self.sketch_processor.config
        # As wide in pixels as where a whole drawing fills the model's size.
        line_width = config.line_width and min(0.25, config.line_width * min(self.height, self.width) / min(size))
        processor = SketchProcessor(config.resolution, config.threshold, config.invert, line_width=line_width)
        return processor.preprocess(sketch, size[1], size[0], fit="page", resize_mode="stretch")

    def prepare_region(self, image, mask: Image.Image, crop_margin: float) -> EditedRegion:
        """
        Return the part of the photo around the mask: as near to a square as the photo allows, with a margin of `crop_margin`
        of the mask's longer side, and no side below 1/16 of the photo's longer one, so that the drawing can be read at its scale.
        """
        photo = read_photo(image, "`image`")
        left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
        side = round((1 + 2 * crop_margin) * max(right - left, bottom - top))
        max_page_scale = min(_MAX_PAGE_SCALE, _MAX_PAGE_SIDE / max(self.width, self.height))
        side = max(side, math.ceil(max(photo.size) / max_page_scale))
        horizontal = _centered_interval(left, right, side, photo.width)
        vertical = _centered_interval(top, bottom, side, photo.height)
        box = (horizontal[0], vertical[0], horizontal[1], vertical[1])
        return EditedRegion(photo, box, np.asarray(mask) > 127)

    def prepare_photo(self, region: EditedRegion) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the part at the model's size in pixels, `[1, 3, height, width]` in [-1, 1], and where it may change, bool `[1, 1,
        height, width]`: each pixel that the mask touches, for outside of the mask the photo is put back anyway.
        """
        size = (self.width, self.height)
        part = region.photo.crop(region.box).resize(size, Image.Resampling.LANCZOS)
        # Pooled on the CPU: MPS refuses sizes that do not divide.
        mask = torch.from_numpy(region.crop_mask()).float()[None, None]
        inside = F.adaptive_max_pool2d(mask, (self.height, self.width)) > 0
        photo = preprocess_photos(part, self.height, self.width)
        return photo.to(self._execution_device), inside.to(self._execution_device)

    def prepare_latent_mask(self, inside: torch.Tensor) -> torch.Tensor:
        """
        Return where x_t may change, bool `[1, 1, height, width]` in the UNet's own space, of the same in pixels: a latent
        may wherever one of its pixels may.
        """
        if self.vae is None:
            return inside
        return F.max_pool2d(inside.float(), self.vae_scale_factor) > 0

    def prepare_drawing(self, region: EditedRegion, photo: torch.Tensor, inside: torch.Tensor, sketch):
        """
        Return what the network is shown, `[1, 1, height, width]`: the strokes inside the mask, and around it (or without a
        drawing everywhere) the contours that `sketcher` finds in the photo. `None` where there is neither.

        Args:
            photo: the part of it, `[1, 3, height, width]` in [-1, 1].
            inside: `[1, 1, height, width]`, True where it may change.
        """
        contours = None
        if self.sketcher is not None:
            contours = self.sketcher(photo.to(self.sketcher.dtype)).float()
        if sketch is None:
            return contours
        width, height = region.size
        scale = (self.width / width, self.height / height)
        page = (max(8, round(region.photo.width * scale[0])), max(8, round(region.photo.height * scale[1])))
        strokes = self.prepare_strokes(sketch, region.photo.size, page)
        left, top = round(region.box[0] * scale[0]), round(region.box[1] * scale[1])
        left, top = min(left, page[0] - self.width), min(top, page[1] - self.height)
        strokes = strokes[..., top : top + self.height, left : left + self.width].to(photo.device)
        if not bool((strokes < 0)[inside].any()):
            raise ValueError("`sketch` has no line inside of what may change: draw there, or enlarge `mask_image`.")
        return strokes if contours is None else torch.where(inside, strokes, contours)

    def prepare_part_colors(self, color_hint, region: EditedRegion, inside: torch.Tensor, groups, num_images: int):
        """
        Read colors as [`~guidance.read_colors`] does, inside the mask; strokes of color lie on the photo's page.

        Raises:
            ValueError: for strokes on a page of another aspect ratio, or with none inside the mask.
        """
        box = None
        if are_color_strokes(color_hint):
            color_hint = read_photo(color_hint, "`color_hint`")
            _check_page("color_hint", color_hint.size, region.photo.size)
            scale = [page / photo for page, photo in zip(color_hint.size, region.photo.size, strict=True)]
            left, top, right, bottom = region.box
            box = (left * scale[0], top * scale[1], right * scale[0], bottom * scale[1])
        size = (self.height, self.width)
        return read_colors(color_hint, groups, num_images, size, inside.device, box, inside)

    @renamed_arguments(colour_hint="color_hint", colour_guidance_scale="color_guidance_scale")
    @torch.no_grad()
    def __call__(
        self,
        image,
        mask_image=None,
        sketch=None,
        class_labels=None,
        num_images_per_sketch: int = 1,
        num_inference_steps: int | None = None,
        sketch_guidance_scale: float | None = None,
        classifier_guidance_scale: float | None = None,
        perceptual_guidance_scale: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_callbacks: PipelineCallback | MultiPipelineCallbacks | Sequence[PipelineCallback] | None = None,
        strength: float = 0.9,
        mask_padding: float = 0.05,
        crop_margin: float = 0.5,
        feather: float = 0.05,
        num_resample_steps: int = 3,
        num_fixed_point_iterations: int = 1,
        eta: float | None = None,
        clip_sample: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        negative_class_labels=None,
        color_hint=None,
        color_guidance_scale: float = 0.5,
        sketch_abstraction: float | None = None,
    ):
        r"""
        A photo in which a part follows a drawing.

        The part around the mask is scaled to the model's size, inverted and sampled again from the noise that `strength`
        leaves; at each step the surroundings are those of the inverted photo. The result is pasted into the photo.

        Args:
            image (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                One photo of any size and mode; see [`~images.reading.read_photo`].
            mask_image (path, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or four numbers, *optional*):
                What may change: white (above 127 of 255) in an image of the photo's size, or a box `(left, top, right,
                bottom)` in pixels. `None` is what the strokes enclose or span, grown by `mask_padding`.
            sketch (path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                The lines that are new inside the mask, dark on light, on the photo's page: they keep their place, the page
                may be larger or smaller than the photo. `None` keeps the photo's own contours.
            class_labels (`str`, `int` or `dict`, *optional*):
                Class of the result, or a mixture; `None` asks `sketch_encoder`.
            num_images_per_sketch (`int`, defaults to 1):
                Number of results.
            strength (`float`, defaults to 0.9):
                How much may change, in (0, 1]: the share of the steps that is sampled again. Low values keep the photo's
                colors and layout; 1.0 makes something new from noise.
            mask_padding (`float`, defaults to 0.05):
                What a mask that is found from the strokes grows by, as a share of the photo's longer side.
            crop_margin (`float`, defaults to 0.5):
                How much of the surroundings the model sees, as a share of the mask's longer side. It knows whole garments:
                a close crop of a large photo is sharper but less well understood.
            feather (`float`, defaults to 0.05):
                Width of the border inside the mask over which result and photo are blended, as a share of the part's longer
                side.
            num_resample_steps (`int`, defaults to 3):
                How often each step is taken (RePaint, Lugmayr et al., 2022): more fits the result better to its
                surroundings, and costs as many times more. With 1, `strength` below 1 and `eta=0.0` all results are equal:
                nothing in them is random.
            num_fixed_point_iterations (`int`, defaults to 1):
                Of the inversion; see [`~DiffSketchingPipeline.invert`].
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` and `"pt"` are photos of the given size; `"latent"` is the part in the UNet's own space.

        All other arguments are those of [`DiffSketchingPipeline.__call__`].

        Examples:
            ```python
            >>> from PIL import Image
            >>> from diffsketching_pipeline import DiffSketchingEditPipeline, bundled_checkpoint

            >>> pipe = DiffSketchingEditPipeline.from_pretrained(bundled_checkpoint())
            >>> photo = Image.open("shirt.jpg")
            >>> out = pipe(photo, sketch="new-sleeves.png", class_labels="longsleeve")
            >>> out.images[0].save("shirt.edited.png")
            ```

        Returns:
            [`DiffSketchingPipelineOutput`] or `tuple`: outside of the mask the images equal the photo bit for bit (as RGB,
            or RGBA where it has transparency).

        Raises:
            ValueError: for a photo, mask or drawing that cannot be read or is empty, a mask of another size than the photo,
                a drawing or strokes of color on a page of other proportions or with nothing inside of the mask, a scheduler
                other than [`DDIMScheduler`], and as [`DiffSketchingPipeline.__call__`].
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
            color_hint=color_hint,
            color_guidance_scale=color_guidance_scale,
            sketch_abstraction=sketch_abstraction,
            num_inference_steps=num_inference_steps,
        )
        fractions = {"mask_padding": mask_padding, "crop_margin": crop_margin, "feather": feather}
        self.check_inputs(
            sketch,
            class_labels,
            num_images_per_sketch,
            strength,
            fractions,
            num_resample_steps,
            num_fixed_point_iterations,
            options,
        )
        device = self._execution_device
        num_inference_steps = self.resolve_num_inference_steps(num_inference_steps)
        scheduler = sampling_scheduler(self.scheduler, num_inference_steps, device)
        timesteps = timesteps_from(scheduler, num_inference_steps, strength)
        timesteps_to_walk = timesteps.repeat_interleave(num_resample_steps)
        generators = expand_generator(generator, num_images_per_sketch)

        # 1. Find the part of the photo to work on, and its mask at the model's size
        image = read_photo(image, "`image`")
        mask = self.prepare_mask_image(image, mask_image, sketch, mask_padding)
        region = self.prepare_region(image, mask, crop_margin)
        photo, inside = self.prepare_photo(region)

        # 2. Put strokes and surroundings together, and find the class
        drawing = self.prepare_drawing(region, photo, inside, sketch)
        groups = None if drawing is None else [drawing]
        labels, probabilities = self.prepare_class_labels(class_labels, groups, 1)
        resolved = options.resolve(self, has_sketch=groups is not None, has_class=None not in labels)
        self._last_call = resolved.record
        abstraction = resolved.sketch_abstraction
        condition = self.prepare_conditions(groups, labels, negative_class_labels, None, abstraction)[0]
        conditioning = join_conditions([[(condition, 1.0)]] * num_images_per_sketch)
        colors = self.prepare_part_colors(color_hint, region, inside, groups, num_images_per_sketch)
        callbacks = resolved.guidance_callbacks(colors)
        if sketch is not None:
            warn_if_sketch_is_unused(self, "sketch", callbacks)

        # 3. Invert the photo, which gives the surroundings at every step; under its class only if the network needs one
        needs_class = self.unet.config.num_class_embeds is not None and self.null_class is None
        surroundings = self.prepare_conditions(None, labels if needs_class else [None])[0]
        unguided = join_conditions([[(surroundings, 1.0)]])
        # At each timestep, noisiest first, and at last the photo.
        known = [self.encode_photos(photo)]
        self._invert(
            scheduler,
            timesteps,
            known[0],
            unguided,
            num_fixed_point_iterations,
            lambda latents: known.insert(0, latents),
        )

        # 4. Start from the inverted photo, or inside the mask from noise
        inside = self.prepare_latent_mask(inside)
        step_kwargs = scheduler_step_kwargs(scheduler, resolved.eta, generators)
        latents = known[0].expand(num_images_per_sketch, -1, -1, -1)
        if strength == 1.0:
            latents = torch.where(inside, self.prepare_latents(num_images_per_sketch, generators), latents)

        # 5. Denoise, with the photo around the mask
        def after_step(step_index: int, latents: torch.Tensor) -> torch.Tensor:
            index, repetition = divmod(step_index, num_resample_steps)
            if repetition == num_resample_steps - 1:
                return torch.where(inside, latents, known[index + 1])
            noise = self.prepare_latents(num_images_per_sketch, generators)
            return torch.where(inside, forward_step(scheduler, noise, timesteps[index], latents), known[index])

        latents = self._denoise(
            scheduler, timesteps_to_walk, latents, conditioning, resolved, callbacks, step_kwargs, after_step
        )

        # 6. Put the part back into the photo
        images: Any = latents if output_type == "latent" else self.paste(region, latents, feather, output_type)
        return self._output(images, labels, probabilities, return_dict)

    def paste(self, region: EditedRegion, latents: torch.Tensor, feather: float, output_type: str) -> Any:
        """
        Return the photo with each generated part, x_0 in the UNet's own space, in its place, blended over `feather` of the part's
        longer side inside the mask; bit for bit the photo outside of it.
        """
        parts = self.decode_latents(latents, "pil")
        share = np.clip(region.depth() / max(1.0, feather * max(region.size)), 0, 1)
        share = (share * share * (3 - 2 * share))[..., None]
        left, top, right, bottom = region.box
        photo = np.asarray(region.photo)
        images = []
        for part in parts:
            image = photo.copy()
            old = image[top:bottom, left:right]
            new = np.asarray(part.resize(region.size, Image.Resampling.BICUBIC))
            image[top:bottom, left:right] = np.where(region.crop_mask()[..., None], _blend(old, new, share), old)
            images.append(image)
        if output_type == "pil":
            return [_with_profile(Image.fromarray(image), region.photo) for image in images]
        stacked = np.stack(images).astype(np.float32) / 255
        return stacked if output_type == "np" else torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _blend(old: np.ndarray, new: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`share` of `new`, opaque `[height, width, 3]`, over `old`, which may have transparency as a fourth channel."""
    old = old.astype(np.float32)
    if old.shape[2] == 3:
        return np.rint(old + share * (new - old)).astype(np.uint8)
    colors, opacity = old[..., :3], old[..., 3:] + share * (255 - old[..., 3:])
    # What is transparent has no color that could count.
    share = 255 * share / np.maximum(opacity, 1e-6)
    return np.rint(np.concatenate([colors + share * (new - colors), opacity], axis=2)).astype(np.uint8)


def _with_profile(image: Image.Image, photo: Image.Image) -> Image.Image:
    """The image with the photo's ICC profile, unless that is one of other colors, such as CMYK, than those of the image."""
    profile = photo.info.get("icc_profile")
    if profile and profile[16:20] == b"RGB ":
        image.info["icc_profile"] = profile
    return image


def _check_page(name: str, page: tuple[int, int], photo: tuple[int, int]) -> None:
    if abs(page[0] * photo[1] / (page[1] * photo[0]) - 1) > _ASPECT_TOLERANCE:
        raise ValueError(
            f"`{name}` has to be drawn on the photo's page, of {photo[0]} x {photo[1]} pixels or the same proportions,"
            f" but has {page[0]} x {page[1]}."
        )


def _is_box(mask_image) -> bool:
    return isinstance(mask_image, (list, tuple)) and all(is_number(value) for value in mask_image)


def _mask_of_box(size: tuple[int, int], box: Sequence[float]) -> Image.Image:
    width, height = size
    if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(
            f"`mask_image` as a box has to be (left, top, right, bottom) inside the photo of {width} x {height} pixels but is"
            f" {tuple(box)}."
        )
    mask = Image.new("L", size, 0)
    # Each pixel that it touches: a box between two pixels may not be empty.
    mask.paste(255, (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])))
    return mask


def _centered_interval(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of a length around another, moved to lie within [0, limit], or all of that."""
    length = min(max(length, end - start), limit)
    first = min(max((start + end - length) // 2, 0), limit - length)
    return first, first + length
