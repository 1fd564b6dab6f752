# SPDX-License-Identifier: Apache-2.0
"""The guided noise prediction and the sampling loop: the one idea that generating, editing and training share.

Everything here works in ε whatever the network predicts, is differentiable (nothing is decorated `no_grad`) and takes
the network as a callable beside its configuration, so that a wrapped network (DDP, `torch.func.functional_call`) is
called through its wrapper.
"""

import copy
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.utils.checkpoint import checkpoint


SUPPORTED_SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
)
# These two compute the previous timestep as `t - num_train_timesteps // num_inference_steps`, whatever the spacing.
_FIXED_STRIDE_SCHEDULERS = (DDIMScheduler, PNDMScheduler)
_SIGMA_OPTIONS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "use_lu_lambdas",
)
_LEARNED_VARIANCE = ("learned", "learned_range")
# Below this ᾱ_t (the last timestep of a cosine schedule) a change of ε moves x̂_0 by more than a thousand times itself,
# so that the gradient of anything explodes there, and ε says next to nothing about x_0.
_MIN_GUIDED_ALPHA_PROD = 1e-6


@dataclass
class Conditioning:
    """
    What the network is told about each of the `batch_size` images of a batch.

    One prediction is made per row, and those of an image are averaged: a row is one of several drawings of an image, one
    class of a mixture, or one end of an interpolation.

    Args:
        class_labels (`torch.LongTensor` of shape `[num_rows]`, *optional*):
            Class index of each row; `None` for a network without classes.
        sketch (`torch.Tensor` of shape `[num_rows, 1, height, width]`, *optional*):
            Drawing of each row in pixels, -1 = stroke and +1 = paper; `None` for no drawing.
        owner (`torch.LongTensor` of shape `[num_rows]`, *optional*):
            Index of the image that each row belongs to, in any order; every image owns at least one. `None` when row `i`
            belongs to image `i`.
        null_class_labels (`torch.LongTensor` of shape `[batch_size]`, *optional*):
            What classifier-free guidance puts in the place of `class_labels` where it withholds the drawing: the index
            of "no class", so that it strengthens both, or of a class to move away from. `None` for a network without
            it: the class then stays.
        weights (`torch.Tensor` of shape `[num_rows, 1, 1, 1]` or `[num_rows, 1, height, width]`, *optional*):
            Share of each row in its image's prediction, at each place of x_t maybe; those of an image sum to 1. `None` for
            equal shares.
        sketch_abstraction (`torch.Tensor` of shape `[num_rows]`, *optional*):
            How far each drawing may be off, in [0, 1]: 0 is to be traced, 1 to be understood. `None` for 0; a network
            without a plane for it ignores it.
    """

    class_labels: torch.Tensor | None = None
    sketch: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    null_class_labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    sketch_abstraction: torch.Tensor | None = None


class NoisePrediction(NamedTuple):
    """
    The network's answer at one timestep, in one parametrisation.

    Attributes:
        noise_pred: ε, `[batch_size, channels, height, width]`, consistent with `pred_original_sample`.
        pred_original_sample: x̂_0 of the same shape, clipped if that was asked for.
        variance: the raw learned variance of the same shape, or `None`.
    """

    noise_pred: torch.Tensor
    pred_original_sample: torch.Tensor
    variance: torch.Tensor | None = None


def get_alpha_prod(scheduler: Any, timestep: torch.Tensor | int, sample: torch.Tensor) -> torch.Tensor:
    """ᾱ_t in float32, shaped to broadcast against `sample` `[batch_size, channels, height, width]`."""
    return scheduler.alphas_cumprod.to(sample.device, torch.float32)[timestep].reshape(-1, 1, 1, 1)


