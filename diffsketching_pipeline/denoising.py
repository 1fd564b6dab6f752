# SPDX-License-Identifier: Apache-2.0
"""One noise prediction of a network, and the loops that use it: sampling and its inversion.

Everything here works in ε whatever the network predicts, is differentiable (nothing is decorated `no_grad`) and takes
the network as a callable and its configuration separately, so that a wrapped network (DDP, `torch.func.functional_call`) is
called through its wrapper.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.checkpoint import checkpoint

from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.schedulers import (
    MIN_GUIDED_ALPHA_PROD,
    ddim_inverse_step,
    ddim_inverse_step_by_velocity,
    get_alpha_prod,
    scheduler_step,
)


class NoisePrediction(NamedTuple):
    """
    Hold the network's answer at one timestep, in one parametrisation.

    Attributes:
        noise_pred: ε, `[batch_size, channels, height, width]`, consistent with `pred_original_sample`.
        pred_original_sample: x̂_0 of the same shape, clipped if that was asked for.
        variance: the raw learned variance of the same shape, or `None`.
    """

    noise_pred: torch.Tensor
    pred_original_sample: torch.Tensor
    variance: torch.Tensor | None = None


def split_model_output(
    model_output: torch.Tensor, sample: torch.Tensor, alpha_prod: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return (ε, x̂_0) of a network that predicts ε, v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x_0 (Salimans & Ho, 2022) or x_0, at x_t = `sample`.

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
    Return one noise prediction, guided by the drawing without a classifier: ε = ε(∅) + w (ε(s, y) - ε(∅)) (Ho & Salimans, 2022).

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
    Hold which channels a network takes in addition to x_t; see [`get_unet_inputs`].

    Attributes:
        sketch: channels of the folded drawing: f², or 0 for a network that takes none.
        abstraction: 1 for a plane of `sketch_abstraction` after it, or 0.
    """

    sketch: int
    abstraction: int


def get_unet_inputs(in_channels: int, sample_channels: int, scale_factor: int = 1) -> UNetInputs:
    """
    Return what a network with `in_channels` takes: c, c + f² or c + f² + 1 channels, for x_t, the drawing folded by
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
    Return x_t, the folded drawing and the plane of its abstraction, as a network that takes them expects.

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
    Run the sampling loop: predict, step, repeat. Differentiable as it stands, where gradients are recorded.

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


def prepare_noise(
    shape: tuple[int, ...],
    generators: list[torch.Generator],
    device: torch.device,
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return x_T, float32 of `shape` on `device`: `latents` where they are given, else drawn, each image by its own generator.

    Raises:
        ValueError: if `latents` has another shape or is not finite.
    """
    if latents is None:
        return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    if latents.shape != shape:
        raise ValueError(f"`latents` has to have shape {shape} but has {tuple(latents.shape)}.")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("`latents` has a NaN or an infinity.")
    return latents.to(device, torch.float32)


def checkpointed(unet: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return `unet` with its activations recomputed in the backward pass, so that the memory of a chain of any length is that of
    one step and the x_t in between (Chen et al., 2016). Guidance gradients stay outside of what is recomputed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(unet, *args, use_reentrant=False, **kwargs)

    return call


def invert(
    scheduler: DDIMScheduler,
    predict: Callable[[torch.Tensor, torch.Tensor, int], NoisePrediction],
    latents: torch.Tensor,
    timesteps: Sequence[torch.Tensor] | torch.Tensor,
    num_fixed_point_iterations: int = 0,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """
    Invert the DDIM loop: return the noise from which [`denoise`] makes `latents` with the same arguments.

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
        is_noise = float(scheduler.alphas_cumprod[int(timestep)]) < MIN_GUIDED_ALPHA_PROD
        for _ in range(num_fixed_point_iterations + 1):
            prediction = predict(guess, timestep, step_index)
            if is_noise:
                guess = ddim_inverse_step_by_velocity(
                    scheduler, prediction.noise_pred, prediction.pred_original_sample, timestep, latents
                )
            else:
                guess = ddim_inverse_step(scheduler, prediction.noise_pred, timestep, latents)
        latents = guess
        if on_step_end is not None:
            on_step_end(step_index, timestep, latents)
    return latents
