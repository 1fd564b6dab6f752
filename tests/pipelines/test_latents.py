# SPDX-License-Identifier: Apache-2.0
"""Tests of what differs where a `vae` makes x_t latents: spaces, sizes, sampling, guidance, editing, files, commands."""

import copy
import json
import logging
import os
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from testing_utils import (
    FACTOR,
    LATENT_CHANNELS,
    LATENT_SIZE,
    PIXEL_SIZE,
    SIZE,
    along,
    cosine_alphas_cumprod,
    directional_derivatives,
    make_scheduler,
    make_unet,
    make_vae,
    randn,
)

from diffsketching_pipeline import (
    ClassifierGuidanceCallback,
    ColorGuidanceCallback,
    DiffSketchingEditPipeline,
    DiffSketchingInterpolationPipeline,
    DiffSketchingPipeline,
    GuidanceCallback,
    SketchGuidanceCallback,
    cli,
)
from diffsketching_pipeline.autoencoding import decode_latents, encode_photos
from diffsketching_pipeline.conditioning import Conditioning, class_entropy, read_sketch_masks
from diffsketching_pipeline.denoising import UNetInputs, get_unet_inputs, join_unet_inputs, predict_noise
from diffsketching_pipeline.guidance import Colors, blur
from diffsketching_pipeline.pipeline_diffsketching_interpolation import slerp


STEPS = 4
FAST = {"num_images_per_sketch": 1, "num_inference_steps": STEPS, "output_type": "latent"}
SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)


# ---- what a UNet may take ---------------------------------------------------------------------------------------------


def test_the_channels_of_a_unet_follow_one_rule():
    expected = {3: (0, 0), 4: (1, 0), 5: (1, 1)}
    assert {n: tuple(get_unet_inputs(n, 3)) for n in expected} == expected
    expected = {8: (0, 0), 72: (64, 0), 73: (64, 1)}
    assert {n: tuple(get_unet_inputs(n, 8, 8)) for n in expected} == expected
    assert get_unet_inputs(20, 4, 4) == UNetInputs(sketch=16, abstraction=0)
    for in_channels, channels, factor in ((6, 3, 1), (2, 3, 1), (9, 8, 8), (74, 8, 8), (72, 4, 8), (72, 8, 4)):
        with pytest.raises(
            ValueError, match=f"`unet` must have {channels} input channels .* got `in_channels={in_channels}`"
        ):
            get_unet_inputs(in_channels, channels, factor)


def test_a_drawing_is_folded_without_losing_a_line():
    sample, sketch = randn(2, 4, 3, 5), randn(2, 1, 12, 20, seed=1)
    joined = join_unet_inputs(sample, 4 + 16 + 1, sketch, torch.tensor([0.25, 1.0]))
    assert joined.shape == (2, 21, 3, 5) and torch.equal(joined[:, :4], sample)
    # Channel 4 i + j of the folded drawing is row i and column j of each square of 4 x 4 pixels.
    for i in range(4):
        for j in range(4):
            assert torch.equal(joined[:, 4 + 4 * i + j], sketch[:, 0, i::4, j::4])
    assert (joined[0, 20] == 0.25).all() and (joined[1, 20] == 1.0).all()
    assert torch.equal(join_unet_inputs(sample, 20, sketch), joined[:, :20])


def test_no_drawing_is_one_null_whatever_its_abstraction():
    sample = randn(2, 4, 3, 3)
    null = join_unet_inputs(sample, 21, None, 0.7)
    assert torch.equal(null[:, :4], sample) and null.shape[1] == 21 and not null[:, 4:].any()
    drawn = torch.cat([torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12)])
    joined = join_unet_inputs(sample, 21, drawn, 0.7)
    assert torch.equal(joined[0], null[0]) and (joined[1, 20] == 0.7).all()
    assert torch.equal(join_unet_inputs(sample, 4, drawn, 0.7), sample)


def test_sizes_and_inputs_are_read_off_the_components(latent_pipeline_factory, tiny_pipeline, tiny_pipeline_factory):
    pipe = latent_pipeline_factory()
    assert (pipe.height, pipe.width, pipe.sample_size) == (PIXEL_SIZE, PIXEL_SIZE, (LATENT_SIZE, LATENT_SIZE))
    assert (pipe.sample_channels, pipe.vae_scale_factor) == (LATENT_CHANNELS, FACTOR)
    found = [
        (pipe.takes_sketch, pipe.takes_abstraction)
        for pipe in (
            *(latent_pipeline_factory((), in_channels=n) for n in (4, 20, 21)),
            *(tiny_pipeline_factory((), in_channels=n) for n in (3, 4, 5)),
        )
    ]
    assert found == 2 * [(False, False), (True, False), (True, True)]
    assert (tiny_pipeline.height, tiny_pipeline.sample_size, tiny_pipeline.sample_channels) == (SIZE, (SIZE, SIZE), 3)


