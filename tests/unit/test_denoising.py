# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from testing_utils import SIZE, cosine_alphas_cumprod, make_scheduler, make_unet, randn

from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import NoisePrediction, denoise, invert, predict_noise, split_model_output
from diffsketching_pipeline.schedulers import (
    check_scheduler,
    forward_step,
    get_alpha_prod,
    sampling_scheduler,
    scheduler_step_kwargs,
    timesteps_from,
)


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PHOTO = {"in_channels": 3, "num_class_embeds": None}


def make_latents(batch_size=2):
    return randn(batch_size, 3, SIZE, SIZE, seed=5)


def count_calls(module):
    """A list that gets the batch size of each forward."""
    sizes = []
    module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def to_epsilon(output, latents, timestep, prediction_type):
    """Convert a network's output in its own parametrization to ε, by the definitions of v and x_t."""
    alpha = cosine_alphas_cumprod()[timestep].float()
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (latents - alpha.sqrt() * output) / (1 - alpha).sqrt()
    return alpha.sqrt() * output + (1 - alpha).sqrt() * latents


# ---- one prediction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_split_model_output_inverts_the_definitions(prediction_type):
    noise, photo = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    alpha_prod = torch.tensor([0.9, 0.2]).reshape(2, 1, 1, 1)
    a, s = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    output = {"epsilon": noise, "v_prediction": a * noise - s * photo, "sample": photo}[prediction_type]
    found_noise, found_photo = split_model_output(output, a * photo + s * noise, alpha_prod, prediction_type)
    torch.testing.assert_close(found_noise, noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_photo, photo, atol=1e-5, rtol=0)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="`prediction_type` .* but is 'flow_prediction'"):
        split_model_output(torch.zeros(1), torch.zeros(1), torch.tensor(0.5), "flow_prediction")


