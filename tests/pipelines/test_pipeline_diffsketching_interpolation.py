# SPDX-License-Identifier: Apache-2.0
import logging

import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from testing_utils import SIZE, randn

from diffsketching_pipeline import DiffSketchingInterpolationPipeline, GuidanceCallback
from diffsketching_pipeline.pipeline_diffsketching_interpolation import frame_positions, slerp


STEPS = {"num_inference_steps": 4, "output_type": "latent"}
SCALES = {"sketch_guidance_scale": 1.5, "classifier_guidance_scale": 1.0}


@pytest.fixture
def pipe(tiny_pipeline):
    pipe = DiffSketchingInterpolationPipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("eta", "seeds"), [(0.0, [5]), (1.0, [5, 6, 7])])
def test_frames_at_keys_are_the_plain_results(pipe, tiny_pipeline, sketches, eta, seeds):
    options = {**STEPS, **SCALES, "eta": eta}
    generators = [seeded(seed) for seed in seeds]
    generator = generators if len(seeds) > 1 else generators[0]
    frames = pipe(list(sketches), class_labels=["a", "b", "c"], num_frames=5, generator=generator, **options)
    assert frames.images.shape == (5, 3, SIZE, SIZE) and frames.class_labels == ["a", "b", "c"]
    for key, frame in ((0, 0), (1, 2), (2, 4)):
        generator = [seeded(seeds[key])] if len(seeds) > 1 else seeded(seeds[0])
        alone = tiny_pipeline(sketches[key], "abc"[key], 1, generator=generator, **options).images
        torch.testing.assert_close(frames.images[frame], alone[0], atol=1e-4, rtol=0)
    assert not torch.allclose(frames.images[0], frames.images[1], atol=1e-2)


def test_between_keys_the_predictions_and_the_noise_are_blended(pipe, tiny_pipeline, sketches):
    class Spy(GuidanceCallback):
        def noise_delta(self, pipeline, timestep, callback_kwargs):
            self.seen = {**callback_kwargs}
            return torch.zeros_like(callback_kwargs["latents"])

    noise, spy = randn(2, 3, SIZE, SIZE), Spy()
    options = {"num_inference_steps": 1, "output_type": "latent", "clip_sample": False, "sketch_guidance_scale": 1.0}
    options |= {"classifier_guidance_scale": 0.0, "guidance_callbacks": spy}
    pipe(list(sketches[:2]), class_labels=["a", "b"], num_frames=5, latents=noise, **options)
    frames = spy.seen
    # A quarter of the way, between two independent draws of noise: slerp is by their angle.
    start, end = noise.flatten(1)
    angle = torch.arccos(torch.dot(start, end) / (start.norm() * end.norm()))
    expected = (torch.sin(0.75 * angle) * noise[0] + torch.sin(0.25 * angle) * noise[1]) / torch.sin(angle)
    torch.testing.assert_close(frames["latents"][1], expected)
    alone = []
    for key in (0, 1):
        tiny_pipeline(sketches[key], "ab"[key], 1, latents=expected[None], **options)
        alone.append(spy.seen["noise_pred"][0])
    torch.testing.assert_close(frames["noise_pred"][1], 0.75 * alone[0] + 0.25 * alone[1], atol=1e-5, rtol=0)


def test_one_generator_makes_the_noise_of_all_frames(pipe, sketches):
    walked = []

    def on_step_end(pipe, step_index, timestep, kwargs):
        walked.append(kwargs["latents"])
        return {}

    same = [sketches[0], sketches[0]]
    options = {**STEPS, "eta": 1.0, "class_labels": "a", "callback_on_step_end": on_step_end}
    pipe(same, num_frames=3, generator=seeded(), **options)
    assert len(walked) == 4
    for latents in walked:
        torch.testing.assert_close(latents, latents[:1].expand_as(latents), atol=1e-5, rtol=0)
    other = pipe(same, num_frames=3, generator=[seeded(0), seeded(1)], **options).images
    assert not torch.allclose(other[0], other[2], atol=1e-2)


def test_photos_come_back_at_the_ends(pipe, tiny_pipeline):
    photos = torch.rand(2, 3, SIZE, SIZE, generator=seeded())
    frames = pipe(images=photos, class_labels=["a", "b"], num_frames=3, **STEPS).images
    noise = tiny_pipeline.invert(photos, ["a", "b"], num_inference_steps=4)
    back = tiny_pipeline(None, ["a", "b"], 1, latents=noise, clip_sample=False, **STEPS).images
    torch.testing.assert_close(frames[[0, 2]], back, atol=1e-5, rtol=0)
    assert pipe.guidance_scales["classifier_guidance_scale"] == 0.0 and pipe.eta == 0.0


