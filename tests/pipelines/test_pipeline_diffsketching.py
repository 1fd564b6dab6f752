# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import json
import logging
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from PIL import Image
from safetensors.torch import load_file
from testing_utils import COMPONENTS, SIZE, cosine_alphas_cumprod, make_scheduler, make_unet, randn

from diffsketching_pipeline import (
    DiffSketchingEditPipeline,
    DiffSketchingPipeline,
    DiffSketchingPipelineOutput,
    SketchGuidanceCallback,
)


STEPS = 3
FAST = {"num_images_per_sketch": 1, "num_inference_steps": STEPS, "output_type": "latent"}
GUIDED = {"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 2.0, "perceptual_guidance_scale": 0.1}


def levels(images):
    """8-bit values as integers."""
    return np.stack([np.asarray(image, dtype=int) for image in images])


# ---- eq. 4, against an implementation of its own ----------------------------------------------------------------------


def guided_ddim(pipe, sketch, labels, latents, steps, classifier_scale, sketch_scale):
    """
    guided-diffusion's order in float64: predict x̂_0, clip it, recompute ε, subtract the classifier's term, step without
    clipping. ᾱ, timesteps and the DDIM step (eq. 3) are written out.
    """
    unet, classifier = (copy.deepcopy(x).double() for x in (pipe.unet, pipe.classifier))
    no_class = labels if pipe.null_class is None else torch.full_like(labels, pipe.null_class)
    alphas_cumprod = cosine_alphas_cumprod()
    x, stride = latents.double(), 1000 // steps
    for t in range((steps - 1) * stride, -1, -stride):
        alpha = alphas_cumprod[t]
        alpha_prev = alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)

        def noise(channel, labels=labels, x=x, t=t, alpha=alpha):
            with torch.no_grad():
                sample = x if channel is None else torch.cat([x, channel], dim=1)
                output = unet(sample, t, labels).sample[:, :3]
            kind = pipe.scheduler.config.prediction_type
            if kind == "v_prediction":
                return alpha.sqrt() * output + (1 - alpha).sqrt() * x
            return output if kind == "epsilon" else (x - alpha.sqrt() * output) / (1 - alpha).sqrt()

        if unet.config.in_channels == 4:
            null = noise(torch.zeros_like(x[:, :1]), no_class)
            eps = null + sketch_scale * (noise(sketch.double()) - null)
        else:
            eps = noise(None)
        photo = ((x - (1 - alpha).sqrt() * eps) / alpha.sqrt()).clamp(-1, 1)
        eps = (x - alpha.sqrt() * photo) / (1 - alpha).sqrt()
        if classifier_scale:
            leaf = x.clone().requires_grad_(True)
            log_prob = torch.log_softmax(classifier(leaf, t).logits, dim=1)[range(len(x)), labels].sum()
            eps = eps - classifier_scale * (1 - alpha).sqrt() * torch.autograd.grad(log_prob, leaf)[0]
        photo = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        x = alpha_prev.sqrt() * photo + (1 - alpha_prev).sqrt() * eps
    return x


@pytest.mark.parametrize(
    ("prediction_type", "out_channels", "in_channels"),
    [("epsilon", 6, 3), ("epsilon", 3, 4), ("v_prediction", 6, 4), ("sample", 3, 4)],
)
def test_guided_sampling_follows_eq_4(prediction_type, out_channels, in_channels, tiny_pipeline_factory, sketches):
    pipe = tiny_pipeline_factory(
        prediction_type=prediction_type, out_channels=out_channels, in_channels=in_channels, components=("classifier",)
    )
    latents, sketch_scale = randn(2, 3, SIZE, SIZE, seed=3), 2.0 if in_channels == 4 else 1.0
    labels = torch.tensor([2, 0])
    found = {}
    for scale in (0.0, 20.0):
        found[scale] = pipe(
            sketches[:2],
            labels,
            1,
            4,
            sketch_guidance_scale=sketch_scale,
            classifier_guidance_scale=scale,
            latents=latents,
            output_type="latent",
        ).images
        expected = guided_ddim(pipe, sketches[:2], labels, latents, 4, scale, sketch_scale)
        torch.testing.assert_close(found[scale].double(), expected, rtol=0, atol=2e-4)
    assert (found[0.0] - found[20.0]).abs().max() > 0.02


# ---- the order of images, and what comes back -------------------------------------------------------------------------


def test_images_are_flat_and_sketch_major(tiny_pipeline, sketches):
    latents = randn(6, 3, SIZE, SIZE)
    options = {"num_inference_steps": STEPS, "output_type": "latent", **GUIDED}
    out = tiny_pipeline(sketches[:2], ["a", "b"], num_images_per_sketch=3, latents=latents, **options)
    assert isinstance(out, DiffSketchingPipelineOutput) and out.images.shape == (6, 3, SIZE, SIZE)
    assert out.class_labels == ["a", "b"] and out.class_probabilities.tolist() == [[1, 0, 0], [0, 1, 0]]
    for i in range(6):
        alone = tiny_pipeline(
            sketches[i // 3], "ab"[i // 3], num_images_per_sketch=1, latents=latents[i : i + 1], **options
        )
        torch.testing.assert_close(out.images[i : i + 1], alone.images, rtol=0, atol=1e-4)


def test_output_types(tiny_pipeline, sketches, generators):
    def call(output_type, **kwargs):
        options = {"num_images_per_sketch": 1, "num_inference_steps": STEPS, "clip_sample": False, **kwargs}
        return tiny_pipeline(sketches[:2], "a", generator=generators(2), output_type=output_type, **options)

    latent = call("latent").images
    assert latent.shape == (2, 3, SIZE, SIZE) and latent.dtype == torch.float32 and latent.abs().max() > 1
    expected = (latent.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(call("pt").images, expected)
    array = call("np").images
    assert array.shape == (2, SIZE, SIZE, 3)
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), expected)
    images = call("pil").images
    assert [image.size for image in images] == [(SIZE, SIZE)] * 2 and {image.mode for image in images} == {"RGB"}
    assert np.abs(levels(images) - 255 * array).max() <= 0.51
    fields = call("latent", return_dict=False)
    assert isinstance(fields, tuple) and len(fields) == 3 and torch.equal(fields[0], latent)
    assert fields[1] == ["a", "a"] and fields[2].shape == (2, 3)


