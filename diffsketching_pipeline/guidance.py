# SPDX-License-Identifier: Apache-2.0
"""The guided noise prediction, and guidance as callbacks: each adds its own term before the scheduler steps.

Classifier-free guidance of the drawing and the class is a part of the network's own output, in `denoising.py`. A guidance with an
argument of its own is made of it by [`~pipeline_options.ResolvedOptions`].

[`GuidedPredictor`] is what generating, editing, interpolating, inverting and fine-tuning have in common. A callback follows
diffusers' `PipelineCallback` and composes with `MultiPipelineCallbacks`. It is called as
`callback(pipeline, step_index, timestep, callback_kwargs)` with, among `callback_kwargs`,

- `latents`: x_t, `[batch_size, channels, height, width]`, float32, in the UNet's own space: pixels, or latents of `vae`;
- `noise_pred`, `pred_original_sample`: the base prediction, the same for every callback; attached to `latents` if any
  callback of the call has `through_unet`;
- `alpha_prod`: ᾱ_t, `[1, 1, 1, 1]`;
- `class_labels` `[num_rows]` and `sketch` `[num_rows, 1, height, width]` in pixels, each `None` if there is none; `owner`
  `[num_rows]`, the image that each row belongs to (one has several for several drawings, or a mixture of classes), and
  `row_shares` `[num_rows]`, the share of each row in its image;
- `predictor`: the [`GuidedPredictor`] of the call, which keeps what is computed once per call, holds the components and makes
  photos of x̂_0;
- `noise_pred_delta`: what is added to `noise_pred` in the end. A callback adds its own term to it and returns
  `callback_kwargs`, so that the order of callbacks does not matter.

At a step where x_t is pure noise (ᾱ_t < 1e-6) no callback is called.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import register_to_config
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from diffsketching_pipeline.autoencoding import AutoencoderCall, decode_latents, encode_photos
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import NoisePrediction, predict_noise
from diffsketching_pipeline.deprecation import renamed_arguments, renamed_attributes
from diffsketching_pipeline.images.colors import parse_palette, preprocess_color_strokes
from diffsketching_pipeline.images.edited_region import enclosed_area
from diffsketching_pipeline.losses import (
    SketchFeatureMaps,
    clamp_straight_through,
    feature_distance,
    normalize_features,
)
from diffsketching_pipeline.schedulers import MIN_GUIDED_ALPHA_PROD, get_alpha_prod


# What a callback may ask for; see the head of this file.
GUIDANCE_TENSOR_INPUTS = [
    "latents",
    "noise_pred",
    "pred_original_sample",
    "alpha_prod",
    "class_labels",
    "sketch",
    "owner",
    "row_shares",
    "predictor",
    "noise_pred_delta",
]


@contextmanager
def gradient_mode() -> Iterator[None]:
    """Record gradients, also below `torch.no_grad` and `torch.inference_mode` (whose tensors have to be cloned inside)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check_finite(name: str, value: torch.Tensor, timestep: Any, scale: float | None = None) -> None:
    """
    Raises:
        ValueError: if `value` has a NaN or an infinity; names the timestep, and the scale that was used.
    """
    if not bool(torch.isfinite(value).all()):
        hint = (
            "" if scale is None else f" with scale {scale}: lower the scale, or guide a smaller interval of the steps"
        )
        raise ValueError(f"{name} is not finite at timestep {int(timestep)}{hint}.")