def split_model_output(
    model_output: torch.Tensor, sample: torch.Tensor, alpha_prod: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (ε, x̂_0) of a network that predicts ε, v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x_0 (Salimans & Ho, 2022) or x_0, at x_t = `sample`.

    Raises:
        ValueError: if `prediction_type` is not `"epsilon"`, `"v_prediction"` or `"sample"`.
    """
    sqrt_alpha, sqrt_beta = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    if prediction_type == "epsilon":
        return model_output, (sample - sqrt_beta * model_output) / sqrt_alpha
    if prediction_type == "v_prediction":
        return sqrt_alpha * model_output + sqrt_beta * sample, sqrt_alpha * sample - sqrt_beta * model_output
    if prediction_type == "sample":
        return (sample - sqrt_alpha * model_output) / sqrt_beta, model_output
    raise ValueError(
        f"`prediction_type` of the scheduler has to be 'epsilon', 'v_prediction' or 'sample' but is {prediction_type!r}."
    )


def predict_noise(
    unet: Callable[..., Any],
    unet_config: Mapping[str, Any],
    scheduler: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor | int,
    conditioning: Conditioning,
    sketch_guidance_scale: float = 1.0,
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
) -> NoisePrediction:
    """
    One noise prediction, guided by the drawing without a classifier: ε = ε(∅) + w (ε(s, y) - ε(∅)) (Ho & Salimans, 2022).

    ∅ is no drawing and, where the network knows "no class", no class either. Both predictions, and those of all rows of
    an image, come from one batched forward. x̂_0 is clipped if asked, and ε is always re-derived from the clipped x̂_0, as
    guided-diffusion does before it adds guidance.

    Args:
        unet: called as `unet(sample, timestep, class_labels, return_dict=False)`; returns a tuple.
        unet_config: `in_channels` (see [`get_unet_inputs`]) and `num_class_embeds` (`None`: class labels are for the
            classifier only). Twice as many output channels as x_t has are a prediction and a learned variance.
        scheduler: owns `alphas_cumprod` and `config.prediction_type`.
        latents (`torch.Tensor` of shape `[batch_size, channels, height, width]`): x_t in float32, in pixels (3 channels)
            or in the latents of an autoencoder.
        timestep: one timestep, or one per image.
        conditioning: class labels and drawings; drawings are ignored by a network that takes x_t alone.
        sketch_guidance_scale: w; 1.0 is plain conditional prediction and costs no second pass.
        clip_sample: whether x̂_0 is clamped to ± `clip_sample_range`.

    Raises:
        ValueError: if the network's output has a NaN or an infinity; names the timestep and the scale.
    """
    model_output = _guided_model_output(unet, unet_config, latents, timestep, conditioning, sketch_guidance_scale)
    # Before x̂_0 is clipped, which would turn an infinity into a plausible value.
    if not bool(torch.isfinite(model_output).all()):
        raise ValueError(
            f"The noise prediction is not finite at timestep {torch.as_tensor(timestep).tolist()} with"
            f" `sketch_guidance_scale={sketch_guidance_scale}`: lower the scale, or use float32 or bfloat16 weights."
        )
    channels = latents.shape[1]
    model_output, variance = model_output[:, :channels], model_output[:, channels:]

    alpha_prod = get_alpha_prod(scheduler, timestep, latents)
    noise_pred, pred_original_sample = split_model_output(
        model_output, latents, alpha_prod, scheduler.config.prediction_type
    )
    if clip_sample:
        pred_original_sample = pred_original_sample.clamp(-clip_sample_range, clip_sample_range)
        noise_pred = (latents - alpha_prod.sqrt() * pred_original_sample) / (1 - alpha_prod).sqrt()
    return NoisePrediction(noise_pred, pred_original_sample, variance if variance.shape[1] else None)


def _guided_model_output(
    unet: Callable[..., Any],
    unet_config: Mapping[str, Any],
    latents: torch.Tensor,
    timestep: torch.Tensor | int,
    conditioning: Conditioning,
    sketch_guidance_scale: float,
) -> torch.Tensor:
    # ε, v and x_0 are linear in one another at a fixed x_t, so averaging and extrapolating the raw output is the same
    # as doing it in ε, and needs one conversion instead of several.
    labels, owner, weights = conditioning.class_labels, conditioning.owner, conditioning.weights
    if unet_config["num_class_embeds"] is None:
        labels = None
    in_channels = unet_config["in_channels"]
    sketch = conditioning.sketch if in_channels != latents.shape[1] else None
    if sketch is None and owner is not None:
        labels, owner, weights = _merge_equal_rows(labels, owner, weights)

    rows = torch.arange(len(latents), device=latents.device) if owner is None else owner
    sample = latents if owner is None else latents[rows]
    abstraction = 0.0 if conditioning.sketch_abstraction is None else conditioning.sketch_abstraction
    sample = join_unet_inputs(sample, in_channels, sketch, abstraction)
    if sketch is None or sketch_guidance_scale == 1.0:
        output = _call_unet(unet, sample, _pick(timestep, rows), labels)
        return _average_by_owner(output, owner, weights, latents)

    # Without "no class" each row keeps its class, and only the drawing is withheld.
    null_labels = conditioning.null_class_labels
    keeps_class = labels is not None and null_labels is None
    null_owner = owner if keeps_class else None
    null_rows = rows if keeps_class else torch.arange(len(latents), device=latents.device)
    null = join_unet_inputs(latents[null_rows], in_channels)
    if labels is not None:
        labels = torch.cat([labels, labels if null_labels is None else null_labels])
    timestep = _pick(timestep, torch.cat([rows, null_rows]))
    output = _call_unet(unet, torch.cat([sample, null]), timestep, labels)
    conditional, unconditional = output.split([len(sample), len(null)])
    conditional = _average_by_owner(conditional, owner, weights, latents)
    unconditional = _average_by_owner(unconditional, null_owner, weights, latents)
    guided = unconditional + sketch_guidance_scale * (conditional - unconditional)
    # A variance is not a direction: extrapolating it has no meaning.
    channels = latents.shape[1]
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def _merge_equal_rows(
    labels: torch.Tensor | None, owner: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Class, owner and weight of the rows of a network that takes no drawing: those that differ in nothing else are one."""
    if labels is None:
        return None, None, None
    rows, index = torch.unique(torch.stack([owner, labels], dim=1), dim=0, return_inverse=True)
    if weights is None:
        weights = (1 / torch.bincount(owner)[owner]).reshape(-1, 1, 1, 1)
    weights = weights.new_zeros(len(rows), *weights.shape[1:]).index_add(0, index, weights)
    return rows[:, 1], rows[:, 0], weights


class UNetInputs(NamedTuple):
    """
    Which channels a network takes beside x_t; see [`get_unet_inputs`].

    Attributes:
        sketch: channels of the folded drawing: f², or 0 for a network that takes none.
        abstraction: 1 for a plane of `sketch_abstraction` after it, or 0.
    """

    sketch: int
    abstraction: int


def get_unet_inputs(in_channels: int, sample_channels: int, scale_factor: int = 1) -> UNetInputs:
    """
    What a network with `in_channels` takes: c, c + f² or c + f² + 1 channels, for x_t, the drawing folded by
    `pixel_unshuffle(f)`, and one constant plane for how far the drawing may be off.

    Args:
        in_channels: the network's.
        sample_channels: c, those of x_t: 3, or the latent channels of an autoencoder.
        scale_factor: f, pixels per latent along a side; 1 without an autoencoder.

    Raises:
        ValueError: for any other number of channels.
    """
    folded = scale_factor**2
    for inputs in (UNetInputs(0, 0), UNetInputs(folded, 0), UNetInputs(folded, 1)):
        if in_channels == sample_channels + sum(inputs):
            return inputs
    raise ValueError(
        f"`unet` must have {sample_channels} input channels (x_t), {sample_channels + folded} (with the drawing) or"
        f" {sample_channels + folded + 1} (with a plane for `sketch_abstraction`), but got `in_channels={in_channels}`."
    )


def join_unet_inputs(
    sample: torch.Tensor,
    in_channels: int,
    sketch: torch.Tensor | None = None,
    sketch_abstraction: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """
    x_t, the folded drawing and the plane of its abstraction, as a network that takes them expects.

    Args:
        sample (`torch.Tensor` of shape `[batch_size, c, height, width]`): x_t.
        in_channels: the network's; see [`get_unet_inputs`].
        sketch (`torch.Tensor` of shape `[batch_size, 1, f * height, f * width]`, *optional*):
            -1 = stroke, +1 = paper; 0 everywhere, as `None`, is no drawing.
        sketch_abstraction (`float` or `torch.Tensor` of shape `[batch_size]`): in [0, 1], from traced to meant.
    """
    others = in_channels - sample.shape[1]
    if sketch is None or others == 0:
        return torch.cat([sample, sample.new_zeros(len(sample), others, *sample.shape[2:])], dim=1)
    folded = F.pixel_unshuffle(sketch.to(sample), sketch.shape[-1] // sample.shape[-1])
    if folded.shape[1] == others:
        return torch.cat([sample, folded], dim=1)
    abstraction = torch.as_tensor(sketch_abstraction, dtype=sample.dtype, device=sample.device).reshape(-1, 1, 1, 1)
    # No drawing has no abstraction either: one null for all.
    drawn = (sketch != 0).flatten(1).any(dim=1).reshape(-1, 1, 1, 1)
    plane = (abstraction * drawn).expand(len(sample), 1, *sample.shape[2:])
    return torch.cat([sample, folded, plane], dim=1)


def _pick(values: Any, rows: torch.Tensor) -> Any:
    return values[rows] if torch.is_tensor(values) and values.ndim > 0 else values


def _call_unet(
    unet: Callable[..., Any], sample: torch.Tensor, timestep: torch.Tensor | int, class_labels: torch.Tensor | None
) -> torch.Tensor:
    dtype = getattr(unet, "dtype", sample.dtype)
    return unet(sample.to(dtype), timestep, class_labels, return_dict=False)[0].float()


def _average_by_owner(
    values: torch.Tensor, owner: torch.Tensor | None, weights: torch.Tensor | None, latents: torch.Tensor
) -> torch.Tensor:
    if owner is None:
        return values
    total = values.new_zeros(len(latents), *values.shape[1:])
    if weights is not None:
        return total.index_add(0, owner, values * weights.to(values))
    count = torch.bincount(owner, minlength=len(latents))
    return total.index_add(0, owner, values) / count.reshape(-1, 1, 1, 1)


def check_scheduler(scheduler: Any, num_inference_steps: int) -> None:
    """
    Refuse a scheduler whose timesteps this package would misread.

    Raises:
        ValueError: for a class outside `SUPPORTED_SCHEDULERS`, a noise schedule in sigma space, dynamic thresholding,
            a schedule that ends in pure noise (ᾱ = 0), a timestep spacing that the scheduler itself mis-steps on, or a
            number of steps outside `[1, num_train_timesteps]`.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SUPPORTED_SCHEDULERS):
        supported = ", ".join(cls.__name__ for cls in SUPPORTED_SCHEDULERS)
        raise ValueError(f"`scheduler` has to be one of {supported} but is {name}.")
    config = scheduler.config
    for option in _SIGMA_OPTIONS:
        if config.get(option):
            raise ValueError(f"`scheduler.config.{option}` is not supported: load the {name} with `{option}=False`.")
    if config.get("thresholding"):
        raise ValueError(
            f"`scheduler.config.thresholding` is not supported: load the {name} with `thresholding=False`."
        )
    if float(scheduler.alphas_cumprod[-1]) <= 0:
        raise ValueError(
            "`scheduler` has ᾱ = 0 at its last timestep, where x_0 cannot be computed from ε: load it with"
            " `rescale_betas_zero_snr=False`."
        )
    num_train_timesteps = config.num_train_timesteps
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, numbers.Integral):
        raise ValueError(f"`num_inference_steps` has to be an integer but is {num_inference_steps!r}.")
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` has to be between 1 and {num_train_timesteps} but is {num_inference_steps}."
        )
    if isinstance(scheduler, _FIXED_STRIDE_SCHEDULERS):
        spacing = config.timestep_spacing
        if spacing == "linspace" or (spacing == "trailing" and num_train_timesteps % num_inference_steps):
            raise ValueError(
                f"{name} mis-steps with `timestep_spacing={spacing!r}` and `num_inference_steps={num_inference_steps}`:"
                f" use 'leading' spacing, or 'trailing' with a number of steps that divides {num_train_timesteps}."
            )
    if isinstance(scheduler, PNDMScheduler) and not config.skip_prk_steps and num_inference_steps < 4:
        raise ValueError(
            f"`num_inference_steps={num_inference_steps}` is too few for the Runge-Kutta steps of {name}: use at least 4, or"
            " load it with `skip_prk_steps=True`."
        )


def sampling_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device | str | None = None) -> Any:
    """
    A copy of `scheduler` for one call, with its timesteps set, that steps from an ε which is already clipped and guided.

    The copy keeps the noise schedule and the spacing, and does not clip again. The scheduler given is not changed.
    """
    check_scheduler(scheduler, num_inference_steps)
    scheduler = copy.deepcopy(scheduler)
    overrides = {"prediction_type": "epsilon", "clip_sample": False}
    scheduler.register_to_config(**{key: value for key, value in overrides.items() if key in scheduler.config})
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler


def scheduler_step_kwargs(
    scheduler: Any, eta: float, generator: Sequence[torch.Generator] | torch.Generator | None
) -> dict[str, Any]:
    """
    The arguments among `eta` and `generator` that this scheduler's `step` accepts.

    Raises:
        ValueError: if `eta` is not 0 and the scheduler has no such parameter.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if eta != 0.0 and "eta" not in accepted:
        raise ValueError(f"`eta={eta}` needs a DDIMScheduler: {type(scheduler).__name__} has no `eta`.")
    kwargs: dict[str, Any] = {"eta": eta} if "eta" in accepted else {}
    if "generator" in accepted:
        kwargs["generator"] = generator
    return kwargs


def scheduler_step(
    scheduler: Any,
    noise_pred: torch.Tensor,
    timestep: torch.Tensor | int,
    latents: torch.Tensor,
    variance: torch.Tensor | None = None,
    **step_kwargs: Any,
) -> torch.Tensor:
    """x_{t-1} from x_t and the final ε, for a scheduler made by [`sampling_scheduler`] (eq. 3 for DDIM with η = 0)."""
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in _LEARNED_VARIANCE:
        if variance is None:
            raise ValueError(
                f"`scheduler.config.variance_type={scheduler.config.variance_type!r}` needs a network that predicts its"
                " variance: use 'fixed_small' or 'fixed_large' with this one."
            )
        noise_pred = torch.cat([noise_pred, variance], dim=1)
    return scheduler.step(noise_pred, timestep, latents, **step_kwargs).prev_sample


def denoise(
    scheduler: Any,
    predict: Callable[[torch.Tensor, torch.Tensor, int], NoisePrediction],
    latents: torch.Tensor,
    timesteps: Sequence[torch.Tensor] | torch.Tensor,
    step_kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor, NoisePrediction], tuple[torch.Tensor, bool]] | None = None,
    truncate_backprop_steps: int | None = None,
) -> torch.Tensor:
    """
    The sampling loop: predict, step, repeat. Differentiable as it stands, where gradients are recorded.

    Args:
        scheduler: made by [`sampling_scheduler`].
        predict: `predict(latents, timestep, step_index)` returns the final (guided) [`NoisePrediction`].
        latents (`torch.Tensor` of shape `[batch_size, channels, height, width]`): x at `timesteps[0]`.
        timesteps: the timesteps still to go, in descending order.
        step_kwargs: passed to the scheduler's `step`, or what makes them for each step; see [`scheduler_step_kwargs`].
        on_step_end: `on_step_end(step_index, timestep, latents, prediction)` after each step; returns the latents to go
            on with, and whether to go on.
        truncate_backprop_steps: if given, gradients are recorded in this many last steps only (DRaFT-K, Clark et al.,
            2024); the steps before them cost no memory.

    Returns:
        `torch.Tensor`: x_0, unclipped.
    """
    first_recorded = 0 if truncate_backprop_steps is None else len(timesteps) - truncate_backprop_steps
    for step_index, timestep in enumerate(timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step_index >= first_recorded):
            prediction = predict(latents, timestep, step_index)
            kwargs = step_kwargs() if callable(step_kwargs) else step_kwargs or {}
            latents = scheduler_step(
                scheduler, prediction.noise_pred, timestep, latents, prediction.variance, **kwargs
            )
        if on_step_end is not None:
            latents, proceed = on_step_end(step_index, timestep, latents, prediction)
            if not proceed:
                break
    return latents


def checkpointed(unet: Callable[..., Any]) -> Callable[..., Any]:
    """
    `unet` with its activations recomputed in the backward pass, so that the memory of a chain of any length is that of
    one step and the x_t in between (Chen et al., 2016). Guidance gradients stay outside of what is recomputed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(unet, *args, use_reentrant=False, **kwargs)

    return call


def ddim_inverse_step(
    scheduler: DDIMScheduler, noise_pred: torch.Tensor, timestep: torch.Tensor | int, latents: torch.Tensor
) -> torch.Tensor:
    """
    x_t from x_{t-1} = `latents` and ε: the DDIM step (eq. 3) solved for its other end.

    `timestep` is t, the noisier end, for a scheduler made by [`sampling_scheduler`].
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    pred_original_sample = (latents - (1 - alpha_prod_prev).sqrt() * noise_pred) / alpha_prod_prev.sqrt()
    return alpha_prod.sqrt() * pred_original_sample + (1 - alpha_prod).sqrt() * noise_pred


def _ddim_inverse_step_by_velocity(
    scheduler: DDIMScheduler, prediction: NoisePrediction, timestep: torch.Tensor | int, latents: torch.Tensor
) -> torch.Tensor:
    """
    [`ddim_inverse_step`] with v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x̂_0 held fixed in the place of ε: a DDIM step is a rotation by an
    angle δ, x_{t-1} = cos δ x_t - sin δ v.
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    sqrt_alpha, sqrt_beta = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    velocity = sqrt_alpha * prediction.noise_pred - sqrt_beta * prediction.pred_original_sample
    sine = sqrt_beta * alpha_prod_prev.sqrt() - sqrt_alpha * (1 - alpha_prod_prev).sqrt()
    cosine = sqrt_alpha * alpha_prod_prev.sqrt() + sqrt_beta * (1 - alpha_prod_prev).sqrt()
    return (latents + sine * velocity) / cosine


def forward_step(
    scheduler: DDIMScheduler, noise: torch.Tensor, timestep: torch.Tensor | int, latents: torch.Tensor
) -> torch.Tensor:
    """
    x_t from x_{t-1} = `latents` and fresh `noise`: a draw from q(x_t | x_{t-1}), which undoes a step at random (RePaint,
    Lugmayr et al., 2022).

    `timestep` is t, the noisier end, for a scheduler made by [`sampling_scheduler`].
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    ratio = alpha_prod / alpha_prod_prev
    return ratio.sqrt() * latents + (1 - ratio).sqrt() * noise


def _step_alpha_prods(scheduler: DDIMScheduler, timestep: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """ᾱ at both ends of the step from `timestep`."""
    timestep = int(timestep)
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_prod_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    return scheduler.alphas_cumprod[timestep], alpha_prod_prev


def invert(
    scheduler: DDIMScheduler,
    predict: Callable[[torch.Tensor, torch.Tensor, int], NoisePrediction],
    latents: torch.Tensor,
    timesteps: Sequence[torch.Tensor] | torch.Tensor,
    num_fixed_point_iterations: int = 0,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """
    DDIM inversion: the noise from which [`denoise`] makes `latents` with the same arguments.

    The DDIM step that led to x_{t-1} used ε(x_t, t), which is not known before x_t is. Textbook inversion takes
    ε(x_{t-1}, t) instead, and is off by the step's curvature. x_t is the fixed point of x = g(x_{t-1}, ε(x, t)), with g
    the inverse step; each iteration evaluates ε at the last guess of x_t. Where x_t is pure noise (the last step of a cosine
    schedule with trailing spacing) ε is x_t itself, whose iteration would stand still: there v is what is evaluated.

    Args:
        scheduler: a `DDIMScheduler` made by [`sampling_scheduler`].
        predict: as for [`denoise`]; it must not clip x̂_0, or what it clips is lost.
        latents (`torch.Tensor` of shape `[batch_size, channels, height, width]`): x_0.
        timesteps: those of sampling, in descending order.
        num_fixed_point_iterations: evaluations of ε per step beyond the first; 0 is the textbook method.
        on_step_end: `on_step_end(step_index, timestep, latents)` after each step, from the last of sampling to the first.

    Returns:
        `torch.Tensor`: x at `timesteps[0]`.
    """
    for step_index in reversed(range(len(timesteps))):
        timestep, guess = timesteps[step_index], latents
        is_noise = float(scheduler.alphas_cumprod[int(timestep)]) < _MIN_GUIDED_ALPHA_PROD
        for _ in range(num_fixed_point_iterations + 1):
            prediction = predict(guess, timestep, step_index)
            if is_noise:
                guess = _ddim_inverse_step_by_velocity(scheduler, prediction, timestep, latents)
            else:
                guess = ddim_inverse_step(scheduler, prediction.noise_pred, timestep, latents)
        latents = guess
        if on_step_end is not None:
            on_step_end(step_index, timestep, latents)
    return latents