def test_nothing_of_the_output_needs_grad(tiny_pipeline, sketches, generators):
    callback = SketchGuidanceCallback(0.1, through_unet=True)
    out = tiny_pipeline(sketches[:2], None, generator=generators(2), guidance_callbacks=callback, **FAST)
    assert not out.images.requires_grad and not out.class_probabilities.requires_grad


# ---- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_labels", "expected"),
    [
        ("B", ["b"] * 3),
        (np.array(1), ["b"] * 3),
        (["a", "C", "b"], ["a", "c", "b"]),
        ((0, 2, np.int32(1)), ["a", "c", "b"]),
        (np.array(["a", "c", "b"]), ["a", "c", "b"]),
        (torch.tensor([0, 2, 1]), ["a", "c", "b"]),
    ],
)
def test_forms_of_class_labels(class_labels, expected, tiny_pipeline, sketches, generators):
    out = tiny_pipeline(sketches, class_labels, generator=generators(3), **FAST)
    assert out.class_labels == expected
    same = tiny_pipeline(sketches, out.class_labels, generator=generators(3), **FAST)
    assert torch.equal(out.images, same.images)


def test_classes_that_are_not_given_are_predicted(tiny_pipeline, sketches, generators):
    with torch.no_grad():
        expected = tiny_pipeline.sketch_encoder(sketches).logits.softmax(dim=-1)
        # Otherwise the untrained encoder sees one class everywhere.
        tiny_pipeline.sketch_encoder.classifier[1].bias -= expected.log().mean(dim=0)
        expected = tiny_pipeline.sketch_encoder(sketches).logits.softmax(dim=-1)
    names = ["abc"[i] for i in expected.argmax(dim=1)]
    assert len(set(names)) > 1
    out = tiny_pipeline(sketches, generator=generators(3), **FAST)
    assert out.class_labels == names
    torch.testing.assert_close(out.class_probabilities, expected, rtol=0, atol=1e-5)
    same = tiny_pipeline(sketches, names, generator=generators(3), **FAST)
    assert torch.equal(out.images, same.images)

    mixed = tiny_pipeline(sketches, ["a", None, "b"], generator=generators(3), **FAST)
    assert mixed.class_labels == ["a", names[1], "b"]
    torch.testing.assert_close(mixed.class_probabilities[1], expected[1], rtol=0, atol=1e-5)
    assert mixed.class_probabilities[0].tolist() == [1, 0, 0]

    group = tiny_pipeline([[sketches[0], sketches[2]]], generator=generators(1), **FAST)
    torch.testing.assert_close(group.class_probabilities[0], expected[[0, 2]].mean(dim=0), rtol=0, atol=1e-5)


def test_no_class_is_the_null_class(tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(components=())
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    out = pipe(sketches, [None, "c", None], generator=generators(3), **FAST)
    assert out.class_labels == [None, "c", None] and seen == [[3, 2, 3]] * STEPS
    assert out.class_probabilities.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert pipe(sketches[:1], out.class_labels[:1], generator=generators(1), **FAST).class_labels == [None]
    seen.clear()
    pipe(sketches[:2], ["b", None], sketch_guidance_scale=2.0, generator=generators(2), **FAST)
    assert seen == [[1, 3, 3, 3]] * STEPS


@pytest.mark.parametrize(
    ("class_labels", "message"),
    [
        ("bb", "`class_labels`.*'bb'.* 'b'.* a, b, c"),
        ("trousers", "`class_labels`.*'trousers'.* a, b, c"),
        (3, "`class_labels`.* 3"),
        (-1, "`class_labels`.* -1"),
        (["a", "b"], r"`class_labels`.* 3.* 2"),
        ([], "`class_labels` is empty"),
        (1.0, "`class_labels`.* 1.0"),
        (True, "`class_labels`.* True"),
    ],
)
def test_classes_that_are_refused(class_labels, message, tiny_pipeline, sketches):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(sketches, class_labels, **FAST)


def test_close_class_names_are_listed(tiny_pipeline_factory):
    pipe = tiny_pipeline_factory(id2label={0: "T-Shirt", 1: "Shirt", 2: "Hat"}, components=())
    assert [pipe.get_label_id(name) for name in ("t-shirt", "SHIRT", "Hat")] == [0, 1, 2]
    with pytest.raises(ValueError, match="'tshirt'.*'t-shirt'.*'shirt'"):
        pipe.get_label_id("tshirt")


def test_a_checkpoint_without_names_takes_integers_only(tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(id2label=None, components=())
    out = pipe(sketches, [0, 3, 1], generator=generators(3), **FAST)
    assert out.class_labels == [0, 3, 1] and out.class_probabilities.shape == (3, 4)
    with pytest.raises(ValueError, match="`class_labels`.*'a'.*integers"):
        pipe(sketches, "a", **FAST)
    with pytest.raises(ValueError, match="`class_labels`.* 4"):
        pipe(sketches, 4, **FAST)
    with pytest.raises(ValueError, match="`class_labels` is needed"):
        pipe(sketches, **FAST)


def test_a_network_without_classes_is_still_guided_by_a_classifier(tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(num_class_embeds=None, components=("classifier",))
    plain, guided = (
        pipe(sketches, "b", classifier_guidance_scale=scale, generator=generators(3), **FAST).images
        for scale in (0.0, 20.0)
    )
    assert (plain - guided).abs().max() > 0.02
    unconditional = tiny_pipeline_factory(num_class_embeds=None, components=(), id2label=None)
    out = unconditional(sketches, generator=generators(3), **FAST)
    assert torch.equal(out.images, plain)
    assert out.class_labels == [None] * 3 and out.class_probabilities is None
    with pytest.raises(ValueError, match="`class_labels` is 'b'.*no classes"):
        unconditional(sketches, "b", **FAST)


# ---- without a drawing ------------------------------------------------------------------------------------------------


def test_rows_without_a_drawing(tiny_pipeline, generators):
    def rows(**kwargs):
        return len(tiny_pipeline(num_inference_steps=1, output_type="latent", **kwargs).images)

    assert rows(num_images_per_sketch=2) == 2
    assert rows(class_labels="a", num_images_per_sketch=2) == 2
    assert rows(class_labels=["a", "b", None], num_images_per_sketch=2) == 6
    assert rows(class_labels=np.array(1), num_images_per_sketch=2) == 2
    assert rows(latents=randn(6, 3, SIZE, SIZE), num_images_per_sketch=2) == 6
    with pytest.raises(ValueError, match="`latents`.* 5 .*`num_images_per_sketch=2`"):
        rows(latents=randn(5, 3, SIZE, SIZE), num_images_per_sketch=2)
    assert rows(latents=randn(6, 3, SIZE, SIZE), class_labels="a", num_images_per_sketch=2) == 6
    with pytest.raises(ValueError, match=r"`latents`.* \(2, 3, 16, 16\).* \(6, 3, 16, 16\)"):
        rows(latents=randn(6, 3, SIZE, SIZE), class_labels=["a"], num_images_per_sketch=2)


def test_no_drawing_is_the_zero_channel_and_the_null_class(tiny_pipeline, generators):
    seen = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[2])))
    out = tiny_pipeline(generator=generators(1), **FAST)
    assert out.class_labels == [None]
    for sample, labels in seen:
        assert sample.shape == (1, 4, SIZE, SIZE) and not sample[:, 3].any() and labels.tolist() == [3]