def test_given_noise_without_clipping_leads_where_the_plain_pipeline_goes(tiny_pipeline_factory, sketches):
    plain = tiny_pipeline_factory(recommended={"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0})
    pipe = DiffSketchingInterpolationPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    noise = randn(2, 3, SIZE, SIZE)
    for clip_sample, scale in ((False, 1.0), (True, 2.0)):
        options = {**STEPS, "clip_sample": clip_sample}
        frames = pipe(list(sketches[:2]), class_labels=["a", "b"], num_frames=2, latents=noise, **options).images
        assert pipe.guidance_scales["sketch_guidance_scale"] == scale
        alone = plain(list(sketches[:2]), ["a", "b"], 1, latents=noise, **options).images
        torch.testing.assert_close(frames, alone, atol=1e-4, rtol=0)


def test_photos_are_not_inverted_for_a_call_that_fails(pipe):
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    photos = torch.rand(2, 3, SIZE, SIZE, generator=seeded())
    with pytest.raises(ValueError, match="`classifier_guidance_scale=1.0`.*class"):
        pipe(images=photos, num_frames=3, classifier_guidance_scale=1.0, **STEPS)
    assert not calls


def test_a_drawing_that_is_not_used_is_warned_of(tiny_pipeline_factory, sketches, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = DiffSketchingInterpolationPipeline.from_pipe(tiny_pipeline_factory(in_channels=3))
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING):
        pipe(list(sketches[:2]), class_labels=["a", "b"], num_frames=2, **STEPS)
    assert [record.message[:46] for record in caplog.records] == [
        "This call does not use the `sketches` for anyth"[:46]
    ]


def test_between_classes_of_one_drawing_and_of_none(pipe, tiny_pipeline, sketches):
    for sketch in (sketches[:1], None):
        frames = pipe(sketch, class_labels=["a", {"b": 1, "c": 3}], num_frames=2, generator=seeded(), **STEPS)
        assert frames.class_labels == ["a", {"b": 0.25, "c": 0.75}]
        alone = tiny_pipeline(sketch, {"b": 1, "c": 3}, 1, generator=seeded(), **STEPS).images
        torch.testing.assert_close(frames.images[1:], alone, atol=1e-4, rtol=0)


def test_frames_in_bfloat16_under_inference_mode(pipe, sketches):
    pipe.to(torch.bfloat16)
    with torch.inference_mode():
        options = {"class_labels": ["a", "b"], "num_frames": 3, "perceptual_guidance_scale": 0.1, **SCALES, **STEPS}
        frames = pipe(list(sketches[:2]), generator=seeded(), **options).images
    assert frames.shape == (3, 3, SIZE, SIZE) and torch.isfinite(frames).all()


def test_other_schedulers_interpolate(pipe, sketches):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    frames = pipe(list(sketches[:2]), class_labels="a", num_frames=3, generator=seeded(), **STEPS).images
    assert torch.isfinite(frames).all()


def test_frames_are_spread_evenly_over_the_keys():
    assert frame_positions(2, 3) == [(0, 0.0), (0, 0.5), (1, 0.0)]
    assert frame_positions(3, 5) == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5), (2, 0.0)]
    assert frame_positions(3, 4) == [(0, 0.0), (0, 2 / 3), (1, 1 / 3), (2, 0.0)]


def test_slerp_keeps_the_norm_and_falls_back_to_a_line():
    start, end = randn(3, 8, 8, seed=1), randn(3, 8, 8, seed=2)
    end = end * (start.norm() / end.norm())
    torch.testing.assert_close(slerp(start, end, 0.3).norm(), start.norm())
    torch.testing.assert_close(slerp(start, end, 0.5), slerp(end, start, 0.5))
    torch.testing.assert_close(slerp(start, start, 0.3), start)
    torch.testing.assert_close(slerp(start, 3 * start, 0.5), 2 * start)
    assert torch.isfinite(slerp(start, -start, 0.5)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "two or more keys.* none"),
        ({"images": torch.zeros(1, 3, SIZE, SIZE)}, " 1 in `images`"),
        ({"class_labels": ["a"]}, " 1 in `class_labels`"),
        (
            {"class_labels": ["a", "b"], "latents": torch.zeros(3, 3, SIZE, SIZE)},
            "2 in `class_labels`, 3 in `latents`",
        ),
        ({"class_labels": ["a", "b"], "num_frames": 1}, "`num_frames`.* 1"),
        ({"class_labels": ["a", "b"], "generator": [seeded()] * 3}, "`generator`.* 2.* 3"),
        ({"images": torch.zeros(2, 3, SIZE, SIZE), "eta": 0.5}, "`eta=0.5`.*`images`"),
        ({"images": torch.zeros(2, 3, SIZE, SIZE), "generator": seeded()}, "`generator` is the noise"),
    ],
)
def test_bad_input_is_one_clear_error(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=2, **arguments)


def test_one_sketch_is_refused(pipe, sketches):
    with pytest.raises(ValueError, match=" 1 in `sketches`.*list"):
        pipe(sketches[0], num_inference_steps=2)


def test_noise_that_cannot_be_interpolated_is_refused(pipe, sketches):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDPMScheduler.*interpolated"):
        pipe(list(sketches[:2]), num_inference_steps=2)