def float32_call(module: nn.Module, device: torch.device | str | None = None) -> Callable[..., Any]:
    """
    Return a callable that computes `module` in float32 without changing it.

    The module itself if it is in float32 already. Otherwise, and where an offloading hook may move the weights away
    between a forward and its backward, float32 copies of its parameters stand in for them. The same where the weights
    were loaded under `torch.inference_mode`, whose tensors autograd refuses.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    hooked = any(hasattr(child, "_hf_hook") for child in module.modules())
    inference = any(x.is_inference() for x in tensors.values())
    float32 = all(x.dtype == torch.float32 for x in tensors.values() if x.is_floating_point())
    if float32 and not hooked and not inference:
        return module
    # The copies are made for autograd, wherever the call stands.
    with torch.inference_mode(False), torch.no_grad():
        copies = {
            name: x.to(device, torch.float32 if x.is_floating_point() else x.dtype, copy=True)
            for name, x in tensors.items()
        }

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, copies, args, kwargs)

    return call


class GuidedPredictor:
    """
    Predict ε and x̂_0 of one network pass, with what each guidance term adds to ε. It lives as long as one call.

    Used under `torch.no_grad` nothing is recorded but what guidance itself differentiates. Where gradients are recorded, the
    base prediction stays attached to the parameters of `unet`, and the guidance terms are constants.

    Args:
        unet: called as `unet(sample, timestep, class_labels, return_dict=False)`; a wrapped one is called through its wrapper.
        unet_config: its config; see [`~denoising.predict_noise`].
        scheduler: owns `alphas_cumprod`, `config.prediction_type` and `config.clip_sample_range`.
        conditioning: classes and drawings of the batch.
        sketch_guidance_scale: w of classifier-free guidance, inside of `interval`; 1.0 is off.
        callbacks: guidance by gradients.
        num_steps: how many steps the call has, of which `interval` and the callbacks' own intervals are fractions.
        interval: between which fractions of the steps `sketch_guidance_scale` is on.
        clip_sample: whether x̂_0 is clamped.
        components: what callbacks need beside `unet`: `classifier`, `sketcher`, `sketch_encoder`, `vae`.
        pipeline: handed to the callbacks.
    """

    def __init__(
        self,
        unet: Callable[..., Any],
        unet_config: Mapping[str, Any],
        scheduler: Any,
        conditioning: Conditioning,
        *,
        sketch_guidance_scale: float = 1.0,
        callbacks: Sequence[PipelineCallback] = (),
        num_steps: int = 1,
        interval: tuple[float, float] = (0.0, 1.0),
        clip_sample: bool = False,
        components: Mapping[str, Any] | None = None,
        pipeline: DiffusionPipeline | None = None,
    ):
        self.unet, self.unet_config, self.scheduler, self.conditioning = unet, unet_config, scheduler, conditioning
        self.sketch_guidance_scale, self.interval, self.clip_sample = sketch_guidance_scale, interval, clip_sample
        self.callbacks, self.num_steps = tuple(callbacks), num_steps
        self.components, self.pipeline = {**(components or {}), "unet": unet}, pipeline
        self._cache: dict[Any, Any] = {}
        self._device: torch.device | None = None

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor | int, step_index: int = 0) -> NoisePrediction:
        """
        Return the guided prediction at x_t = `latents` `[batch_size, channels, height, width]`.

        Raises:
            ValueError: if the prediction or a guidance term has a NaN or an infinity, or a callback replaced `noise_pred`.
        """
        self._device = latents.device
        alpha_prod = get_alpha_prod(self.scheduler, timestep, latents)
        active = self._active_callbacks(alpha_prod, step_index)
        scale = self.sketch_guidance_scale if is_guided_step(step_index, self.num_steps, *self.interval) else 1.0
        if not any(getattr(callback, "through_unet", False) for callback in active):
            base = self._predict(self.unet, latents, timestep, self.conditioning, scale)
        elif torch.is_grad_enabled():
            # Part of a chain that is differentiated, in whose graph x_t is already, but for the first one.
            latents = latents if latents.requires_grad else latents.detach().requires_grad_(True)
            base = self._predict(self.unet, latents, timestep, self.conditioning, scale)
        else:
            with gradient_mode():
                latents = latents.detach().clone().requires_grad_(True)
                base = self._predict(self.float32("unet"), latents, timestep, _cloned(self.conditioning), scale)
        if not active:
            return base
        with torch.no_grad():
            delta = self._noise_delta(active, base, latents, timestep, alpha_prod, step_index)
        noise_pred, pred_original_sample, variance = base
        if not torch.is_grad_enabled():
            noise_pred, pred_original_sample = noise_pred.detach(), pred_original_sample.detach()
            variance = None if variance is None else variance.detach()
        return NoisePrediction(noise_pred + delta, pred_original_sample, variance)

    def _active_callbacks(self, alpha_prod: torch.Tensor, step_index: int) -> list[PipelineCallback]:
        if not self.callbacks or bool((alpha_prod < MIN_GUIDED_ALPHA_PROD).all()):
            return []
        return [
            callback
            for callback in self.callbacks
            if not hasattr(callback, "is_active") or callback.is_active(step_index, self.num_steps)
        ]

    def _predict(
        self,
        unet: Callable[..., Any],
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        conditioning: Conditioning,
        scale: float,
    ) -> NoisePrediction:
        limit = self.scheduler.config.get("clip_sample_range", 1.0)
        told = (self.unet_config, self.scheduler, latents, timestep, conditioning, scale)
        return predict_noise(unet, *told, clip_sample=self.clip_sample, clip_sample_range=limit)

    def _noise_delta(
        self,
        active: list[PipelineCallback],
        base: NoisePrediction,
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_prod: torch.Tensor,
        step_index: int,
    ) -> torch.Tensor:
        """Return the sum of what the callbacks add to ε, detached."""
        conditioning = self.conditioning
        owner, weights = conditioning.owner, conditioning.weights
        if owner is None:
            owner = torch.arange(len(latents), device=latents.device)
        callback_kwargs: dict[str, Any] = {
            "latents": latents,
            "noise_pred": base.noise_pred,
            "pred_original_sample": base.pred_original_sample,
            "alpha_prod": alpha_prod,
            "class_labels": conditioning.class_labels,
            "sketch": conditioning.sketch,
            "owner": owner,
            "row_shares": 1 / torch.bincount(owner)[owner] if weights is None else weights.mean(dim=(1, 2, 3)),
            "predictor": self,
            "noise_pred_delta": torch.zeros_like(latents),
        }
        found = MultiPipelineCallbacks(active)(self.pipeline, step_index, timestep, callback_kwargs)
        if found["noise_pred"] is not base.noise_pred:
            raise ValueError(
                "`guidance_callbacks` has a callback that replaced `noise_pred`, which is the same for every callback: add"
                " its term to `noise_pred_delta` instead."
            )
        return found["noise_pred_delta"].detach()

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return `make()`, kept under `key`: for what a callback would otherwise compute again at each step."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def float32(self, name: str) -> Callable[..., Any]:
        """Return the component `name` as a callable that computes in float32."""
        component = self.components[name]
        if not isinstance(component, nn.Module):
            return component  # what wraps a network that is trained, in float32
        return self.cached(("float32", name), lambda: float32_call(component, self._device))

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        Return what makes photos of x̂_0, in float32 and differentiable: the decoder of `vae`, or without one the identity.
        """
        return self._coder("decoder", decode_latents)

    def encoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the way back of [`~GuidedPredictor.decoder`]."""
        return self._coder("encoder", encode_photos)

    def _coder(self, name: str, function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        vae = self.components.get("vae")
        if vae is None:
            return lambda images: images
        return self.cached(("float32", name), lambda: float32_call(AutoencoderCall(vae, function), self._device))


def _cloned(conditioning: Conditioning) -> Conditioning:
    """Return a copy that autograd accepts, whatever mode its tensors were made in."""
    values = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
    return replace(conditioning, **{name: value.clone() for name, value in values.items() if value is not None})


class GuidanceCallback(PipelineCallback):
    """
    Base of the guidance callbacks: gates by progress, checks for non-finite values, adds its term.

    A subclass implements `noise_delta` and, if it needs the base prediction attached to `latents`, sets `through_unet`.

    Args:
        scale (`float`): size of the term; 0.0 adds nothing.
        guidance_start (`float`, defaults to 0.0): fraction of the steps after which guidance begins.
        guidance_end (`float`, defaults to 1.0): fraction of the steps at which guidance ends.

    Raises:
        ValueError: if the fractions are not `0 <= guidance_start < guidance_end <= 1`.
    """

    tensor_inputs = ["latents", "noise_pred", "pred_original_sample"]
    through_unet = False

    @register_to_config
    def __init__(self, scale: float = 1.0, guidance_start: float = 0.0, guidance_end: float = 1.0):
        super().__init__()
        check_guidance_interval(guidance_start, guidance_end)

    def is_active(self, step_index: int, num_steps: int) -> bool:
        """Return whether this step lies inside the guided interval."""
        return self.config.scale != 0.0 and is_guided_step(
            step_index, num_steps, self.config.guidance_start, self.config.guidance_end
        )

    def noise_delta(
        self, pipeline: DiffusionPipeline | None, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return what this callback adds to ε, of its shape."""
        raise NotImplementedError(f"{type(self).__name__} has to implement `noise_delta`.")

    def callback_fn(
        self, pipeline: DiffusionPipeline | None, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if not self.is_active(step_index, callback_kwargs["predictor"].num_steps):
            return callback_kwargs
        delta = self.noise_delta(pipeline, timestep, callback_kwargs)
        check_finite(f"The gradient of {type(self).__name__}", delta, timestep, self.config.scale)
        return {**callback_kwargs, "noise_pred_delta": callback_kwargs["noise_pred_delta"] + delta}


def check_guidance_interval(guidance_start: float, guidance_end: float) -> None:
    """
    Raises:
        ValueError: if the fractions are not `0 <= guidance_start < guidance_end <= 1`.
    """
    if not 0.0 <= guidance_start < guidance_end <= 1.0:
        raise ValueError(
            "`guidance_start` and `guidance_end` have to be fractions with 0 <= start < end <= 1 but are"
            f" {guidance_start} and {guidance_end}."
        )


def is_guided_step(step_index: int, num_steps: int, guidance_start: float, guidance_end: float) -> bool:
    """Return whether step `step_index` of `num_steps` lies inside the interval, as diffusers' ControlNet pipelines count it."""
    return step_index / num_steps >= guidance_start and (step_index + 1) / num_steps <= guidance_end


def classifier_noise_delta(
    classifier: Callable[..., Any],
    latents: torch.Tensor,
    timestep: torch.Tensor | int,
    class_labels: torch.Tensor,
    alpha_prod: torch.Tensor,
    scale: float,
    owner: torch.Tensor | None = None,
    row_shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return what classifier guidance adds to ε: -w_c sqrt(1-ᾱ_t) ∇_{x_t} log p_φ(y | x_t, t) (eq. 4), detached.

    For a mixture of classes log p_φ is the mean over them, weighted by their shares.

    Args:
        classifier: p_φ, called as `classifier(sample, timestep, return_dict=False)`; returns a tuple of logits.
        latents (`torch.Tensor` of shape `[batch_size, channels, height, width]`): x_t.
        timestep: t.
        class_labels (`torch.LongTensor` of shape `[num_rows]`): y.
        alpha_prod (`torch.Tensor`): ᾱ_t, shaped to broadcast against `latents`.
        scale: w_c.
        owner (`torch.LongTensor` of shape `[num_rows]`, *optional*): the image of each row; row i is image i if left out.
        row_shares (`torch.Tensor` of shape `[num_rows]`, *optional*): weight of each row in its image.
    """
    with gradient_mode():
        sample = latents.detach().clone().requires_grad_(True)
        log_prob = classifier(sample, timestep, return_dict=False)[0].log_softmax(dim=-1)
        if owner is not None:
            log_prob = log_prob[owner.clone()]
        log_prob = log_prob.gather(1, class_labels.clone()[:, None])[:, 0]
        if row_shares is not None:
            log_prob = log_prob * row_shares.clone()
        (gradient,) = torch.autograd.grad(log_prob.sum(), sample)
    return -scale * (1 - alpha_prod).sqrt() * gradient


class ClassifierGuidanceCallback(GuidanceCallback):
    """
    Classifier guidance (eq. 4): ε̂ = ε - w_c sqrt(1-ᾱ_t) ∇_{x_t} log p_φ(y | x_t, t) (Dhariwal & Nichol, 2021).

    Uses the pipeline's `classifier`, which was trained on noisy images, and the class of each image. The gradient is
    computed in float32 whatever the weights.
    """

    def noise_delta(
        self, pipeline: DiffusionPipeline | None, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        return classifier_noise_delta(
            callback_kwargs["predictor"].float32("classifier"),
            callback_kwargs["latents"],
            timestep,
            callback_kwargs["class_labels"],
            callback_kwargs["alpha_prod"],
            self.config.scale,
            callback_kwargs["owner"],
            callback_kwargs["row_shares"],
        )


class SketchGuidanceCallback(GuidanceCallback):
    """
    Guidance by the drawing through the cross-domain constraint: the gradient of L_p(P(x̂_0), s) (eq. 5).

    ε̂ = ε + w_p sqrt(1-ᾱ_t) ‖ε‖ ĝ, where ĝ is ∇_{x_t} L_p(P(clamp(x̂_0)), s) scaled to unit norm per image. With ε held
    fixed dx̂_0/dx_t is 1/sqrt(ᾱ_t), through the network it is not, so the raw sizes differ by orders of magnitude; after
    the normalization `scale` is a fraction of the noise prediction and one value serves both. The clamp passes gradients
    straight through, so that saturated pixels (white backgrounds) can still be drawn on. With a `vae` x̂_0 is decoded, and
    the gradient goes through its decoder.

    Args:
        scale (`float`): w_p; 0.05 to 0.3 is a useful range.
        through_unet (`bool`, defaults to `False`): differentiate x̂_0 through the network (about three times the cost of
            a step) instead of holding ε fixed.
        guidance_start, guidance_end (`float`): fractions of the steps between which guidance is on.
    """

    @register_to_config
    def __init__(
        self, scale: float = 0.1, through_unet: bool = False, guidance_start: float = 0.0, guidance_end: float = 1.0
    ):
        super().__init__(scale=scale, guidance_start=guidance_start, guidance_end=guidance_end)
        self.through_unet = through_unet

    def noise_delta(
        self, pipeline: DiffusionPipeline | None, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        noise_pred = callback_kwargs["noise_pred"].detach()
        gradient = self._perceptual_gradient(callback_kwargs)
        norm = gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        # The smallest normal number leaves a zero gradient (nothing to correct) at zero instead of at 0 / 0.
        direction = gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        size = noise_pred.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return self.config.scale * (1 - callback_kwargs["alpha_prod"]).sqrt() * size * direction

    def _perceptual_gradient(self, callback_kwargs: dict[str, Any]) -> torch.Tensor:
        predictor = callback_kwargs["predictor"]
        sketcher, decode = predictor.float32("sketcher"), predictor.decoder()
        encoder, device = predictor.components["sketch_encoder"], callback_kwargs["latents"].device
        feature_maps = predictor.cached(
            ("float32", "feature_maps"), lambda: float32_call(SketchFeatureMaps(encoder), device)
        )
        target = self._target_features(predictor, feature_maps, callback_kwargs["sketch"])
        original = callback_kwargs["pred_original_sample"]
        with gradient_mode():
            owner = callback_kwargs["owner"].clone()
            if not self.through_unet:
                original = original.detach().clone().requires_grad_(True)
            photos = clamp_straight_through(decode(original))
            features = [x[owner] for x in normalize_features(feature_maps(sketcher(photos)))]
            # Of several drawings of one image, the constraints are averaged as their predictions are.
            loss = (feature_distance(features, target) * callback_kwargs["row_shares"].clone()).sum()
            if self.through_unet:
                return torch.autograd.grad(loss, callback_kwargs["latents"], retain_graph=True)[0]
            gradient = torch.autograd.grad(loss, original)[0]
        return gradient / callback_kwargs["alpha_prod"].sqrt()

    def _target_features(
        self, predictor: GuidedPredictor, feature_maps: Callable[..., Any], sketch: torch.Tensor
    ) -> list[torch.Tensor]:
        def features() -> tuple[torch.Tensor, list[torch.Tensor]]:
            with gradient_mode(), torch.no_grad():
                return sketch, normalize_features(feature_maps(sketch.clone()))

        # The same at every step. Kept together with the drawing, whose `id` is then not given to another.
        return predictor.cached(("sketch_features", id(sketch)), features)[1]


class Colors(NamedTuple):
    """
    Hold what color guidance aims at.

    Attributes:
        candidates: `[num_candidates, 3, height, width]` or `[num_candidates, 3, 1, 1]` in [-1, 1]; each pixel is drawn
            towards the nearest of them.
        mask: how far each pixel is guided, `[batch_size or 1, 1, height, width]` in [0, 1].
    """

    candidates: torch.Tensor
    mask: torch.Tensor


class ColorGuidanceCallback(GuidanceCallback):
    """
    Guidance by color: the low frequencies of x̂_0 are drawn towards given colors, which leaves shape and texture.

    x̂_0 becomes x̂_0 + w m B(m (c - x̂_0)) / B(m) with B a Gaussian blur, m the mask and c the nearest of the candidate
    colors, which is ε̂ = ε - sqrt(ᾱ_t / (1-ᾱ_t)) times that change (compare ILVR, Choi et al., 2021).

    With a `vae` that is done to the decoded photo D(x̂_0), and x̂_0 changes by E(recolored) - E(D(x̂_0)): what the way
    there and back loses cancels, and a scale of 1.0 means the same as in pixels. A gradient through the decoder would need
    several steps to get as far.

    Args:
        colors ([`Colors`]): on the device that is sampled on.
        scale (`float`, defaults to 0.5): w; 1.0 replaces the low frequencies.
        guidance_start, guidance_end (`float`): fractions of the steps between which guidance is on.
    """

    @renamed_arguments(colours="colors")
    def __init__(self, colors: Colors, scale: float = 0.5, guidance_start: float = 0.0, guidance_end: float = 1.0):
        super().__init__(scale=scale, guidance_start=guidance_start, guidance_end=guidance_end)
        self.colors = colors

    def noise_delta(
        self, pipeline: DiffusionPipeline | None, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        original = callback_kwargs["pred_original_sample"].detach()
        alpha_prod = callback_kwargs["alpha_prod"]
        factor = -(alpha_prod / (1 - alpha_prod)).sqrt()
        predictor = callback_kwargs["predictor"]
        if predictor.components.get("vae") is None:
            return self.config.scale * factor * self._pixel_change(original)
        encode = predictor.encoder()
        photos = predictor.decoder()(original).clamp(-1, 1)
        recolored = (photos + self.config.scale * self._pixel_change(photos)).clamp(-1, 1)
        return factor * (encode(recolored) - encode(photos))

    def _pixel_change(self, original: torch.Tensor) -> torch.Tensor:
        """Return what takes photos `[batch_size, 3, height, width]` all the way to the colors."""
        candidates, mask = self.colors
        # Of the candidates the nearest to the blurred color, so that a fold or a print does not switch between them.
        distances = (blur(original)[:, None] - candidates).square().sum(dim=2)
        nearest = distances.argmin(dim=1)[:, None, None].expand(-1, -1, 3, -1, -1)
        target = candidates.expand(len(original), -1, -1, *original.shape[2:]).gather(1, nearest)[:, 0]
        return mask * blur(mask * (target - original)) / blur(mask).clamp_min(1e-3)


def read_colors(
    color_hint: Any,
    groups: Sequence[torch.Tensor] | None,
    num_images: int,
    size: tuple[int, int],
    device: torch.device | str,
    box: tuple[float, float, float, float] | None = None,
    inside: torch.Tensor | None = None,
) -> Colors | None:
    """
    Read what [`ColorGuidanceCallback`] aims at, from coarse strokes or a palette.

    Args:
        color_hint: as for the call; `None` for none.
        groups: the drawings of each result, `[K_i, 1, height, width]`, for a palette.
        num_images: how many images are made of each result.
        size: height and width of photos in pixels.
        device: of what is returned.
        box: part of a page of strokes that is stretched to `size`; see [`~images.colors.preprocess_color_strokes`].
        inside: bool `[1, 1, height, width]`, where colors are guided; everywhere if left out.

    Raises:
        ValueError: for a hint that cannot be read or is empty, strokes with none inside, or a palette without a drawing.
    """
    if color_hint is None:
        return None
    palette = parse_palette(color_hint)
    if palette is None:
        strokes = preprocess_color_strokes(color_hint, *size, box)
        candidates, cover = (layer[None].to(device) for layer in strokes)
        if inside is not None and not bool((cover > 0)[inside].any()):
            raise ValueError(
                "`color_hint` has no stroke inside of what may change: paint there, or enlarge `mask_image`."
            )
        mask = blur(cover)
    elif groups is None:
        raise ValueError("`color_hint` is a palette, which colors what a drawing encloses: give a `sketch`.")
    else:
        candidates = palette.to(device)
        mask = torch.stack([enclosed_area(group) for group in groups]).repeat_interleave(num_images, dim=0)
        mask = mask.to(device)
    return Colors(candidates, mask if inside is None else mask * inside)


def blur(images: torch.Tensor) -> torch.Tensor:
    """Return images `[batch_size, channels, height, width]` without what is smaller than about a tenth of the longer side."""
    sigma = max(images.shape[-2:]) / 16
    size = 2 * math.ceil(2 * sigma) + 1
    return gaussian_blur(images, [size, size], [sigma, sigma])


__getattr__ = renamed_attributes(
    __name__, ColourGuidanceCallback="ColorGuidanceCallback", Colours="Colors", read_colours="read_colors"
)