# ---- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        (
            {"classifier_guidance_scale": 1.0},
            {},
            "`classifier_guidance_scale=1.0`.*`classifier`.*`NoisyImageClassifier",
        ),
        ({"perceptual_guidance_scale": 0.1}, {}, "`perceptual_guidance_scale=0.1`.*`sketcher`.*`PhotoSketcher"),
        (
            {"perceptual_guidance_scale": 0.1},
            {"components": ("sketcher",)},
            "`perceptual_guidance_scale=0.1`.*`sketch_encoder`",
        ),
        (
            {"sketch_guidance_scale": 0.0},
            {"in_channels": 3},
            "`sketch_guidance_scale=0.0`.* 4 .*`expand_unet_for_sketch`.* 1.0",
        ),
        ({"sketch_guidance_scale": float("nan")}, {}, "`sketch_guidance_scale`.* nan"),
        ({"classifier_guidance_scale": "2"}, {}, "`classifier_guidance_scale`.* '2'"),
        ({"perceptual_guidance_scale": True}, {}, "`perceptual_guidance_scale`.* True"),
    ],
)
def test_scales_that_are_refused(scales, options, message, tiny_pipeline_factory, sketches):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline_factory(**{"components": (), **options})(sketches, "a", **scales, **FAST)


def test_off_values_need_no_component(tiny_pipeline_factory, sketches, generators):
    off = {"sketch_guidance_scale": 1.0, "classifier_guidance_scale": 0, "perceptual_guidance_scale": 0.0}
    for in_channels in (3, 4):
        pipe = tiny_pipeline_factory(components=(), in_channels=in_channels)
        found = pipe(sketches, "a", generator=generators(3), **off, **FAST).images
        assert torch.equal(found, pipe(sketches, "a", generator=generators(3), **FAST).images)
        pipe(None, "a", generator=generators(1), **off, **FAST)


def test_guidance_by_a_drawing_needs_a_drawing(tiny_pipeline):
    for scales in ({"sketch_guidance_scale": 2.0}, {"perceptual_guidance_scale": 0.1}):
        [(name, scale)] = scales.items()
        with pytest.raises(ValueError, match=f"`{name}={scale}` .*`sketch`"):
            tiny_pipeline(None, "a", **scales, **FAST)


def test_none_is_the_recommendation_and_off_where_it_cannot_be_followed(tiny_pipeline_factory, sketches, generators):
    recommended = {"num_inference_steps": 5, **GUIDED}
    plain = tiny_pipeline_factory()
    options = {"num_images_per_sketch": 1, "output_type": "latent"}

    def call(pipe, sketch=sketches, labels="a", **kwargs):
        return pipe(sketch, labels, generator=generators(3), **options, **kwargs).images

    pipe = tiny_pipeline_factory(recommended=recommended)
    assert torch.equal(call(pipe), call(plain, **recommended))
    assert pipe.guidance_scales == GUIDED
    assert torch.equal(
        call(pipe, sketch_guidance_scale=1.0), call(plain, **{**recommended, "sketch_guidance_scale": 1.0})
    )
    # No drawing: only the classifier is left. No class: only the drawing.
    call(pipe, None, ["a", "b", "c"])
    assert pipe.guidance_scales == {**GUIDED, "sketch_guidance_scale": 1.0, "perceptual_guidance_scale": 0.0}
    bare = tiny_pipeline_factory(components=(), in_channels=3, recommended=recommended)
    call(bare)
    assert bare.guidance_scales == {
        "sketch_guidance_scale": 1.0,
        "classifier_guidance_scale": 0.0,
        "perceptual_guidance_scale": 0.0,
    }
    no_class = tiny_pipeline_factory(components=("classifier",), recommended=recommended)
    call(no_class, labels=["a", None, "b"])
    assert no_class.guidance_scales["classifier_guidance_scale"] == 0.0


def test_numpy_numbers_are_numbers(tiny_pipeline, sketches, generators):
    found = tiny_pipeline(
        sketches[:1],
        "a",
        num_images_per_sketch=np.int64(1),
        num_inference_steps=np.int64(STEPS),
        classifier_guidance_scale=np.float32(2.0),
        generator=generators(1),
        output_type="latent",
    ).images
    same = tiny_pipeline(sketches[:1], "a", classifier_guidance_scale=2.0, generator=generators(1), **FAST).images
    assert torch.equal(found, same)