def test_alpha_prod_is_that_of_the_schedule():
    timesteps = torch.tensor([0, 500, 999])
    found = get_alpha_prod(make_scheduler(), timesteps, torch.zeros(3, 3, 2, 2))
    assert found.shape == (3, 1, 1, 1) and found.dtype == torch.float32
    torch.testing.assert_close(found.flatten().double(), cosine_alphas_cumprod()[timesteps], rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_noise_is_rederived_from_the_clipped_photo(tiny_unet, sketches):
    scheduler, latents, timestep = make_scheduler(prediction_type="v_prediction"), 2 * make_latents(), 400
    tiny_unet.conv_out.weight *= 5
    conditioning = Conditioning(torch.tensor([1, 2]), sketches[:2])
    raw = predict_noise(tiny_unet, tiny_unet.config, scheduler, latents, timestep, conditioning, clip_sample=False)
    output = tiny_unet(torch.cat([latents, sketches[:2]], dim=1), timestep, torch.tensor([1, 2])).sample
    torch.testing.assert_close(raw.noise_pred, to_epsilon(output, latents, timestep, "v_prediction"))
    assert raw.pred_original_sample.abs().max() > 1.2

    for limit in (1.0, 0.7):
        clipped = predict_noise(
            tiny_unet, tiny_unet.config, scheduler, latents, timestep, conditioning, clip_sample_range=limit
        )
        photo = raw.pred_original_sample.clip(-limit, limit)
        alpha = cosine_alphas_cumprod()[timestep].float()
        torch.testing.assert_close(clipped.pred_original_sample, photo)
        torch.testing.assert_close(alpha.sqrt() * photo + (1 - alpha).sqrt() * clipped.noise_pred, latents)
    assert clipped.variance is None


@torch.no_grad()
def test_one_timestep_per_image_equals_separate_calls(tiny_unet, sketches):
    scheduler, latents, labels = make_scheduler(), make_latents(3), torch.tensor([0, 1, 3])
    conditioning = Conditioning(labels, sketches)
    together = predict_noise(
        tiny_unet, tiny_unet.config, scheduler, latents, torch.tensor([10, 500, 900]), conditioning, 2.0
    )
    for row, timestep in enumerate((10, 500, 900)):
        one = slice(row, row + 1)
        conditioning = Conditioning(labels[one], sketches[one])
        alone = predict_noise(tiny_unet, tiny_unet.config, scheduler, latents[one], timestep, conditioning, 2.0)
        torch.testing.assert_close(together.noise_pred[one], alone.noise_pred, atol=1e-5, rtol=0)


@torch.no_grad()
def test_batched_guidance_equals_two_separate_passes(tiny_unet, sketches):
    scheduler, latents, labels = make_scheduler(prediction_type="sample"), make_latents(), torch.tensor([0, 2])

    def separate(sketch):
        output = tiny_unet(torch.cat([latents, sketch], dim=1), 600, labels).sample
        return to_epsilon(output, latents, 600, "sample")

    with_sketch, without = separate(sketches[:2]), separate(torch.zeros(2, 1, SIZE, SIZE))
    assert (with_sketch - without).abs().max() > 1e-2
    sizes = count_calls(tiny_unet)
    for scale, size in ((0.0, 4), (1.0, 2), (2.5, 4)):
        sizes.clear()
        conditioning = Conditioning(labels, sketches[:2])
        found = predict_noise(
            tiny_unet, tiny_unet.config, scheduler, latents, 600, conditioning, scale, clip_sample=False
        )
        expected = without + scale * (with_sketch - without)
        torch.testing.assert_close(found.noise_pred, expected, atol=1e-5, rtol=1e-5)
        assert sizes == [size]


@torch.no_grad()
def test_guidance_withholds_drawing_and_class_together(tiny_unet, sketches):
    scheduler, latents, timestep = make_scheduler(prediction_type="epsilon"), make_latents(), 600
    labels, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    paper = torch.zeros(2, 1, SIZE, SIZE)
    conditional = tiny_unet(torch.cat([latents, sketches[:2]], dim=1), timestep, labels).sample
    expected = {
        name: tiny_unet(torch.cat([latents, paper], dim=1), timestep, withheld).sample
        for name, withheld in (("class stays", labels), ("class goes, too", null))
    }
    assert (expected["class stays"] - expected["class goes, too"]).abs().max() > 1e-2
    for null_class_labels, unconditional in zip((None, null), expected.values(), strict=True):
        found = predict_noise(
            *(tiny_unet, tiny_unet.config, scheduler, latents, timestep),
            Conditioning(labels, sketches[:2], null_class_labels=null_class_labels),
            2.5,
            clip_sample=False,
        )
        guided = unconditional + 2.5 * (conditional - unconditional)
        torch.testing.assert_close(found.noise_pred, guided, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_learned_variance_is_dropped_from_the_noise_and_not_extrapolated(sketches):
    unet, scheduler, latents = make_unet(out_channels=6).eval(), make_scheduler(), make_latents()
    conditioning = Conditioning(torch.tensor([0, 1]), sketches[:2])
    output = unet(torch.cat([latents, sketches[:2]], dim=1), 300, torch.tensor([0, 1])).sample
    for scale in (1.0, 3.0):
        found = predict_noise(unet, unet.config, scheduler, latents, 300, conditioning, scale)
        assert found.noise_pred.shape == latents.shape
        torch.testing.assert_close(found.variance, output[:, 3:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_several_drawings_of_one_image_average_its_noise(scale, tiny_unet, sketches):
    scheduler, latents, labels = make_scheduler(prediction_type="epsilon"), make_latents(), torch.tensor([0, 1])
    owner = torch.tensor([1, 0, 1])

    def predict(rows, sketch):
        conditioning = Conditioning(labels[rows], sketch)
        return predict_noise(
            tiny_unet, tiny_unet.config, scheduler, latents[rows], 500, conditioning, scale, clip_sample=False
        ).noise_pred

    expected = torch.cat([predict([0], sketches[1:2]), (predict([1], sketches[:1]) + predict([1], sketches[2:])) / 2])
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        found = predict_noise(
            *(tiny_unet, tiny_unet.config, scheduler, latents, 500),
            Conditioning(labels[owner[order]], sketches[order], owner[order]),
            scale,
            clip_sample=False,
        )
        torch.testing.assert_close(found.noise_pred, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_sketch_reaches_only_a_network_with_a_channel_for_it(tiny_unet, sketches):
    scheduler, latents, labels = make_scheduler(), make_latents(), torch.tensor([0, 1])
    photo_unet = make_unet(in_channels=3).eval()

    def predict(unet, sketch, scale=1.0):
        return predict_noise(
            unet, unet.config, scheduler, latents, 500, Conditioning(labels, sketch), scale
        ).noise_pred

    sizes = count_calls(photo_unet)
    without = predict(photo_unet, None)
    assert torch.equal(without, predict(photo_unet, sketches[:2], scale=3.0)) and sizes == [2, 2]
    zeros = torch.zeros(2, 1, SIZE, SIZE)
    assert torch.equal(predict(tiny_unet, None), predict(tiny_unet, zeros))
    assert not torch.equal(predict(tiny_unet, zeros), predict(tiny_unet, sketches[:2]))


@torch.no_grad()
def test_classes_reach_only_a_network_that_knows_them():
    unet, latents = make_unet(in_channels=3, num_class_embeds=None).eval(), make_latents()
    found = [
        predict_noise(unet, unet.config, make_scheduler(), latents, 500, Conditioning(labels)).noise_pred
        for labels in (torch.tensor([0, 1]), None)
    ]
    assert torch.equal(*found)


def test_a_wrapped_network_is_called_through_its_wrapper_and_differentiated(tiny_unet, sketches):
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(args[0].shape)
        return tiny_unet(*args, **kwargs)

    latents = make_latents().requires_grad_(True)
    found = predict_noise(
        *(wrapper, tiny_unet.config, make_scheduler(), latents, torch.tensor([900, 100])),
        Conditioning(torch.tensor([0, 1]), sketches[:2]),
        2.0,
    )
    found.noise_pred.square().sum().backward()
    assert calls == [(4, 4, SIZE, SIZE)]
    assert latents.grad.abs().max() > 0 and tiny_unet.conv_in.weight.grad.abs().max() > 0


@torch.no_grad()
def test_half_precision_weights_predict_in_float32(tiny_unet, sketches):
    arguments = make_scheduler(), make_latents(), 500, Conditioning(torch.tensor([0, 1]), sketches[:2])
    expected = predict_noise(tiny_unet, tiny_unet.config, *arguments)
    half = copy.deepcopy(tiny_unet).bfloat16()
    found = predict_noise(half, half.config, *arguments)
    assert found.noise_pred.dtype == found.pred_original_sample.dtype == torch.float32
    torch.testing.assert_close(found.noise_pred, expected.noise_pred, atol=0.05, rtol=0)


@torch.no_grad()
def test_a_prediction_that_is_not_finite_names_timestep_and_scale(tiny_unet, sketches):
    tiny_unet.conv_out.bias[1] = float("nan")
    conditioning = Conditioning(torch.tensor([0, 1]), sketches[:2])
    with pytest.raises(ValueError, match=r"timestep 321 .*`sketch_guidance_scale=2.5`"):
        predict_noise(tiny_unet, tiny_unet.config, make_scheduler(), make_latents(), 321, conditioning, 2.5)


# ---- schedulers -------------------------------------------------------------------------------------------------------


SAMPLERS = {
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading"}, {}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}, {}),
    "ddim-offset": (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    "ddim-eta": (DDIMScheduler, {"timestep_spacing": "leading"}, {"eta": 0.7}),
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_small"}, {}),
    "ddpm-large": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "linspace"}, {}),
    "ddpm-learned": (DDPMScheduler, {"variance_type": "learned"}, {}),
    "ddpm-learned-range": (DDPMScheduler, {"variance_type": "learned_range"}, {}),
    "dpm": (DPMSolverMultistepScheduler, {}, {}),
    "dpm-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc": (UniPCMultistepScheduler, {}, {}),
    "pndm": (PNDMScheduler, {}, {}),
    "pndm-plms": (PNDMScheduler, {"skip_prk_steps": True}, {}),
}


def make_sampler(name, prediction_type="epsilon", clip_sample=False):
    cls, options, step_options = SAMPLERS[name]
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, **options}
    if cls in (DDIMScheduler, DDPMScheduler):
        options["clip_sample"] = clip_sample
    return cls(**options), step_options


def sample_with_us(unet, scheduler, latents, conditioning, steps, clip_sample=False, eta=0.0, generator=None):
    copied = sampling_scheduler(scheduler, steps)

    def predict(latents, timestep, step_index):
        return predict_noise(unet, unet.config, scheduler, latents, timestep, conditioning, clip_sample=clip_sample)

    return denoise(copied, predict, latents, copied.timesteps, scheduler_step_kwargs(copied, eta, generator))


def sample_with_diffusers(unet, scheduler, latents, labels, steps, **step_kwargs):
    """The loop of diffusers' own unconditional pipelines."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(unet(latents, timestep, labels).sample, timestep, latents, **step_kwargs).prev_sample
    return latents


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prediction_type"), [*((name, "epsilon") for name in SAMPLERS), ("ddim", "v_prediction")]
)
def test_sampling_equals_the_plain_loop_of_diffusers(name, prediction_type, generators):
    torch.manual_seed(0)
    unet = make_unet(in_channels=3, out_channels=6 if "learned" in name else 3).eval()
    # A variance cannot be negative, which random weights do not know.
    unet.conv_out.bias[3:] += 2.0
    latents, labels = make_latents(), torch.tensor([0, 3])
    scheduler, options = make_sampler(name, prediction_type)
    random = name.startswith(("ddpm", "dpm-sde")) or "eta" in options
    plain_options = {**options, **({"generator": generators(2)} if random else {})}
    expected = sample_with_diffusers(unet, copy.deepcopy(scheduler), latents, labels, 10, **plain_options)
    found = sample_with_us(unet, scheduler, latents, Conditioning(labels), 10, generator=generators(2), **options)
    assert torch.isfinite(expected).all()
    # An ε network's output goes through unchanged; v is turned into ε, which rounds.
    tolerance = {"rtol": 0, "atol": 0} if prediction_type == "epsilon" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found, expected, **tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim", "ddim-trailing", "ddpm", "ddpm-learned-range"])
def test_clipping_equals_that_of_diffusers(name, generators):
    torch.manual_seed(0)
    unet = make_unet(in_channels=3, out_channels=6 if "learned" in name else 3).eval()
    latents, labels = 2 * make_latents(), torch.tensor([0, 3])
    scheduler, _ = make_sampler(name, clip_sample=True)
    options = {"generator": generators(2)} if "ddpm" in name else {"use_clipped_model_output": True}
    expected = sample_with_diffusers(unet, copy.deepcopy(scheduler), latents, labels, 10, **options)
    arguments = unet, scheduler, latents, Conditioning(labels), 10
    found = sample_with_us(*arguments, clip_sample=True, generator=generators(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (found - sample_with_us(*arguments, generator=generators(2))).abs().max() > 0.1


@pytest.mark.parametrize("name", ["ddim", "ddpm", "ddpm-learned-range", "dpm", "unipc", "pndm"])
def test_the_given_scheduler_is_not_changed(name):
    scheduler, _ = make_sampler(name, "v_prediction", clip_sample=True)
    state = copy.deepcopy(scheduler.__dict__)
    copied = sampling_scheduler(scheduler, 8)
    copied.step(randn(1, 6 if "learned" in name else 3, 4, 4), copied.timesteps[0], randn(1, 3, 4, 4))
    assert copied.config.prediction_type == "epsilon" and not copied.config.get("clip_sample")
    assert scheduler.__dict__.keys() == state.keys()
    for key, value in state.items():
        assert (
            torch.equal(value, scheduler.__dict__[key])
            if torch.is_tensor(value)
            else (str(value) == str(scheduler.__dict__[key]))
        )


# All that follow the probability flow; the first steps of PNDM cannot be left out.
@pytest.mark.parametrize(
    ("name", "strength"),
    [("pndm", 1.0), ("ddim-trailing", 1.0)]
    + [(name, strength) for name in ("ddim", "dpm", "unipc", "pndm-plms") for strength in (1.0, 0.5)],
)
@torch.no_grad()
def test_every_sampler_solves_the_exact_flow_of_gaussian_data(name, strength, tiny_pipeline):
    """
    The exact ε of photos drawn from N(0, σ²) is sqrt(1-ᾱ) x_t / v_t with v_t = ᾱ σ² + 1 - ᾱ, and the probability flow
    keeps x_t / sqrt(v_t): whatever the start, x_0 is known.
    """
    variance = 0.25
    scheduler, _ = make_sampler(name)
    alphas_cumprod = scheduler.alphas_cumprod

    def unet(sample, timestep, class_labels=None, return_dict=False):
        alpha = alphas_cumprod[timestep]
        return ((1 - alpha).sqrt() * sample / (alpha * variance + 1 - alpha),)

    copied = sampling_scheduler(scheduler, 100)
    timesteps = timesteps_from(copied, 100, strength)
    alpha = alphas_cumprod[timesteps[0]]
    if strength < 1:
        assert 400 < timesteps[0] < 600 and len(timesteps.unique()) == 50
    latents = randn(1, 3, 4, 4, seed=2)

    def predict(latents, timestep, step_index):
        return predict_noise(unet, PHOTO, scheduler, latents, timestep, Conditioning(), clip_sample=False)

    found = denoise(copied, predict, latents, timesteps)
    expected = latents * (variance / (alpha * variance + 1 - alpha)).sqrt()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def karras(cls=DPMSolverMultistepScheduler, **options):
    return cls(**{"use_karras_sigmas": True, **options})


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (EulerDiscreteScheduler, 10, "`scheduler`.* EulerDiscreteScheduler"),
        (karras, 10, "`scheduler.config.use_karras_sigmas`"),
        (lambda: karras(UniPCMultistepScheduler), 10, "UniPCMultistepScheduler with `use_karras_sigmas=False`"),
        (lambda: DPMSolverMultistepScheduler(use_lu_lambdas=True), 10, "use_lu_lambdas"),
        (lambda: DDIMScheduler(thresholding=True), 10, "`scheduler.config.thresholding`"),
        (lambda: DDIMScheduler(rescale_betas_zero_snr=True), 10, "`rescale_betas_zero_snr=False`"),
        (lambda: DDIMScheduler(timestep_spacing="trailing"), 30, "DDIMScheduler.*`timestep_spacing='trailing'`"),
        (lambda: DDIMScheduler(timestep_spacing="linspace"), 10, "DDIMScheduler.*`timestep_spacing='linspace'`"),
        (PNDMScheduler, 3, "`num_inference_steps=3`.*Runge-Kutta"),
        (DDIMScheduler, 0, "`num_inference_steps`.* 0"),
        (DDIMScheduler, 1001, "`num_inference_steps`.* 1001"),
        (DDIMScheduler, 2.0, "`num_inference_steps`.* 2.0"),
        (DDIMScheduler, True, "`num_inference_steps`.* True"),
    ],
)
def test_schedulers_that_would_be_misread_are_refused(make, steps, message):
    with pytest.raises(ValueError, match=message):
        sampling_scheduler(make(), steps)


def test_what_only_looks_like_those_is_accepted():
    check_scheduler(DDIMScheduler(timestep_spacing="trailing"), 20)
    check_scheduler(DDPMScheduler(timestep_spacing="linspace"), 30)
    check_scheduler(DPMSolverMultistepScheduler(timestep_spacing="trailing"), 30)
    check_scheduler(PNDMScheduler(skip_prk_steps=True), 2)


def test_eta_is_for_ddim():
    generator = torch.Generator()
    assert scheduler_step_kwargs(DDIMScheduler(), 0.5, generator) == {"eta": 0.5, "generator": generator}
    assert scheduler_step_kwargs(DDPMScheduler(), 0.0, generator) == {"generator": generator}
    assert scheduler_step_kwargs(PNDMScheduler(), 0.0, generator) == {}
    with pytest.raises(ValueError, match="`eta=0.5`.*DDIMScheduler.*DDPMScheduler"):
        scheduler_step_kwargs(DDPMScheduler(), 0.5, generator)


def test_learned_variance_without_a_network_for_it_is_refused():
    scheduler = sampling_scheduler(DDPMScheduler(variance_type="learned_range"), 4)
    prediction = NoisePrediction(make_latents(), make_latents())
    with pytest.raises(ValueError, match="`scheduler.config.variance_type='learned_range'`"):
        denoise(scheduler, lambda *_: prediction, make_latents(), scheduler.timesteps)


# ---- the loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_can_be_steered_and_stopped():
    scheduler = sampling_scheduler(make_scheduler(prediction_type="epsilon"), 5)
    seen, ended = [], []

    def predict(latents, timestep, step_index):
        seen.append((int(timestep), step_index, float(latents.mean())))
        return NoisePrediction(torch.zeros_like(latents), latents)

    def on_step_end(step_index, timestep, latents, prediction):
        ended.append(torch.full_like(latents, step_index + 10))
        return ended[-1], step_index < 2

    found = denoise(scheduler, predict, torch.ones(1, 3, 2, 2), scheduler.timesteps, None, on_step_end)
    assert seen == [(800, 0, 1.0), (600, 1, 10.0), (400, 2, 11.0)]
    assert torch.equal(found, ended[-1])


def test_the_loop_is_differentiable(tiny_unet, sketches):
    scheduler, conditioning = make_scheduler(), Conditioning(torch.tensor([0, 1]), sketches[:2])
    direction = randn(2, 3, SIZE, SIZE, seed=9)

    def loss(latents):
        copied = sampling_scheduler(scheduler, 3)

        def predict(latents, timestep, step_index):
            return predict_noise(tiny_unet, tiny_unet.config, scheduler, latents, timestep, conditioning, 2.0, False)

        return denoise(copied, predict, latents, copied.timesteps).square().mean()

    latents = make_latents().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(latents), latents)
    with torch.no_grad():
        difference = (loss(latents + 0.01 * direction) - loss(latents - 0.01 * direction)) / 0.02
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=5e-3, atol=1e-6)


# ---- inversion --------------------------------------------------------------------------------------------------------


def unclipped(unet, scheduler, conditioning):
    def predict(latents, timestep, step_index):
        return predict_noise(unet, unet.config, scheduler, latents, timestep, conditioning, clip_sample=False)

    return predict


@torch.no_grad()
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_textbook_inversion_equals_the_inverse_scheduler_of_diffusers(set_alpha_to_one, tiny_unet, sketches):
    # Of ε alone: diffusers turns the v predicted at t into ε with the ᾱ of t - 1.
    scheduler = make_scheduler(prediction_type="epsilon", set_alpha_to_one=set_alpha_to_one)
    inverse = DDIMInverseScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=set_alpha_to_one)
    labels, steps = torch.tensor([2, 0]), 8
    inverse.set_timesteps(steps)
    expected = make_latents().tanh()
    for timestep in inverse.timesteps:
        output = tiny_unet(torch.cat([expected, sketches[:2]], dim=1), timestep, labels).sample
        expected = inverse.step(output, timestep, expected).prev_sample

    copied = sampling_scheduler(scheduler, steps)
    predict = unclipped(tiny_unet, scheduler, Conditioning(labels, sketches[:2]))
    found = invert(copied, predict, make_latents().tanh(), copied.timesteps)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_fixed_point_iterations_close_the_round_trip(tiny_unet, sketches):
    scheduler, images = make_scheduler(), make_latents().tanh()
    tiny_unet.conv_out.weight *= 0.2  # random weights are rougher than any trained network
    copied = sampling_scheduler(scheduler, 10)
    predict = unclipped(tiny_unet, scheduler, Conditioning(torch.tensor([2, 0]), sketches[:2]))
    errors = []
    for iterations in (0, 1, 3, 12):
        sizes = count_calls(tiny_unet)
        noise = invert(copied, predict, images, copied.timesteps, iterations)
        assert len(sizes) == 10 * (iterations + 1)
        errors.append((denoise(copied, predict, noise, copied.timesteps) - images).abs().max().item())
    assert errors[0] > 0.01 and errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-4


@torch.no_grad()
def test_inversion_of_gaussian_data_follows_its_exact_flow():
    # Data N(0, v): x_t keeps its place in the distribution, so x_T = x_0 sqrt((ᾱ_T v + 1 - ᾱ_T) / v).
    variance, scheduler = 0.25, make_scheduler(prediction_type="epsilon")
    copied = sampling_scheduler(scheduler, 500)

    def predict(latents, timestep, step_index):
        alpha = scheduler.alphas_cumprod[timestep]
        noise = (1 - alpha).sqrt() * latents / (alpha * variance + 1 - alpha)
        return NoisePrediction(noise, (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt())

    images = 0.5 * make_latents()
    seen = []
    found = invert(copied, predict, images, copied.timesteps, 3, lambda *step: seen.append((step[0], int(step[1]))))
    alpha = scheduler.alphas_cumprod[copied.timesteps[0]]
    torch.testing.assert_close(found, images * ((alpha * variance + 1 - alpha) / variance).sqrt(), rtol=0.01, atol=0)
    assert seen[0] == (499, 0) and seen[-1] == (0, 998) and len(seen) == 500


@pytest.mark.parametrize("index", [0, 9])
def test_forward_step_draws_from_what_leads_to_the_noisier_end(index):
    scheduler = sampling_scheduler(make_scheduler(), 10)
    timestep = scheduler.timesteps[index]
    alphas = cosine_alphas_cumprod().float()
    previous = alphas[timestep - 100] if timestep >= 100 else torch.tensor(1.0)
    latents, noise = make_latents(), randn(2, 3, SIZE, SIZE, seed=2)
    found = forward_step(scheduler, noise, timestep, latents)
    beta = 1 - alphas[timestep] / previous
    torch.testing.assert_close(found, (1 - beta).sqrt() * latents + beta.sqrt() * noise)


def test_step_kwargs_may_be_made_for_each_step():
    made = []

    def make():
        made.append(len(made))
        return {"eta": 0.0}

    scheduler, latents = sampling_scheduler(make_scheduler(), 3), make_latents()

    def predict(latents, timestep, step_index):
        return NoisePrediction(latents, latents)

    found = denoise(scheduler, predict, latents, scheduler.timesteps, make)
    assert made == [0, 1, 2]
    torch.testing.assert_close(found, denoise(scheduler, predict, latents, scheduler.timesteps, {"eta": 0.0}))