def test_components_of_different_spaces_are_refused(latent_pipeline_factory, tiny_pipeline):
    pipe = latent_pipeline_factory()
    for changes, message in (
        ({"vae": None}, "`in_channels=21`.* photos.*`vae`"),
        ({"vae": None, "unet": make_unet(4, 4)}, "`unet`.* 3 .* photos.*`vae`"),
        (
            {"vae": make_vae(latent_channels=8)},
            "`unet`.* 8 .*`vae`.* 8 .* 4 ",
        ),
        ({"vae": make_vae(factor=8)}, "`unet`.* 68 .*`in_channels=21`.* 4 .* 8 "),
        ({"unet": tiny_pipeline.unet, "classifier": None}, "`unet`.* 4 .* 8 .*=3"),
        (
            {"classifier": tiny_pipeline.classifier},
            "`classifier`.* 4 .* 8 x 8.*=16",
        ),
        ({"recommended": {"sketch_abstraction": 1.5}}, r"`recommended`.*`sketch_abstraction`.* 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffSketchingPipeline.from_pipe(pipe, **changes)
    with pytest.raises(ValueError, match="`photos`.* 30 x 32"):
        encode_photos(pipe.vae, torch.zeros(1, 3, 32, 30))


# ---- sampling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ddim_on_latents(pipe, sketch, labels, x, steps, scale, abstraction=0.0):
    """DDIM with classifier-free guidance by the drawing, written out: v-prediction, no clipping."""
    alphas_cumprod, stride = cosine_alphas_cumprod().float(), 1000 // steps
    first = 999 if pipe.scheduler.config.timestep_spacing == "trailing" else 1000 - stride
    folded = torch.nn.functional.pixel_unshuffle(sketch, FACTOR)
    plane = torch.full_like(folded[:, :1], abstraction)
    for t in range(first, -1, -stride):
        alpha, alpha_prev = alphas_cumprod[t], alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0)
        null = pipe.unet(torch.cat([x, 0 * folded, 0 * plane], 1), t, torch.full_like(labels, 3)).sample
        v = null + scale * (pipe.unet(torch.cat([x, folded, plane], 1), t, labels).sample - null)
        noise, original = alpha.sqrt() * v + (1 - alpha).sqrt() * x, alpha.sqrt() * x - (1 - alpha).sqrt() * v
        x = alpha_prev.sqrt() * original + (1 - alpha_prev).sqrt() * noise
    return x


@pytest.mark.parametrize(("spacing", "tolerance"), [("leading", 1e-4), ("trailing", 5e-3)])
def test_sampling_on_latents_is_ddim_in_their_space(spacing, tolerance, latent_pipeline, large_sketches):
    # From timestep 999, where ᾱ is 2e-9, ε in float32 gives x̂_0 to about 2e-3.
    latent_pipeline.scheduler.register_to_config(timestep_spacing=spacing)
    noise, labels = randn(2, *SHAPE), torch.tensor([2, 0])
    options = {"sketch_guidance_scale": 2.0, "latents": noise, "sketch_abstraction": 0.5}
    found = latent_pipeline(large_sketches[:2], labels, **options, **FAST).images
    expected = ddim_on_latents(latent_pipeline, large_sketches[:2], labels, noise, STEPS, 2.0, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert latent_pipeline.sketch_abstraction == 0.5
    photos = latent_pipeline(large_sketches[:2], labels, **options, **{**FAST, "output_type": "pt"}).images
    decoded = (decode_latents(latent_pipeline.vae, found).clamp(-1, 1) + 1) / 2
    assert photos.shape == (2, 3, PIXEL_SIZE, PIXEL_SIZE) and photos.std() > 0.01
    torch.testing.assert_close(photos, decoded.detach(), rtol=0, atol=1e-5)


def test_the_result_of_a_seed_does_not_depend_on_its_batch(latent_pipeline, large_sketches, generators):
    options = {"num_images_per_sketch": 1, "num_inference_steps": STEPS, "eta": 1.0, "output_type": "np"}
    together = latent_pipeline(large_sketches, "a", generator=generators(3), **options).images
    alone = latent_pipeline(large_sketches[2], "a", generator=generators(1, first=2), **options).images
    assert np.abs(together[2] - alone[0]).max() < 1e-5 and np.abs(together[2] - together[1]).max() > 1e-3
    latents = randn(3, *SHAPE)
    assert torch.equal(latent_pipeline.decode_photos(latents)[1:2], latent_pipeline.decode_photos(latents[1:2]))


def test_latents_are_never_clipped(latent_pipeline_factory, large_sketches, generators):
    pipe = latent_pipeline_factory(scheduler=make_scheduler(prediction_type="v_prediction", clip_sample=True))
    largest = []

    def record(pipe, step_index, timestep, callback_kwargs):
        largest.append(float(callback_kwargs["pred_original_sample"].abs().max()))
        return {}

    inputs = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    found = [
        pipe(large_sketches, "a", generator=generators(3), clip_sample=clip, **inputs, **FAST).images
        for clip in (None, False)
    ]
    assert torch.equal(*found) and max(largest) > 1.2
    with pytest.raises(ValueError, match="`clip_sample`.*`vae`.* True"):
        pipe(large_sketches, "a", clip_sample=True, **FAST)


def test_given_noise_has_the_size_of_the_latents(latent_pipeline, large_sketches):
    with pytest.raises(ValueError, match=r"`latents`.* \(1, 4, 8, 8\).* \(1, 3, 32, 32\)"):
        latent_pipeline(large_sketches[0], "a", latents=randn(1, 3, 32, 32), **FAST)


def test_strength_starts_from_the_encoded_drawing(latent_pipeline, large_sketches):
    noise, seen = randn(1, *SHAPE), []
    latent_pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latent_pipeline(large_sketches[0], "a", latents=noise, strength=0.5, **FAST)
    alpha = cosine_alphas_cumprod()[499].float()
    start = encode_photos(latent_pipeline.vae, large_sketches[:1].expand(-1, 3, -1, -1))
    expected = alpha.sqrt() * start + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(seen[0][:, :LATENT_CHANNELS], expected, rtol=0, atol=1e-5)


def test_a_mask_of_a_drawing_is_averaged_over_the_pixels_of_a_latent(latent_pipeline, large_sketches):
    left = np.zeros((PIXEL_SIZE, PIXEL_SIZE), np.uint8)
    left[:, :14] = 255
    groups = latent_pipeline.prepare_sketches([[large_sketches[0], large_sketches[1]]])
    (shares,) = read_sketch_masks([[left, 255 - left]], groups, (PIXEL_SIZE, PIXEL_SIZE), FACTOR)
    assert shares.shape == (2, 1, LATENT_SIZE, LATENT_SIZE)
    assert torch.equal(shares[0, 0, 0], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]))
    masks = {"sketch_masks": [[left, 255 - left]]}
    pair = [[large_sketches[0], large_sketches[1]]]
    options = {**FAST, "num_inference_steps": 1, "latents": randn(1, *SHAPE), "sketch_guidance_scale": 1.0}
    mixed = latent_pipeline(pair, "a", **masks, **options).images
    with torch.no_grad():
        alone = [
            ddim_on_latents(latent_pipeline, sketch[None], torch.tensor([0]), options["latents"], 1, 1.0)
            for sketch in (g for g in groups[0])
        ]
    torch.testing.assert_close(mixed[..., :3], alone[0][..., :3], rtol=0, atol=5e-3)
    torch.testing.assert_close(mixed[..., 4:], alone[1][..., 4:], rtol=0, atol=5e-3)
    assert (alone[0] - alone[1]).abs().max() > 0.1