# ---- seeds ------------------------------------------------------------------------------------------------------------


SEEDED = {
    "ddim-eta": (DDIMScheduler, {}, {"eta": 0.8}),
    "ddpm": (DDPMScheduler, {}, {}),
    "sde-dpm": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.parametrize("name", SEEDED)
def test_an_image_does_not_depend_on_its_batch(name, tiny_pipeline, sketches, generators):
    cls, options, call_options = SEEDED[name]
    tiny_pipeline.scheduler = cls.from_config(tiny_pipeline.scheduler.config, **options)
    started = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: started.append(args[0][:, :3].clone()))

    def call(sketch, num_images, seeds):
        started.clear()
        out = tiny_pipeline(
            sketch, "b", num_images, 4, generator=seeds, **{**GUIDED, "sketch_guidance_scale": 1.0}, **call_options
        )
        return levels(out.images), started[0]

    eight, noise = call(sketches[:2], 4, generators(8))
    assert np.abs(eight[0] - eight[1]).max() > 20
    for first, count in ((0, 1), (5, 1), (2, 2)):
        found, start = call(sketches[first // 4], count, generators(count, first))
        assert torch.equal(start, noise[first : first + count])
        assert np.abs(found - eight[first : first + count]).max() <= 2


def test_a_single_generator_is_expanded_to_one_per_image(tiny_pipeline, sketches):
    def call(num_images, seed=3, labels="a"):
        return tiny_pipeline(
            sketches[:1],
            labels,
            num_images,
            STEPS,
            eta=0.5,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images

    eight = call(8)
    for count in (1, 3):
        torch.testing.assert_close(call(count), eight[:count], rtol=0, atol=1e-4)
    assert (eight[0] - eight[1]).abs().max() > 0.1 and not torch.equal(call(1, seed=4), call(1))


def test_without_a_generator_the_global_seed_decides(tiny_pipeline, sketches):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(tiny_pipeline(sketches[:1], "a", **FAST).images)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_generators_and_latents_that_are_refused(tiny_pipeline, sketches, generators):
    for options, message in (
        ({"generator": generators(2)}, "`generator`.* 3.* 2"),
        ({"generator": 5}, "`generator`.*`torch.Generator`"),
        ({"generator": [*generators(2), None]}, "`generator`.*list.* None"),
        ({"latents": randn(3, 3, 8, 8)}, r"`latents`.* \(3, 3, 16, 16\).* \(3, 3, 8, 8\)"),
        ({"latents": randn(3, 3, SIZE, SIZE) / 0}, "`latents`.* NaN"),
        ({"latents": np.zeros((3, 3, SIZE, SIZE))}, "`latents`.* ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(sketches, "a", **options, **FAST)


def test_latents_are_the_start_and_are_not_changed(tiny_pipeline, sketches, generators):
    latents = randn(3, 3, SIZE, SIZE).to(torch.float64)
    before = latents.clone()
    found = tiny_pipeline(sketches, "a", latents=latents, **FAST).images
    assert torch.equal(latents, before) and found.dtype == torch.float32
    same = tiny_pipeline(sketches, "a", latents=latents.float(), generator=generators(3, 50), **FAST).images
    assert torch.equal(found, same)
    noise = torch.cat([torch.randn(1, 3, SIZE, SIZE, generator=generator) for generator in generators(3)])
    assert torch.equal(
        tiny_pipeline(sketches, "a", latents=noise, **FAST).images,
        tiny_pipeline(sketches, "a", generator=generators(3), **FAST).images,
    )


# ---- strength, eta, clipping ------------------------------------------------------------------------------------------


SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
}


@pytest.mark.parametrize(("name", "in_channels"), [("ddim", 3), *((name, 4) for name in SCHEDULERS)])
def test_strength_starts_from_the_noised_drawing(name, in_channels, tiny_pipeline_factory, sketches):
    cls, options = SCHEDULERS[name]
    pipe = tiny_pipeline_factory(in_channels=in_channels, components=())
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0][:, :3].clone(), int(args[1]))))
    noise = randn(2, 3, SIZE, SIZE)
    group = [sketches[0], sketches[1]]
    pipe([group], "a", 2, 10, strength=0.4, latents=noise, output_type="latent")
    steps = [timestep for _, timestep in seen]
    # Sigma samplers divide the schedule in one part more, and step from their last timestep to the end.
    expected = {"plms": [300, 200, 200, 100, 0], "dpm": [360, 270, 180, 90], "unipc": [360, 270, 180, 90]}
    assert steps == expected.get(name, [300, 200, 100, 0])
    alpha = cosine_alphas_cumprod()[steps[0]].float()
    start = alpha.sqrt() * (sketches[0] + sketches[1]) / 2 + (1 - alpha).sqrt() * noise
    # With the sketch channel there is one row for each of the two drawings of an image.
    torch.testing.assert_close(seen[0][0][:: in_channels - 2], start, rtol=0, atol=1e-5)


