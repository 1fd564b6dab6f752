# SPDX-License-Identifier: Apache-2.0
"""The schedulers of diffusers that are accepted here, and their steps: forward in time, backward, and at random."""

import copy
import inspect
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffsketching_pipeline.images.reading import is_number
from diffsketching_pipeline.messages import brief


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
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
_LEARNED_VARIANCE = ("learned", "learned_range")
# Below this ᾱ_t (the last timestep of a cosine schedule) a change of ε moves x̂_0 by more than a thousand times itself,
# so that the gradient of anything explodes there, and ε says next to nothing about x_0.
MIN_GUIDED_ALPHA_PROD = 1e-6


def get_alpha_prod(scheduler: Any, timestep: torch.Tensor | int, sample: torch.Tensor) -> torch.Tensor:
    """Return ᾱ_t in float32, shaped to broadcast against `sample` `[batch_size, channels, height, width]`."""
    return scheduler.alphas_cumprod.to(sample.device, torch.float32)[timestep].reshape(-1, 1, 1, 1)


def check_scheduler_values(scheduler: Any, where: str) -> None:
    """
    Refuse settings of a scheduler from a file that its constructor takes and that mean nothing, whatever the call.

    Args:
        scheduler: of `SUPPORTED_SCHEDULERS`.
        where: the file, for errors.

    Raises:
        ValueError: for a setting of another type, out of range or not among those there are.
    """
    config, alphas = scheduler.config, scheduler.alphas_cumprod
    steps, offset = config.num_train_timesteps, config.get("steps_offset", 0)
    clip_range = config.get("clip_sample_range", 1.0)
    checks = {
        "prediction_type": config.prediction_type in _PREDICTION_TYPES,
        "timestep_spacing": config.timestep_spacing in _TIMESTEP_SPACINGS,
        "num_train_timesteps": is_number(steps, numbers.Integral) and len(alphas) == steps,
        "steps_offset": is_number(offset, numbers.Integral) and 0 <= offset < len(alphas),
        "clip_sample_range": is_number(clip_range) and clip_range > 0,
        "beta_schedule": bool(((alphas >= 0) & (alphas <= 1)).all()),
    }
    for name, is_right in checks.items():
        if not is_right:
            raise ValueError(
                f"{where} has the {name} {brief(repr(config.get(name)))}, with which nothing can be sampled."
            )


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
    Return a copy of `scheduler` for one call, with its timesteps set, that steps from an ε which is already clipped and guided.

    The copy keeps the noise schedule and the spacing, and does not clip again. The scheduler given is not changed.
    """
    check_scheduler(scheduler, num_inference_steps)
    scheduler = copy.deepcopy(scheduler)
    overrides = {"prediction_type": "epsilon", "clip_sample": False}
    scheduler.register_to_config(**{key: value for key, value in overrides.items() if key in scheduler.config})
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler


def timesteps_from(scheduler: Any, num_inference_steps: int, strength: float) -> torch.Tensor:
    """
    Return the timesteps left to go when sampling starts at `strength`; all of them at 1.0.

    Args:
        scheduler: made by [`sampling_scheduler`] for `num_inference_steps`; told where it begins.
        strength: in (0, 1], the share of the steps that is taken.

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


def scheduler_step_kwargs(
    scheduler: Any, eta: float, generator: Sequence[torch.Generator] | torch.Generator | None
) -> dict[str, Any]:
    """
    Return the arguments among `eta` and `generator` that this scheduler's `step` accepts.

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
    """Return x_{t-1} from x_t and the final ε, for a scheduler made by [`sampling_scheduler`] (eq. 3 for DDIM with η = 0)."""
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in _LEARNED_VARIANCE:
        if variance is None:
            raise ValueError(
                f"`scheduler.config.variance_type={scheduler.config.variance_type!r}` needs a network that predicts its"
                " variance: use 'fixed_small' or 'fixed_large' with this one."
            )
        noise_pred = torch.cat([noise_pred, variance], dim=1)
    return scheduler.step(noise_pred, timestep, latents, **step_kwargs).prev_sample


def ddim_inverse_step(
    scheduler: DDIMScheduler, noise_pred: torch.Tensor, timestep: torch.Tensor | int, latents: torch.Tensor
) -> torch.Tensor:
    """
    Return x_t from x_{t-1} = `latents` and ε: the DDIM step (eq. 3) solved for its other end.

    `timestep` is t, the noisier end, for a scheduler made by [`sampling_scheduler`].
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    pred_original_sample = (latents - (1 - alpha_prod_prev).sqrt() * noise_pred) / alpha_prod_prev.sqrt()
    return alpha_prod.sqrt() * pred_original_sample + (1 - alpha_prod).sqrt() * noise_pred


def ddim_inverse_step_by_velocity(
    scheduler: DDIMScheduler,
    noise_pred: torch.Tensor,
    pred_original_sample: torch.Tensor,
    timestep: torch.Tensor | int,
    latents: torch.Tensor,
) -> torch.Tensor:
    """
    Return x_t as [`ddim_inverse_step`] does, with v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x̂_0 held fixed instead of ε: a DDIM step is a
    rotation by an angle δ, x_{t-1} = cos δ x_t - sin δ v.
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    sqrt_alpha, sqrt_beta = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    velocity = sqrt_alpha * noise_pred - sqrt_beta * pred_original_sample
    sine = sqrt_beta * alpha_prod_prev.sqrt() - sqrt_alpha * (1 - alpha_prod_prev).sqrt()
    cosine = sqrt_alpha * alpha_prod_prev.sqrt() + sqrt_beta * (1 - alpha_prod_prev).sqrt()
    return (latents + sine * velocity) / cosine


def forward_step(
    scheduler: DDIMScheduler, noise: torch.Tensor, timestep: torch.Tensor | int, latents: torch.Tensor
) -> torch.Tensor:
    """
    Return x_t from x_{t-1} = `latents` and fresh `noise`: a draw from q(x_t | x_{t-1}), which undoes a step at random (RePaint,
    Lugmayr et al., 2022).

    `timestep` is t, the noisier end, for a scheduler made by [`sampling_scheduler`].
    """
    alpha_prod, alpha_prod_prev = _step_alpha_prods(scheduler, timestep)
    ratio = alpha_prod / alpha_prod_prev
    return ratio.sqrt() * latents + (1 - ratio).sqrt() * noise


def _step_alpha_prods(scheduler: DDIMScheduler, timestep: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ᾱ at both ends of the step from `timestep`."""
    timestep = int(timestep)
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_prod_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    return scheduler.alphas_cumprod[timestep], alpha_prod_prev