@pytest.mark.slow
def test_inversion_encodes_the_photos_and_comes_back(latent_pipeline):
    photos = torch.rand(2, 3, PIXEL_SIZE, PIXEL_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = latent_pipeline.invert(photos, "a", num_inference_steps=50, num_fixed_point_iterations=5)
    assert noise.shape == (2, *SHAPE) and noise.dtype == torch.float32
    back = latent_pipeline(None, "a", 1, 50, latents=noise, output_type="latent").images
    given = encode_photos(latent_pipeline.vae, photos)
    psnr = 10 * torch.log10((4 * given.std()) ** 2 / (back - given).square().mean())
    assert psnr > 40


# ---- abstraction, mixtures of guessed classes, another name -------------------------------------------------------------


def test_the_abstraction_is_given_recommended_or_none(latent_pipeline_factory, large_sketches, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = latent_pipeline_factory(recommended={"sketch_abstraction": 0.25})
    planes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: planes.append(args[0][:, -1].unique().tolist()))
    for given, used in ((None, 0.25), (0.75, 0.75), (0, 0.0)):
        pipe(large_sketches[0], "a", sketch_abstraction=given, sketch_guidance_scale=1.0, **FAST)
        assert pipe.sketch_abstraction == used and planes[-1] == [used]
    pipe(None, "a", **FAST)
    assert pipe.sketch_abstraction == 0.0 and not caplog.text
    blind = latent_pipeline_factory(in_channels=20)
    assert blind(large_sketches[0], "a", sketch_abstraction=0.5, **FAST).images.isfinite().all()
    assert "does not use `sketch_abstraction=0.5`" in caplog.text and blind.sketch_abstraction == 0.0
    for value, message in (
        (1.5, r"`sketch_abstraction`.* 1.5"),
        (True, "`sketch_abstraction`.* True"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(large_sketches[0], "a", sketch_abstraction=value, **FAST)
    with pytest.raises(ValueError, match="`sketch_abstraction=0.5`.*`sketch`"):
        pipe(None, "a", sketch_abstraction=0.5, **FAST)


def test_near_classes_are_mixed_where_the_checkpoint_says_so(tiny_pipeline_factory, sketches, monkeypatch):
    guess = torch.tensor([0.4, 0.1, 0.5])
    for ratio, expected in ((None, "c"), (0.9, "c"), (0.8, {"c": 5 / 9, "a": 4 / 9}), (0.0, {"c": 5 / 9, "a": 4 / 9})):
        recommended = None if ratio is None else {"class_mixture": ratio}
        pipe = tiny_pipeline_factory(("sketch_encoder",), recommended=recommended)
        monkeypatch.setattr(pipe, "predict_class_probabilities", lambda sketch: guess)
        out = pipe(sketches[0], None, 1, 1)
        assert out.class_labels == [pytest.approx(expected) if isinstance(expected, dict) else expected]
        assert torch.equal(out.class_probabilities, guess[None])
        assert pipe(sketches[0], "b", 1, 1).class_labels == ["b"]


@pytest.mark.parametrize(("limit", "warned"), [(None, []), (0.9, [0]), (0.5, [0, 1]), (1.0, [])])
def test_a_drawing_of_none_of_the_classes_is_told(limit, warned, tiny_pipeline_factory, sketches, monkeypatch, caplog):
    # Entropies of 0.943 and 0.732 of ln 3; what is named is not guessed.
    guesses = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.15, 0.75], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(class_entropy(guesses), torch.tensor([0.9464, 0.6651, 0.0]), rtol=0, atol=5e-4)
    recommended = None if limit is None else {"max_class_entropy": limit}
    pipe = tiny_pipeline_factory(("sketch_encoder",), recommended=recommended)
    rows = iter(guesses)
    monkeypatch.setattr(pipe, "predict_class_probabilities", lambda sketch: next(rows))
    pipe(sketches[:2], None, 1, 1)
    messages = [record.getMessage() for record in caplog.records if "none of the 3 classes" in record.getMessage()]
    assert [int(message.split()[1]) for message in messages] == warned
    assert all(name in message for name, message in zip(("'a' (50%)", "'c' (75%)"), messages, strict=False))


def test_image_is_another_name_of_sketch(tiny_pipeline, sketches):
    options = {**FAST, "latents": randn(1, 3, SIZE, SIZE)}
    assert torch.equal(
        tiny_pipeline(image=sketches[0], class_labels="a", **options).images,
        tiny_pipeline(sketches[0], "a", **options).images,
    )
    with pytest.raises(ValueError, match="`image`.*`sketch`"):
        tiny_pipeline(sketches[0], "a", image=sketches[0], **options)


# ---- guidance ---------------------------------------------------------------------------------------------------------


TIMESTEP = 300


def make_kwargs(pipe, sketch, attached=False):
    """Make what the pipeline hands to a callback for two images; without a gradient where nothing needs one."""
    latents, owner, labels = 0.5 * randn(2, *SHAPE, seed=7), torch.tensor([0, 1]), torch.tensor([0, 2])
    with torch.set_grad_enabled(attached):
        latents = latents.requires_grad_(attached)
        base = predict_noise(
            *(pipe.unet, pipe.unet.config, pipe.scheduler, latents, torch.tensor(TIMESTEP)),
            Conditioning(labels, sketch, owner),
            clip_sample=False,
        )
    return {
        "latents": latents,
        "noise_pred": base.noise_pred,
        "pred_original_sample": base.pred_original_sample,
        "alpha_prod": cosine_alphas_cumprod()[TIMESTEP].float().reshape(1, 1, 1, 1),
        "class_labels": labels,
        "sketch": sketch,
        "owner": owner,
        "row_shares": torch.ones(2),
        "predictor": pipe.predictor,
        "noise_pred_delta": torch.zeros_like(latents),
    }


def perceptual_loss(pipe, latents, sketch):
    """Eq. 5 of P(clamp(D(latents))) and one drawing, in float64; the decoder written out from its layers."""
    raw = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    photo = 2 * pipe.vae.decoder.layers(3 * torch.tanh(raw / 3)) - 1

    def features(x):
        stem = pipe.sketch_encoder.resnet.embedder.embedder(x)
        maps = [stem, *pipe.sketch_encoder(x, output_hidden_states=True).hidden_states]
        return [m / (m.square().sum(dim=1, keepdim=True) + 1e-10).sqrt() for m in maps]

    pairs = zip(features(pipe.sketcher(photo.clamp(-1, 1))), features(sketch), strict=True)
    return sum((a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs)


@pytest.mark.parametrize(("through_unet", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_perceptual_gradient_goes_through_the_decoder(through_unet, dtype, latent_pipeline, large_sketches):
    pipe, double = latent_pipeline, copy.deepcopy(latent_pipeline)
    # So that no pixel of the photo is clamped, where the gradient is not the derivative.
    with torch.no_grad():
        pipe.vae.decoder.layers[-1].weight.mul_(0.2)
    pipe.vae.to(dtype)
    double.vae.load_state_dict(pipe.vae.state_dict())
    for name in ("unet", "vae", "sketcher", "sketch_encoder"):
        getattr(double, name).double()
    kwargs = make_kwargs(pipe, large_sketches[:2], attached=through_unet)
    assert decode_latents(double.vae, kwargs["pred_original_sample"]).abs().max() < 1
    alpha, noise_pred = cosine_alphas_cumprod()[TIMESTEP], kwargs["noise_pred"].detach().double()

    def loss(x, row):
        sketch = large_sketches[row : row + 1].double().expand(len(x), -1, -1, -1)
        if through_unet:
            inputs = join_unet_inputs(x, 21, sketch)
            v = double.unet(inputs, TIMESTEP, torch.full((len(x),), (0, 2)[row])).sample
            original = alpha.sqrt() * x - (1 - alpha).sqrt() * v
        else:
            original = (x - (1 - alpha).sqrt() * noise_pred[row]) / alpha.sqrt()
        return perceptual_loss(double, original, sketch)

    directions, expected = directional_derivatives(loss, kwargs["latents"].detach().double())
    callback = SketchGuidanceCallback(0.2, through_unet=through_unet)
    found = callback.noise_delta(pipe, torch.tensor(TIMESTEP), kwargs).double()
    ours = along(found, directions)
    factor = (ours * expected).sum(dim=1, keepdim=True) / ours.square().sum(dim=1, keepdim=True)
    assert (factor > 0).all() and pipe.vae.dtype == dtype
    torch.testing.assert_close(factor * ours, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    size = 0.2 * (1 - alpha).sqrt() * noise_pred.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), size, rtol=1e-4, atol=0)


def test_classifier_guidance_acts_in_the_space_of_the_unet(latent_pipeline, large_sketches):
    kwargs = make_kwargs(latent_pipeline, large_sketches[:2])
    found = ClassifierGuidanceCallback(3.0).noise_delta(latent_pipeline, torch.tensor(TIMESTEP), kwargs)
    leaf = kwargs["latents"].clone().requires_grad_(True)
    log_prob = latent_pipeline.classifier(leaf, TIMESTEP).logits.log_softmax(dim=1)[[0, 1], [0, 2]].sum()
    (gradient,) = torch.autograd.grad(log_prob, leaf)
    torch.testing.assert_close(found, -3.0 * (1 - kwargs["alpha_prod"]).sqrt() * gradient)


class Linear(torch.nn.Module):
    """An autoencoder that loses nothing: latents are the pixels of each square, mixed by an orthogonal matrix."""

    def __init__(self, pipe):
        super().__init__()
        self.config = {**pipe.vae.config, "latent_channels": 48, "scaling_factor": 2.0}
        self.dtype, self.device = torch.float32, torch.device("cpu")
        matrix, _ = torch.linalg.qr(randn(48, 48, seed=5))
        self.matrix = torch.nn.Parameter(matrix)

    def encode(self, photos):
        latents = torch.einsum("dc,nchw->ndhw", self.matrix, torch.nn.functional.pixel_unshuffle(photos, FACTOR))
        return type("Output", (), {"latents": latents})

    def decode(self, latents):
        photos = torch.nn.functional.pixel_shuffle(torch.einsum("dc,ndhw->nchw", self.matrix, latents), FACTOR)
        return type("Output", (), {"sample": photos})


def test_color_guidance_means_the_same_on_latents_as_on_pixels(latent_pipeline, tiny_pipeline):
    vae = Linear(latent_pipeline)
    photos = 0.15 * randn(2, 3, PIXEL_SIZE, PIXEL_SIZE).clamp(-2, 2)
    colors = Colors(torch.tensor([0.5, -0.3, 0.2]).reshape(1, 3, 1, 1), torch.ones(1, 1, PIXEL_SIZE, PIXEL_SIZE))
    alpha = cosine_alphas_cumprod()[TIMESTEP].float().reshape(1, 1, 1, 1)
    original = encode_photos(vae, photos)
    torch.testing.assert_close(decode_latents(vae, original), photos, rtol=0, atol=1e-5)

    def change(pipe, original, scale):
        kwargs = {"pred_original_sample": original, "alpha_prod": alpha, "predictor": pipe.predictor}
        delta = ColorGuidanceCallback(colors, scale).noise_delta(pipe, torch.tensor(TIMESTEP), kwargs)
        return -delta / (alpha / (1 - alpha)).sqrt()

    latent_pipeline.vae = vae
    for scale in (0.5, 1.0):
        expected = change(tiny_pipeline, photos, scale)
        found = decode_latents(vae, original + change(latent_pipeline, original, scale)) - photos
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)
    assert (blur(photos + expected) - colors.candidates).abs().mean() < 0.1


def test_colors_and_guidance_of_all_kinds_reach_the_photos(latent_pipeline, large_sketches, generators):
    def run(**options):
        fast = {"num_images_per_sketch": 1, "num_inference_steps": STEPS, "output_type": "pt"}
        return latent_pipeline(large_sketches[0], "a", generator=generators(1), **fast, **options).images

    plain = run(sketch_guidance_scale=1.0)
    assert torch.equal(run(sketch_guidance_scale=1.0, color_hint=["red"], color_guidance_scale=0.0), plain)
    for options in (
        {"sketch_guidance_scale": 3.0},
        {"classifier_guidance_scale": 5.0},
        {"perceptual_guidance_scale": 0.2},
        {"guidance_callbacks": SketchGuidanceCallback(0.2, through_unet=True)},
        {"color_hint": ["red"], "color_guidance_scale": 1.0},
    ):
        assert (run(**{"sketch_guidance_scale": 1.0, **options}) - plain).abs().max() > 1e-3


# ---- editing and interpolation ----------------------------------------------------------------------------------------


BOX = (12, 10, 28, 30)
EDIT = {"num_inference_steps": 4, "class_labels": "a", "strength": 0.8, "num_resample_steps": 1}


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.fixture
def edit_pipe(latent_pipeline):
    pipe = DiffSketchingEditPipeline.from_pipe(latent_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Spy(GuidanceCallback):
    """Adds nothing and keeps what it was given at each step."""

    def noise_delta(self, pipeline, timestep, callback_kwargs):
        self.seen = callback_kwargs
        return torch.zeros_like(callback_kwargs["latents"])


def test_an_edit_on_latents_keeps_the_photo_bit_for_bit_outside(edit_pipe, photo, generators):
    out = edit_pipe(photo, BOX, generator=generators(2), num_images_per_sketch=2, eta=1.0, **EDIT)
    inside = np.zeros((40, 48), bool)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    for image in out.images:
        changed = (np.asarray(image) != np.asarray(photo)).any(axis=2)
        assert not changed[~inside].any() and changed[inside].mean() > 0.9
    assert out.images[0].tobytes() != out.images[1].tobytes()


def test_a_latent_may_change_where_one_of_its_pixels_may(edit_pipe):
    inside = torch.zeros(1, 1, PIXEL_SIZE, PIXEL_SIZE, dtype=torch.bool)
    inside[..., 7:13, 8] = True
    mask = edit_pipe.prepare_latent_mask(inside)
    assert mask.dtype == torch.bool and mask[0, 0].nonzero().tolist() == [[1, 2], [2, 2], [3, 2]]


def test_the_surroundings_are_the_latents_of_the_photo(edit_pipe, photo, generators):
    latents = edit_pipe(photo, BOX, generator=generators(1), output_type="latent", **EDIT).images
    region = edit_pipe.prepare_region(photo, edit_pipe.prepare_mask_image(photo, BOX), 0.5)
    part, inside = edit_pipe.prepare_photo(region)
    given, mask = encode_photos(edit_pipe.vae, part), edit_pipe.prepare_latent_mask(inside)
    assert 0 < mask.sum() < mask.numel()
    outside = ~mask.expand_as(latents)
    torch.testing.assert_close(latents[outside], given[outside].detach(), rtol=0, atol=1e-6)
    assert (latents - given)[~outside].abs().max() > 0.01


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_edits_take_drawings_mixtures_colors_and_abstraction(strength, edit_pipe, photo, generators):
    page = Image.new("L", (192, 160), 255)
    ImageDraw.Draw(page).line((80, 48, 80, 112), fill=0, width=6)
    spy = Spy()
    options = {"sketch": page, "color_hint": ["navy"], "sketch_abstraction": 0.5, "guidance_callbacks": spy}
    options |= {**EDIT, "class_labels": {"a": 1, "c": 1}, "strength": strength, "num_resample_steps": 2}
    planes = []
    edit_pipe.unet.register_forward_pre_hook(lambda module, args: planes.append(float(args[0][:, -1].max())))
    out = edit_pipe(photo, BOX, generator=generators(1), **options)
    assert out.class_labels == [{"a": 0.5, "c": 0.5}] and out.images[0].size == photo.size
    assert spy.seen["sketch"].shape == (2, 1, PIXEL_SIZE, PIXEL_SIZE)
    # The photo is inverted without a drawing, and so without an abstraction.
    assert planes[0] == 0.0 and planes[-1] == 0.5 == edit_pipe.sketch_abstraction


def test_interpolation_on_latents_meets_its_keys(latent_pipeline, large_sketches, generators):
    pipe = DiffSketchingInterpolationPipeline.from_pipe(latent_pipeline)
    pipe.set_progress_bar_config(disable=True)
    noise, options = randn(2, *SHAPE), {"num_inference_steps": STEPS, "output_type": "latent"}
    frames = pipe(
        list(large_sketches[:2]),
        class_labels=["a", {"b": 1, "c": 1}],
        num_frames=3,
        latents=noise,
        sketch_abstraction=0.5,
        **options,
    ).images
    keys = latent_pipeline(
        list(large_sketches[:2]), ["a", {"b": 1, "c": 1}], 1, latents=noise, sketch_abstraction=0.5, **options
    ).images
    torch.testing.assert_close(frames[[0, 2]], keys, rtol=0, atol=5e-3)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :LATENT_CHANNELS]))
    pipe(list(large_sketches[:2]), class_labels="a", num_frames=3, latents=noise, sketch_guidance_scale=1.0, **options)
    middle = [row for row in seen[0] if not any(torch.allclose(row, end) for end in noise)]
    torch.testing.assert_close(middle[0], slerp(noise[0], noise[1], 0.5))


@pytest.mark.slow
def test_interpolation_between_photos_begins_with_the_first(latent_pipeline, large_sketches):
    pipe = DiffSketchingInterpolationPipeline.from_pipe(latent_pipeline)
    pipe.set_progress_bar_config(disable=True)
    photos = torch.rand(2, 3, PIXEL_SIZE, PIXEL_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"num_inference_steps": 25, "num_fixed_point_iterations": 3, "output_type": "latent"}
    frames = pipe(images=photos, class_labels="a", num_frames=3, **options).images
    given = encode_photos(pipe.vae, photos).detach()
    assert (frames[[0, 2]] - given).square().mean().sqrt() < 0.1 * given.std()


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_a_latent_checkpoint_comes_back_from_its_folder(kind, latent_pipeline, large_sketches, generators, tmp_path):
    if kind == "kl":
        latent_pipeline.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=LATENT_CHANNELS,
        ).eval()
    recommended = {"num_inference_steps": 2, "sketch_abstraction": 0.5, "class_mixture": 0.75}
    pipe = DiffSketchingPipeline.from_pipe(latent_pipeline, recommended=recommended)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", {"tiny": "AutoencoderTiny", "kl": "AutoencoderKL"}[kind]]
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path)
    assert loaded.recommended == recommended and loaded.vae.dtype == torch.float32
    found = [
        each(large_sketches[0], "a", 1, generator=generators(1), output_type="np").images for each in (pipe, loaded)
    ]
    assert np.array_equal(*found)
    edit = DiffSketchingEditPipeline.from_pipe(loaded)
    assert edit.vae is loaded.vae and edit.height == PIXEL_SIZE
    with pytest.raises(ValueError, match="latents.*`vae`"):
        DiffSketchingPipeline.from_pretrained(tmp_path, vae=None)
    half = DiffSketchingPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    photos = half(large_sketches[0], "a", 1, perceptual_guidance_scale=0.1, output_type="pt").images
    assert half.vae.dtype == torch.bfloat16 and photos.dtype == torch.float32