def test_less_strength_keeps_more_of_the_drawing(tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(in_channels=3, components=())
    distances = []
    for strength in (0.1, 0.5, 1.0):
        out = pipe(sketches, "a", 1, 20, strength=strength, generator=generators(3), output_type="latent")
        distances.append(float((out.images - sketches).square().mean()))
    assert distances[0] < 0.5 * distances[1] < 0.5 * distances[2]


def test_strengths_that_are_refused(tiny_pipeline, sketches):
    for sketch, options, message in (
        (sketches, {"strength": 0.0}, r"`strength`.* 0.0"),
        (sketches, {"strength": 1.5}, "`strength`.* 1.5"),
        (sketches, {"strength": float("nan")}, "`strength`.* nan"),
        (sketches, {"strength": 0.1}, "`strength=0.1`.* 3 "),
        (None, {"strength": 0.5}, "`strength=0.5`.*`sketch`"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(sketch, "a", **options, **FAST)
    tiny_pipeline.scheduler = PNDMScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="PNDMScheduler.*`skip_prk_steps=True`"):
        tiny_pipeline(sketches, "a", 1, 10, strength=0.5)
    # The option stays behind in the configuration of a scheduler that does not know it.
    tiny_pipeline.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    tiny_pipeline(sketches, "a", 1, 10, strength=0.5)


def test_eta_is_the_checkpoints_where_nothing_else_is_said(tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(recommended={"eta": 0.7})

    def sample(**kwargs):
        return pipe(sketches[:1], "a", generator=generators(1), **{**FAST, **kwargs}).images

    found = sample()
    assert pipe.eta == 0.7 and torch.equal(found, sample(eta=0.7))
    assert not torch.equal(found, sample(eta=0.0)) and pipe.eta == 0.0
    latents = randn(1, 3, SIZE, SIZE)
    assert torch.equal(sample(latents=latents), sample(latents=latents, eta=0.0)) and pipe.eta == 0.0
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    sample()
    assert pipe.eta == 0.0


def test_eta_adds_noise_of_each_image_and_only_to_ddim(tiny_pipeline, sketches, generators):
    latents = randn(3, 3, SIZE, SIZE)
    first, second, zero = (
        tiny_pipeline(sketches, "a", eta=eta, latents=latents, generator=seeds, **FAST).images
        for eta, seeds in ((0.5, generators(3)), (0.5, [*generators(2), *generators(1, 9)]), (0.0, generators(3)))
    )
    assert torch.equal(first[:2], second[:2]) and (first[2] - second[2]).abs().max() > 0.01
    assert (first - zero).abs().max() > 0.01
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"`eta`.* {eta}"):
            tiny_pipeline(sketches, "a", eta=eta, **FAST)
    for cls in (DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler):
        tiny_pipeline.scheduler = cls.from_config(tiny_pipeline.scheduler.config)
        with pytest.raises(ValueError, match=f"`eta=0.5` needs a DDIMScheduler: {cls.__name__}"):
            tiny_pipeline(sketches, "a", 1, 5, eta=0.5)


@pytest.mark.parametrize("clip_sample", [True, False])
def test_clip_sample_none_is_the_setting_of_the_scheduler(clip_sample, tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(
        scheduler=make_scheduler(prediction_type="epsilon", clip_sample=clip_sample, clip_sample_range=0.5)
    )
    largest = []

    def record(pipe, step_index, timestep, callback_kwargs):
        largest.append(float(callback_kwargs["pred_original_sample"].abs().max()))
        return {}

    def call(**kwargs):
        largest.clear()
        inputs = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
        return pipe(sketches, "a", generator=generators(3), **inputs, **kwargs, **FAST).images, max(largest)

    clipped, unclipped = call(clip_sample=True), call(clip_sample=False)
    assert clipped[1] == 0.5 and unclipped[1] > 1.0
    assert torch.equal(call()[0], (clipped if clip_sample else unclipped)[0])


def test_a_scheduler_in_sigma_space_is_refused(tiny_pipeline, sketches):
    tiny_pipeline.scheduler = EulerDiscreteScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler`.* EulerDiscreteScheduler"):
        tiny_pipeline(sketches, "a", **FAST)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_guidance_by_gradient_leaves_out_pure_noise(cls, tiny_pipeline, sketches, generators):
    config = {**tiny_pipeline.scheduler.config, "timestep_spacing": "trailing"}
    tiny_pipeline.scheduler = cls.from_config(config)

    def largest(**options):
        latents = []

        def record(pipe, step_index, timestep, callback_kwargs):
            latents.append(callback_kwargs["latents"].abs().max())
            return {}

        tiny_pipeline(sketches, "a", 1, 10, generator=generators(3), callback_on_step_end=record, **options)
        return max(latents)

    for scales in ({"perceptual_guidance_scale": 0.1}, {"classifier_guidance_scale": 1.0}):
        assert largest(**scales) == largest(**scales, guidance_start=0.1) < 10
    assert largest(sketch_guidance_scale=2.0) < 10


# ---- callbacks on step end --------------------------------------------------------------------------------------------


def test_callback_on_step_end_sees_and_replaces(tiny_pipeline, sketches, generators):
    seen = []

    def record(pipe, step_index, timestep, callback_kwargs):
        assert pipe is tiny_pipeline and pipe.num_timesteps == STEPS
        seen.append((step_index, int(timestep), {name: x.shape for name, x in callback_kwargs.items()}))

    names = ["latents", "noise_pred", "pred_original_sample"]
    plain = tiny_pipeline(sketches, "a", generator=generators(3), **FAST).images
    found = tiny_pipeline(
        sketches,
        "a",
        generator=generators(3),
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=names,
        **FAST,
    ).images
    assert torch.equal(found, plain)
    assert seen == [(i, t, dict.fromkeys(names, (3, 3, SIZE, SIZE))) for i, t in enumerate((666, 333, 0))]

    last = tiny_pipeline(
        sketches, "a", callback_on_step_end=lambda *args: {"latents": torch.ones_like(args[3]["latents"])}, **FAST
    ).images
    assert torch.equal(last, torch.ones(3, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs`.* \['sketch'\]"):
        tiny_pipeline(sketches, "a", callback_on_step_end_tensor_inputs=["sketch"], **FAST)


def test_a_callback_of_diffusers_names_its_own_inputs(tiny_pipeline, sketches):
    class Record(PipelineCallback):
        tensor_inputs = ["noise_pred"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(list(callback_kwargs))
            return callback_kwargs

    seen = []
    tiny_pipeline(sketches, "a", callback_on_step_end=Record(), **FAST)
    assert seen == [["noise_pred"]] * STEPS


def test_a_call_can_be_interrupted(tiny_pipeline, sketches, generators):
    latents = []

    def stop(pipe, step_index, timestep, callback_kwargs):
        latents.append(callback_kwargs["latents"] + step_index)
        pipe._interrupt = step_index == 1
        return {"latents": latents[-1]}

    out = tiny_pipeline(sketches, "a", 1, 6, generator=generators(3), callback_on_step_end=stop, output_type="latent")
    assert len(latents) == 2 and torch.equal(out.images, latents[-1])
    again = tiny_pipeline(sketches, "a", 1, 6, generator=generators(3), output_type="latent")
    assert not tiny_pipeline.interrupt and not torch.equal(again.images, out.images)


# ---- saving, loading, sharing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [("sketcher", "sketch_encoder"), tuple(COMPONENTS)])
def test_save_and_load(components, tiny_pipeline_factory, sketches, generators, tmp_path):
    recommended = {"num_inference_steps": STEPS, "sketch_guidance_scale": 1.5}
    pipe = tiny_pipeline_factory(components=components, recommended=recommended)
    pipe.save_pretrained(tmp_path)
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for name in COMPONENTS:
        assert type(getattr(loaded, name)) is type(getattr(pipe, name))
    assert loaded.id2label == {0: "a", 1: "b", 2: "c"} and loaded.recommended == recommended
    options = {"num_images_per_sketch": 1, "output_type": "latent"}
    assert torch.equal(
        loaded(sketches, "c", generator=generators(3), **options).images,
        pipe(sketches, "c", generator=generators(3), **options).images,
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiffSketchingPipeline"
    assert index["classifier"] == (
        ["diffsketching_pipeline", "NoisyImageClassifier"] if "classifier" in components else [None, None]
    )
    # Apart from components, nothing may be a list: the hub's loader would take it for one.
    assert {type(index[key]) for key in ("id2label", "recommended")} == {dict}


def dtypes(pipe):
    return {x.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module) for x in m.parameters()}


# The name that every supported diffusers knows; newer ones prefer `dtype` and say so.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_float16_files_load_in_float32_unless_asked(tiny_pipeline, sketches, generators, tmp_path):
    tiny_pipeline.to(torch.float16).save_pretrained(tmp_path)
    for name in ("unet/diffusion_pytorch_model", "sketch_encoder/model"):
        assert {x.dtype for x in load_file(tmp_path / f"{name}.safetensors").values() if x.is_floating_point()} == {
            torch.float16
        }
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path)
    assert dtypes(loaded) == {torch.float32}
    assert torch.equal(loaded.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight.float())
    for dtype in (torch.bfloat16, torch.float16):
        assert dtypes(DiffSketchingPipeline.from_pretrained(tmp_path, torch_dtype=dtype)) == {dtype}
    half = DiffSketchingPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    out = half(sketches, "a", generator=generators(3), **GUIDED, **FAST).images
    expected = loaded(sketches, "a", generator=generators(3), **GUIDED, **FAST).images
    assert out.dtype == torch.float32
    assert (out - expected).abs().mean() < 0.15 * expected.abs().mean()


def test_a_component_that_is_passed_in_stays_as_it_is(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    encoder = copy.deepcopy(tiny_pipeline.sketch_encoder).half()
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path, sketch_encoder=encoder, classifier=None)
    assert loaded.sketch_encoder is encoder and encoder.dtype == torch.float16
    assert loaded.classifier is None and loaded.unet.dtype == torch.float32


def test_loading_by_default_warns_of_nothing(tiny_pipeline, tmp_path, recwarn, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    tiny_pipeline.save_pretrained(tmp_path)
    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        pipe = DiffSketchingPipeline.from_pretrained(tmp_path)
        DiffSketchingPipeline.from_pipe(pipe)
    assert [str(warning.message) for warning in recwarn if "dtype" in str(warning.message)] == []
    assert [record.message for record in caplog.records] == []


def test_a_pipeline_is_made_again_of_its_components(tiny_pipeline_factory, sketches, generators):
    recommended = {"num_inference_steps": 3, "eta": 0.5}
    pipe = tiny_pipeline_factory(recommended=recommended)
    edit = DiffSketchingEditPipeline(**pipe.components)
    assert edit.id2label == {0: "a", 1: "b", 2: "c"} and edit.recommended == recommended and edit.unet is pipe.unet
    again = DiffSketchingPipeline(**edit.components, **edit.parameters)
    assert again.config["id2label"] == {0: "a", 1: "b", 2: "c"}
    call = {"class_labels": "b", "num_images_per_sketch": 1, "output_type": "np"}
    first, second = (p(sketches[:1], generator=generators(1), **call).images for p in (pipe, again))
    assert np.array_equal(first, second)
    plain = tiny_pipeline_factory(id2label=None)
    assert DiffSketchingPipeline(**plain.components).id2label == {} and "recommended" not in plain.components


def test_a_class_is_known_by_its_name_however_its_accents_are_written(tiny_pipeline_factory):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for stored, asked in ((composed, apart), (apart, composed.upper())):
        pipe = tiny_pipeline_factory(id2label={0: "a", 1: stored, 2: "c"}, components=())
        assert pipe.classes.index_of(asked) == 1 and pipe.id2label[1] == composed


def test_from_pipe_shares_memory_and_keeps_dtypes(tiny_pipeline, sketches, generators):
    tiny_pipeline.unet.bfloat16()
    before = {name: x for name, x in tiny_pipeline.components.items() if isinstance(x, torch.nn.Module)}
    pointers = {name: [p.data_ptr() for p in x.parameters()] for name, x in before.items()}
    shared = DiffSketchingPipeline.from_pipe(tiny_pipeline)
    shared.set_progress_bar_config(disable=True)
    for name, module in before.items():
        assert getattr(shared, name) is module
        assert [p.data_ptr() for p in module.parameters()] == pointers[name]
        assert module.dtype == (torch.bfloat16 if name == "unet" else torch.float32)
    assert shared.id2label == tiny_pipeline.id2label
    options = {"sketch": sketches, "class_labels": "a", **GUIDED, **FAST}
    found, expected = (pipe(generator=generators(3), **options).images for pipe in (shared, tiny_pipeline))
    assert torch.equal(found, expected)

    other = DiffSketchingPipeline.from_pipe(tiny_pipeline, classifier=None, recommended={"num_inference_steps": 7})
    assert other.classifier is None and other.recommended == {"num_inference_steps": 7}
    assert tiny_pipeline.classifier is not None


def test_a_pipeline_fits_the_conventions_of_diffusers(tiny_pipeline):
    parameters = inspect.signature(DiffSketchingPipeline.__init__).parameters
    optional = {name for name, p in parameters.items() if p.default is None and p.annotation not in (dict,)}
    assert set(DiffSketchingPipeline._optional_components) == optional - {"id2label", "recommended"}
    for name in DiffSketchingPipeline._optional_components:
        assert type(None) in get_args(parameters[name].annotation)
    assert set(DiffSketchingPipeline.model_cpu_offload_seq.split("->")) == {"unet", "vae", *COMPONENTS}
    assert set(tiny_pipeline.components) == {"unet", "scheduler", "vae", "id2label", *COMPONENTS}
    assert tiny_pipeline.parameters == {}


@pytest.mark.gpu
def test_model_cpu_offload(tiny_pipeline, sketches, generators):
    callback = SketchGuidanceCallback(0.1, through_unet=True)
    options = {"sketch": sketches, "class_labels": "a", "guidance_callbacks": callback, **GUIDED, **FAST}
    expected = tiny_pipeline(generator=generators(3), **options).images
    tiny_pipeline.enable_model_cpu_offload()
    for _ in range(2):
        found = tiny_pipeline(generator=generators(3), **options).images
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-2)
        assert tiny_pipeline.unet.device.type == tiny_pipeline.classifier.device.type == "cpu"


# ---- components -------------------------------------------------------------------------------------------------------


def test_components_that_do_not_fit_are_refused(tiny_pipeline_factory):
    for options, message in (
        ({"in_channels": 6}, "`unet`.* `in_channels=6`"),
        ({"out_channels": 4}, "`unet`.* `out_channels=4`"),
        ({"num_class_embeds": 7}, "`id2label` .*3.*`unet.config.num_class_embeds`.* 3 "),
        ({"id2label": {1: "a", 2: "b"}}, r"`id2label`.* \[1, 2\]"),
        ({"recommended": {"guidance_scale": 2}}, r"`recommended`.*'guidance_scale'"),
        (
            {"id2label": {0: "a", 1: "b"}, "num_class_embeds": 3},
            "`classifier`.* 3 .*`id2label`.* 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline_factory(**options)
    unet = UNet2DModel(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(32,))
    with pytest.raises(ValueError, match="`unet`.*`sample_size`"):
        DiffSketchingPipeline(unet, make_scheduler())


def test_an_encoder_of_other_classes_does_not_name_the_drawing(tiny_pipeline_factory, sketches):
    pipe = tiny_pipeline_factory(id2label={0: "a", 1: "b"}, num_class_embeds=3, components=("sketch_encoder",))
    with pytest.raises(ValueError, match="`sketch_encoder`.* 3 .* 2"):
        pipe(sketches, **FAST)
    assert pipe(sketches, "b", **FAST).class_labels == ["b"] * 3


def test_a_drawing_that_is_not_used_is_warned_of_once(
    tiny_pipeline_factory, sketches, generators, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = tiny_pipeline_factory(in_channels=3, components=("classifier", "sketcher", "sketch_encoder"))

    def warnings_of(sketch=sketches, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipe(sketch, ["a", "b", "c"], generator=generators(3), **options, **FAST)
        return [record for record in caplog.records if "does not use the `sketch`" in record.message]

    assert len(warnings_of()) == len(warnings_of(classifier_guidance_scale=1.0)) == 1
    assert warnings_of(None) == warnings_of(strength=0.5) == warnings_of(perceptual_guidance_scale=0.1) == []


def test_a_rectangular_network_and_a_drawing_of_any_size(sketches, generators):
    unet = make_unet()
    unet.register_to_config(sample_size=(16, 24))
    pipe = DiffSketchingPipeline(unet.eval(), make_scheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    page = np.full((70, 50), 255, dtype=np.uint8)
    page[20:50, 10] = page[20, 10:40] = 0
    out = pipe(Image.fromarray(page), 0, 2, STEPS, generator=generators(2))
    assert [image.size for image in out.images] == [(24, 16)] * 2


# ---- what a call must not do ------------------------------------------------------------------------------------------


def test_unknown_arguments_are_not_swallowed(tiny_pipeline, sketches):
    with pytest.raises(TypeError, match="guidance_scale"):
        tiny_pipeline(sketches, guidance_scale=7.5)
    with pytest.raises(TypeError, match="num_image_per_sketch"):
        tiny_pipeline(sketches, num_image_per_sketch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images_per_sketch": 0}, "`num_images_per_sketch`.* 0"),
        ({"num_images_per_sketch": 1.5}, "`num_images_per_sketch`.* 1.5"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.* 0"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "`guidance_start`.*`guidance_end`.* 0.5 and 0.5"),
        ({"clip_sample": "yes"}, "`clip_sample`.* 'yes'"),
        ({"output_type": "jpg"}, "`output_type`.* 'jpg'"),
    ],
)
def test_other_arguments_that_are_refused(options, message, tiny_pipeline, sketches):
    ran = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda *args: ran.append(args))
    tiny_pipeline.sketch_encoder.register_forward_pre_hook(lambda *args: ran.append(args))
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(sketches, **options)
    assert not ran


# One that draws noise, and two that remember earlier steps.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "unipc", "prk"])
def test_a_second_call_is_the_same_and_the_pipeline_as_it_was(name, tiny_pipeline, sketches, generators):
    cls, options = SCHEDULERS.get(name, (PNDMScheduler, {}))
    tiny_pipeline.scheduler = cls.from_config(tiny_pipeline.scheduler.config, **options)

    def state():
        modules = [x for x in tiny_pipeline.components.values() if isinstance(x, torch.nn.Module)]
        return (
            {key: str(value) for key, value in tiny_pipeline.scheduler.__dict__.items()},
            dict(tiny_pipeline.config),
            [(key, x.clone(), x.data_ptr()) for module in modules for key, x in module.state_dict().items()],
            [(module.training, module.dtype) for module in modules],
        )

    def call(seeds):
        callback = SketchGuidanceCallback(0.1, through_unet=True)
        options = {**GUIDED, "guidance_callbacks": callback, "num_inference_steps": 4, "num_images_per_sketch": 1}
        return tiny_pipeline(sketches[:1], generator=seeds, output_type="latent", **options).images

    before = state()
    first = call(generators(1))
    call(generators(1, 20))
    assert torch.equal(call(generators(1)), first)
    after = state()
    assert before[:2] == after[:2] and before[3] == after[3]
    for (key, value, pointer), (now_key, now, now_pointer) in zip(before[2], after[2], strict=True):
        assert key == now_key and pointer == now_pointer and torch.equal(value, now)
    assert all(p.grad is None for x in (tiny_pipeline.unet, tiny_pipeline.classifier) for p in x.parameters())


# ---- inversion --------------------------------------------------------------------------------------------------------


def photos(n):
    return torch.tanh(randn(n, 3, SIZE, SIZE, seed=11))


@pytest.mark.slow
@pytest.mark.parametrize(("with_sketch", "prediction_type"), [(False, "epsilon"), (True, "v_prediction")])
def test_sampling_from_the_inverted_noise_returns_the_photo(
    with_sketch, prediction_type, tiny_pipeline_factory, sketches
):
    # What is recommended for photos from drawings is not for the way back.
    recommended = {"sketch_guidance_scale": 2.0, "classifier_guidance_scale": 5.0, "eta": 1.0}
    pipe = tiny_pipeline_factory(prediction_type=prediction_type, recommended=recommended)
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 0.2  # random weights are rougher than any trained network
    images, sketch, labels = photos(2), sketches[:2] if with_sketch else None, ["c", "a"]
    noise = pipe.invert(images, labels, sketch, num_inference_steps=10, num_fixed_point_iterations=12)
    assert noise.shape == images.shape and noise.dtype == torch.float32
    assert (noise - images).abs().mean() > 0.05
    back = pipe(sketch, labels, 1, 10, latents=noise, clip_sample=False, output_type="latent").images
    torch.testing.assert_close(back, images, rtol=0, atol=1e-3)
    assert pipe.guidance_scales == dict.fromkeys(pipe.guidance_scales, 0.0) | {"sketch_guidance_scale": 1.0}
    changed = pipe(sketch, labels, 1, 10, classifier_guidance_scale=5.0, latents=noise, output_type="latent").images
    assert (changed - images).abs().max() > 1e-2
    if with_sketch:
        null = pipe.invert(images, labels, num_inference_steps=10)
        assert (null - noise).abs().max() > 1e-3


def test_inversion_takes_photos_as_people_have_them(tiny_pipeline, tmp_path):
    wide = Image.fromarray(randn(40, 64, 3).mul(60).add(128).clamp(0, 255).byte().numpy())
    wide.save(tmp_path / "wide.png")
    arguments = {"num_inference_steps": 2, "num_fixed_point_iterations": 0}
    expected = tiny_pipeline.invert(wide, **arguments)
    assert expected.shape == (1, 3, SIZE, SIZE)
    for images in ([wide], tmp_path / "wide.png", [str(tmp_path / "wide.png")], np.asarray(wide)):
        assert torch.equal(tiny_pipeline.invert(images, **arguments), expected)
    assert tiny_pipeline.invert([wide, wide], [None, "a"], **arguments).shape[0] == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"num_fixed_point_iterations": -1},
            "`num_fixed_point_iterations`.* -1",
        ),
        ({"class_labels": ["a"]}, r"`class_labels`.* 2.* 1"),
        (
            {"images": torch.zeros(2, 3, 8, 8)},
            r"photo 0.*\[3, 8, 8\].*\[3, 16, 16\]",
        ),
        ({"images": []}, "`images`.*empty"),
        ({"images": "missing.png"}, r"photo 0.*'missing.png'"),
    ],
)
def test_inversion_refuses_bad_input(kwargs, message, tiny_pipeline):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.invert(**{"images": photos(2), "num_inference_steps": 2, **kwargs})


def test_one_class_serves_all_inverted_photos(tiny_pipeline):
    noise = tiny_pipeline.invert(photos(2), "b", num_inference_steps=3)
    arguments = {"num_inference_steps": 3, "latents": noise, "clip_sample": False, "output_type": "latent"}
    one = tiny_pipeline(None, "b", 1, **arguments)
    assert one.class_labels == ["b", "b"]
    assert torch.equal(one.images, tiny_pipeline(None, ["b", "b"], 1, **arguments).images)


def test_inversion_without_classes_or_sketch_channel(tiny_pipeline_factory, sketches):
    pipe = tiny_pipeline_factory(components=(), id2label=None, num_class_embeds=None, in_channels=3)
    assert pipe.invert(photos(2), num_inference_steps=2).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="`class_labels` is 0.*no classes"):
        pipe.invert(photos(2), 0, num_inference_steps=2)
    with pytest.raises(ValueError, match="`sketch`.*`unet`.* 4 "):
        pipe.invert(photos(2), sketch=sketches[:2], num_inference_steps=2)


def test_inversion_needs_one_drawing_per_photo_and_ddim(tiny_pipeline, sketches):
    with pytest.raises(ValueError, match="`sketch`.* 2.* 3"):
        tiny_pipeline.invert(photos(2), ["a", "b"], sketches, num_inference_steps=2)
    tiny_pipeline.scheduler = UniPCMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="`invert`.*DDIMScheduler.*UniPCMultistepScheduler"):
        tiny_pipeline.invert(photos(2), ["a", "b"], num_inference_steps=2)
