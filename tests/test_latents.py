# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""All that is different where a `vae` makes x_t latents: spaces, sizes, sampling, guidance, editing, files, commands."""

import logging

import numpy as np
import pytest
import torch
from testing_utils import (
    FACTOR,
    LATENT_CHANNELS,
    LATENT_SIZE,
    PIXEL_SIZE,
    SIZE,
    cosine_alphas_cumprod,
    make_scheduler,
    make_unet,
    make_vae,
    randn,
)

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.autoencoding import decode_latents, encode_photos
from diffsketching_pipeline.denoising import UNetInputs, get_unet_inputs, join_unet_inputs


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
            *(latent_pipeline_factory(in_channels=n) for n in (4, 20, 21)),
            *(tiny_pipeline_factory(in_channels=n) for n in (3, 4, 5)),
        )
    ]
    assert found == 2 * [(False, False), (True, False), (True, True)]
    assert (tiny_pipeline.height, tiny_pipeline.sample_size, tiny_pipeline.sample_channels) == (SIZE, (SIZE, SIZE), 3)


def test_components_of_different_spaces_are_refused(latent_pipeline_factory, tiny_pipeline):
    pipe = latent_pipeline_factory()
    for changes, message in (
        (
            {"vae": None},
            "got `in_channels=21`. Here x_t is in the space of photos: one that denoises latents needs its",
        ),
        ({"vae": None, "unet": make_unet(4, 4)}, "has to have 3 output channels, .* latents needs its `vae`"),
        (
            {"vae": make_vae(latent_channels=8)},
            "`unet` must have 8 input channels .* `vae`, with 8 channels and 4 pixels",
        ),
        ({"vae": make_vae(factor=8)}, "68 .with the drawing.* `in_channels=21`.* with 4 channels and 8 pixels"),
        ({"unet": tiny_pipeline.unet, "classifier": None}, "`unet` has to have 4 output channels, or 8 .*=3"),
        (
            {"classifier": tiny_pipeline.classifier},
            "`classifier` must judge what `unet` denoises, 4 channels of 8 x 8, but",
        ),
        ({"recommended": {"sketch_abstraction": 1.5}}, r"`recommended` must have a `sketch_abstraction` in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffSketchingPipeline.from_pipe(pipe, **changes)
    with pytest.raises(ValueError, match="`photos` must have sides that are multiples of 4, .* but got 30 x 32"):
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
    with pytest.raises(ValueError, match="`clip_sample` must be None or False with a `vae`.* but got True"):
        pipe(large_sketches, "a", clip_sample=True, **FAST)


def test_given_noise_has_the_size_of_the_latents(latent_pipeline, large_sketches):
    with pytest.raises(ValueError, match=r"`latents` has to have shape \(1, 4, 8, 8\) but has \(1, 3, 32, 32\)"):
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
    (shares,) = latent_pipeline.prepare_sketch_masks([[left, 255 - left]], groups)
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
        (1.5, r"`sketch_abstraction` must be in \[0, 1\] or None, but got 1.5"),
        (True, "got True"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(large_sketches[0], "a", sketch_abstraction=value, **FAST)
    with pytest.raises(ValueError, match="`sketch_abstraction=0.5` needs a drawing"):
        pipe(None, "a", sketch_abstraction=0.5, **FAST)


def test_near_classes_are_mixed_where_the_checkpoint_says_so(tiny_pipeline_factory, sketches, monkeypatch):
    guess = torch.tensor([0.4, 0.1, 0.5])
    for ratio, expected in ((None, "c"), (0.9, "c"), (0.8, {"c": 5 / 9, "a": 4 / 9}), (0.0, {"c": 5 / 9, "a": 4 / 9})):
        pipe = tiny_pipeline_factory(recommended=None if ratio is None else {"class_mixture": ratio})
        monkeypatch.setattr(pipe, "predict_class_probabilities", lambda sketch: guess)
        out = pipe(sketches[0], None, 1, 1)
        assert out.class_labels == [pytest.approx(expected) if isinstance(expected, dict) else expected]
        assert torch.equal(out.class_probabilities, guess[None])
        assert pipe(sketches[0], "b", 1, 1).class_labels == ["b"]


def test_image_is_another_name_of_sketch(tiny_pipeline, sketches):
    options = {**FAST, "latents": randn(1, 3, SIZE, SIZE)}
    assert torch.equal(
        tiny_pipeline(image=sketches[0], class_labels="a", **options).images,
        tiny_pipeline(sketches[0], "a", **options).images,
    )
    with pytest.raises(ValueError, match="`image` is another name of `sketch`: give one of them"):
        tiny_pipeline(sketches[0], "a", image=sketches[0], **options)