# ---- the command line and the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(latent_pipeline_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "latent"
    latent_pipeline_factory(recommended={"num_inference_steps": 2}).save_pretrained(folder)
    return folder


@pytest.fixture
def drawing(tmp_path):
    page = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(page).rectangle((14, 12, 26, 28), outline="black", width=2)
    page.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["diffsketching", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


COMMANDS = {
    "generate": (("drawing.png", "--num-images", 1), "drawing_0.png", (PIXEL_SIZE, PIXEL_SIZE)),
    "edit": (("photo.png", "--sketch", "drawing.png", "--num-images", 1), "photo_0.png", (48, 40)),
    "interpolate": (("drawing.png", "--class-label", "b", "--num-frames", 2), None, None),
    "matrix": (("drawing.png", "--class-label", "a", "--num-images", 1), "drawing_a_0.png", (PIXEL_SIZE, PIXEL_SIZE)),
    "invert": (("photo.png", "--steps", 50, "--iterations", 5), "photo_back.png", (PIXEL_SIZE, PIXEL_SIZE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_on_latents(command, checkpoint, drawing, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    arguments, name, size = COMMANDS[command]
    if command == "interpolate":
        Image.open(drawing).rotate(90).save("other.png")
        arguments, name, size = (arguments[0], "other.png", *arguments[1:]), "drawing-other_001.png", (PIXEL_SIZE,) * 2
    abstraction = () if command == "invert" else ("--sketch-abstraction", 0.5)
    options = ("--model", checkpoint, "--output-dir", "out", "--device", "cpu")
    assert run(monkeypatch, command, *arguments, *abstraction, *options) == 0
    assert Image.open(f"out/{name}").size == size
    record = json.loads((tmp_path / "out" / "metadata.json").read_text())["images"][0]
    if command == "invert":
        assert record["psnr_db"] > 30 and load_file("out/photo_noise.safetensors")["noise"].shape == (1, *SHAPE)
    else:
        assert record["sketch_abstraction"] == 0.5


def test_info_tells_the_size_of_the_latents(checkpoint, monkeypatch, capsys):
    assert run(monkeypatch, "info", checkpoint) == 0
    shown = capsys.readouterr().out
    assert "size: 32x32 (latents 8x8, 4 channels)   input: latents + sketch + abstraction" in shown
    assert "AutoencoderTiny" in shown


def test_the_command_line_refuses_an_abstraction_that_is_none(checkpoint, drawing, monkeypatch, capsys, tmp_path):
    options = ("--model", checkpoint, "--output-dir", tmp_path / "out", "--device", "cpu")
    assert run(monkeypatch, "generate", drawing, "--sketch-abstraction", 2, *options) == 2
    assert "`sketch_abstraction` must be in [0, 1] or None, but got 2.0" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out" / "metadata.json")


def test_the_page_previews_photos_of_latents(latent_pipeline_factory, drawing, photo):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install .[demo]")
    from diffsketching_pipeline.demo.service import DemoService, PhotoRequest, more_like_this

    service = DemoService(latent_pipeline_factory(recommended={"num_inference_steps": 5, "sketch_abstraction": 0.25}))
    assert service.call_settings(0.5)["sketch_guidance_scale"] == 2.0
    page = Image.open(drawing).resize((120, 100))
    *progress, photos = service.make_photos(PhotoRequest(page, "b", 2, seed=7), "me")
    previews = [image for update in progress for image in update.images or []]
    assert len(previews) == 4 and {image.size for image in [*previews, *photos.images]} == {(PIXEL_SIZE, PIXEL_SIZE)}
    assert photos.records[0]["sketch_abstraction"] == 0.25
    *_, like = service.make_photos(more_like_this(photos, 1, seed=3, num_images=1), "me")
    assert like.records[0]["variations"] and like.images[0].size == (PIXEL_SIZE, PIXEL_SIZE)
    strokes = Image.open(drawing)
    *_, edited = service.edit_photo(photo, strokes, "a", 1, 0, 0.5, "me")
    assert edited.images[0].size == photo.size
    *_, frames = service.interpolate([page, page.rotate(90, fillcolor="white")], "a", 2, 0, "me")
    assert len(frames.images) == 2


def test_an_encoder_that_names_its_size_is_shown_the_drawing_at_that_size(latent_pipeline, large_sketches):
    encoder = latent_pipeline.sketch_encoder
    sketch = large_sketches[:1]
    plain = latent_pipeline.predict_class_probabilities(sketch)
    encoder.config.image_size = 16
    found = latent_pipeline.predict_class_probabilities(sketch)
    small = sketch.reshape(1, 1, 16, 2, 16, 2).mean(dim=(3, 5))
    with torch.no_grad():
        torch.testing.assert_close(found, encoder(small).logits.softmax(dim=-1)[0])
    assert not torch.allclose(found, plain)
