# SPDX-License-Identifier: Apache-2.0
"""Mixtures of classes, a negative class, drawings that rule regions, and color hints."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import ID2LABEL, SIZE, cosine_alphas_cumprod, randn

from diffsketching_pipeline import ColorGuidanceCallback, GuidanceCallback
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import predict_noise
from diffsketching_pipeline.guidance import Colors, blur
from diffsketching_pipeline.images.colors import parse_palette, preprocess_color_strokes
from diffsketching_pipeline.images.edited_region import enclosed_area


ONE_STEP = {"num_inference_steps": 1, "output_type": "latent", "clip_sample": False, "eta": 0.0}
PLAIN = {**ONE_STEP, "sketch_guidance_scale": 1.0, "classifier_guidance_scale": 0.0}


class Spy(GuidanceCallback):
    """Adds nothing and keeps the base prediction."""

    def noise_delta(self, pipeline, timestep, callback_kwargs):
        self.seen = callback_kwargs
        return torch.zeros_like(callback_kwargs["latents"])


@pytest.fixture
def noise_pred(tiny_pipeline):
    """`run(sketch, ...)`: ε of the first step, from noise that is always the same."""

    def run(sketch, class_labels, **options):
        spy = Spy()
        latents = randn(1, 3, SIZE, SIZE)
        tiny_pipeline(sketch, class_labels, 1, latents=latents, guidance_callbacks=spy, **{**PLAIN, **options})
        return spy.seen["noise_pred"]

    return run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_rows_are_averaged_by_their_weights(tiny_unet, tiny_pipeline, sketches):
    latents, owner = randn(2, 3, SIZE, SIZE), torch.tensor([1, 0, 1])
    labels = torch.tensor([0, 1, 2])
    left = torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1.0
    weights = torch.stack([left[0], torch.ones_like(left[0]), 1 - left[0]])

    def predict(latents, *conditioning, scale=2.0):
        return predict_noise(
            *(tiny_unet, tiny_unet.config, tiny_pipeline.scheduler, latents, 500),
            Conditioning(*conditioning),
            scale,
            clip_sample=False,
        ).noise_pred

    null = torch.tensor([3, 3])
    found = predict(latents, labels, sketches, owner, null, weights)
    alone = [
        predict(latents[owner[i]][None], labels[i : i + 1], sketches[i : i + 1], None, null[:1]) for i in range(3)
    ]
    torch.testing.assert_close(found[:1], alone[1], atol=1e-5, rtol=0)
    half = SIZE // 2
    torch.testing.assert_close(found[1, ..., :half], alone[0][0, ..., :half], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1, ..., half:], alone[2][0, ..., half:], atol=1e-5, rtol=0)
    # Without "no class" the drawing alone is withheld, of each row.
    found = predict(latents, labels, sketches, owner, None, weights)
    alone = [predict(latents[owner[i]][None], labels[i : i + 1], sketches[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(found[1, ..., :half], alone[0][0, ..., :half], atol=1e-5, rtol=0)


def test_a_mixture_of_classes_averages_their_predictions(noise_pred, sketches):
    expected = 0.25 * noise_pred(sketches[0], "a") + 0.75 * noise_pred(sketches[0], "c")
    torch.testing.assert_close(noise_pred(sketches[0], {"a": 1, "c": 3}), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(noise_pred(sketches[0], {"a": 2, "b": 0}), noise_pred(sketches[0], "a"))
    # With several drawings, each of them is seen as each class.
    pair = [[sketches[0], sketches[1]]]
    parts = [noise_pred(sketches[k], label) for k in (0, 1) for label in "ac"]
    expected = (0.25 * parts[0] + 0.75 * parts[1] + 0.25 * parts[2] + 0.75 * parts[3]) / 2
    torch.testing.assert_close(noise_pred(pair, {"a": 1, "c": 3}), expected, atol=1e-5, rtol=0)


def test_the_classifier_guides_towards_a_mixture(tiny_pipeline, sketches):
    def run(label, scale):
        latents = randn(1, 3, SIZE, SIZE)
        options = {**PLAIN, "classifier_guidance_scale": scale}
        return tiny_pipeline(sketches[0], label, 1, latents=latents, **options).images

    def change(label):
        return run(label, 1.0) - run(label, 0.0)

    expected = 0.25 * change("a") + 0.75 * change("c")
    torch.testing.assert_close(change({"a": 1, "c": 3}), expected, atol=1e-4, rtol=1e-3)


def test_what_was_mixed_is_returned(tiny_pipeline, sketches):
    out = tiny_pipeline(sketches[:2], [{"A": 1, 2: 3}, {"b": 5}], 1, num_inference_steps=1)
    assert out.class_labels == [{"a": 0.25, "c": 0.75}, "b"]
    assert out.class_probabilities.tolist() == [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]
    again = tiny_pipeline(sketches[:2], out.class_labels, 1, num_inference_steps=1)
    assert again.class_labels == out.class_labels


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({}, r"`class_labels`.* \{\}"),
        ({"a": -1, "b": 2}, "`class_labels`.*'a': -1"),
        ({"a": float("nan")}, "`class_labels`.*'a': nan"),
        ({"a": "much"}, "`class_labels`.*'a': 'much'"),
        ({"a": 1, "d": 1}, "`class_labels`.*'d'"),
    ],
)
def test_mixtures_that_are_none_are_refused(tiny_pipeline, sketches, mixture, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(sketches[0], mixture, num_inference_steps=1)


def test_a_negative_class_takes_the_place_of_no_class(noise_pred, tiny_pipeline, sketches):
    latents = randn(1, 3, SIZE, SIZE)
    timestep = torch.tensor([0])

    @torch.no_grad()
    def predict(sketch, label):
        return predict_noise(
            *(tiny_pipeline.unet, tiny_pipeline.unet.config, tiny_pipeline.scheduler, latents, timestep),
            Conditioning(torch.tensor([label]), sketch),
            clip_sample=False,
        ).noise_pred

    positive = predict(sketches[:1], 0)
    for negative, label in ((None, len(ID2LABEL)), ("b", 1)):
        found = noise_pred(sketches[0], "a", sketch_guidance_scale=2.0, negative_class_labels=negative)
        base = predict(None, label)
        torch.testing.assert_close(found, base + 2.0 * (positive - base), atol=1e-5, rtol=0)


def test_a_negative_class_needs_guidance(tiny_pipeline, sketches):
    for options in ({"sketch": sketches[0], "sketch_guidance_scale": 1.0}, {"sketch": None}):
        with pytest.raises(ValueError, match="`negative_class_labels='b'`"):
            tiny_pipeline(class_labels="a", num_inference_steps=1, negative_class_labels="b", **options)
    with pytest.raises(ValueError, match="`negative_class_labels`.* 1.* 2"):
        tiny_pipeline(sketches[0], "a", 1, 1, sketch_guidance_scale=2.0, negative_class_labels=["a", "b"])


def test_a_negative_class_is_checked_under_its_own_name(tiny_pipeline, tiny_pipeline_factory, sketches):
    guided = {"num_inference_steps": 1, "sketch_guidance_scale": 2.0}
    for label, message in (
        ("d", "'d'"),
        ({"a": 1}, r"\{'a': 1\}"),
        (7, " 7"),
    ):
        with pytest.raises(ValueError, match=f"`negative_class_labels` .*{message}"):
            tiny_pipeline(sketches[0], "a", negative_class_labels=label, **guided)
    pipe = tiny_pipeline_factory(num_class_embeds=3)
    with pytest.raises(ValueError, match="`negative_class_labels=.* None.*`unet`"):
        pipe(sketches[:2], "a", negative_class_labels=["b", None], **guided)


def test_a_negative_class_is_refused_where_inverted_noise_turns_guidance_off(tiny_pipeline_factory, sketches):
    pipe = tiny_pipeline_factory(recommended={"sketch_guidance_scale": 2.0})
    options = {"latents": randn(1, 3, SIZE, SIZE), "num_inference_steps": 1, "negative_class_labels": "b"}
    pipe(sketches[0], "a", 1, **options)
    with pytest.raises(ValueError, match="`negative_class_labels='b'`"):
        pipe(sketches[0], "a", 1, clip_sample=False, **options)


def test_each_drawing_rules_its_region(noise_pred, sketches):
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    found = noise_pred([[sketches[0], sketches[1]]], "a", sketch_masks=[[left, 255 - left]])
    first, second = noise_pred(sketches[0], "a"), noise_pred(sketches[1], "a")
    torch.testing.assert_close(found[..., :8], first[..., :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[..., 8:], second[..., 8:], atol=1e-5, rtol=0)
    # Where none rules, or both do, they are averaged.
    for mask in (np.zeros_like(left), np.full_like(left, 255)):
        found = noise_pred([[sketches[0], sketches[1]]], "a", sketch_masks=[[mask, mask]])
        torch.testing.assert_close(found, (first + second) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.zeros((8, 8), np.uint8)], "`sketch_masks`.*list"),
        ([[np.zeros((8, 8), np.uint8)]], "`sketch_masks`.*.2..*.1."),
        ([["nowhere.png", "nowhere.png"]], "mask 0 of sketch 0.*nowhere.png"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tiny_pipeline, sketches, masks, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline([[sketches[0], sketches[1]]], "a", num_inference_steps=1, sketch_masks=masks)


def test_color_guidance_replaces_the_low_frequencies_inside_its_mask(tiny_pipeline):
    original = 0.5 * randn(2, 3, SIZE, SIZE) + 0.2
    target = torch.tensor([0.8, -0.6, 0.2]).reshape(1, 3, 1, 1)
    far = -target
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 3:13, 3:13] = 1.0
    alpha = cosine_alphas_cumprod()[300].float().reshape(1, 1, 1, 1)
    callback = ColorGuidanceCallback(Colors(torch.cat([target, far]), mask), scale=1.0)
    # Where x̂_0 is blue and where it is not: each goes to the color that is nearer.
    original[0] += target[0]
    original[1] += far[0]
    kwargs = {"pred_original_sample": original, "alpha_prod": alpha, "predictor": tiny_pipeline.predictor}
    change = -callback.noise_delta(tiny_pipeline, torch.tensor(300), kwargs) / (alpha / (1 - alpha)).sqrt()
    assert change[..., :3, :].abs().max() == 0 and change[..., 13:].abs().max() == 0
    for row, color in enumerate((target, far)):
        # What is small stays: a blur of the change is nearly the change itself.
        small = (blur(change) - change)[row, :, 6:10, 6:10]
        assert small.norm() < 0.35 * change[row, :, 6:10, 6:10].norm()
        mean = (original + change)[row, :, 3:13, 3:13].mean(dim=(1, 2))
        assert (mean - color[0, :, 0, 0]).norm() < 0.05
    half = ColorGuidanceCallback(callback.colors, scale=0.5).noise_delta(tiny_pipeline, torch.tensor(300), kwargs)
    torch.testing.assert_close(-half / (alpha / (1 - alpha)).sqrt(), change / 2)


def test_a_constant_color_is_left_alone(tiny_pipeline):
    color = torch.tensor([0.3, 0.1, -0.9]).reshape(1, 3, 1, 1)
    callback = ColorGuidanceCallback(Colors(color, torch.ones(1, 1, SIZE, SIZE)), scale=1.0)
    kwargs = {"pred_original_sample": color.expand(1, 3, SIZE, SIZE), "alpha_prod": torch.full((1, 1, 1, 1), 0.5)}
    kwargs["predictor"] = tiny_pipeline.predictor
    assert callback.noise_delta(tiny_pipeline, torch.tensor(300), kwargs).abs().max() < 1e-6


def test_strokes_of_color_reach_the_photo_where_they_are(tiny_pipeline, sketches):
    page = np.zeros((64, 64, 4), np.uint8)
    page[:, :32] = (255, 0, 0, 255)

    def run(hint, scale=1.0):
        return tiny_pipeline(
            *(sketches[2], "a", 1, 6),
            generator=seeded(),
            color_hint=hint,
            color_guidance_scale=scale,
            output_type="latent",
        ).images[0]

    plain, hinted = run(None), run(Image.fromarray(page))
    red = torch.tensor([1.0, -1.0, -1.0])

    def distance(image, columns):
        return (image[:, :, columns].mean(dim=(1, 2)) - red).norm()

    assert distance(hinted, slice(0, 7)) < 0.6 * distance(plain, slice(0, 7))
    assert torch.equal(run(Image.fromarray(page), scale=0.0), plain)
    # White paper of an opaque page is no hint, and neither is what is transparent.
    opaque = Image.new("RGB", (64, 64), "white")
    opaque.paste("red", (0, 0, 32, 64))
    torch.testing.assert_close(run(opaque), hinted)
    torch.testing.assert_close(run(opaque.convert("RGBA")), hinted)


def test_beside_strokes_of_color_a_drawing_keeps_its_place(tiny_pipeline):
    spy, page = Spy(), Image.new("L", (64, 64), 255)
    page.paste(0, (4, 8, 24, 12))
    hint = Image.new("RGB", (64, 64), "white")
    hint.paste("red", (4, 8, 24, 12))
    for colors, fit in ((hint, "page"), (["red"], "content")):
        tiny_pipeline(page, "a", 1, guidance_callbacks=spy, color_hint=colors, **PLAIN)
        expected = tiny_pipeline.sketch_processor.preprocess(page, SIZE, SIZE, fit=fit)
        torch.testing.assert_close(spy.seen["sketch"], expected)


def test_a_palette_colors_what_the_drawing_encloses(tiny_pipeline, sketches):
    area = enclosed_area(sketches[2:])
    assert area.shape == (1, SIZE, SIZE) and area[0, 3:13, 3:13].min() == 1 and area.sum() == 100
    # An open outline encloses its convex hull.
    gap = sketches[2:].clone()
    gap[..., 3, 6:9] = 1
    assert enclosed_area(gap).sum() == 100
    images = tiny_pipeline(
        *(sketches[2], "a", 2, 6),
        generator=seeded(),
        color_hint=["#0000ff", (0, 255, 0)],
        color_guidance_scale=1.0,
        output_type="latent",
    ).images
    inside = images[:, :, 6:10, 6:10].mean(dim=(2, 3))
    palette = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    assert (torch.cdist(inside, palette).min(dim=1).values < 1.0).all()


def test_colors_as_people_write_them(tmp_path):
    colors = parse_palette(["navy", "#f00", (0, 255, 0)])
    assert colors.shape == (3, 3, 1, 1)
    expected = torch.tensor([[0, 0, 128], [255, 0, 0], [0, 255, 0]]) / 127.5 - 1
    torch.testing.assert_close(colors[..., 0, 0], expected)
    assert parse_palette("strokes.png") is None
    page = np.zeros((SIZE, 2 * SIZE, 4), np.uint8)
    page[:, :SIZE] = (10, 20, 30, 255)
    Image.fromarray(page).save(tmp_path / "strokes.png")
    pixels, cover = preprocess_color_strokes(tmp_path / "strokes.png", SIZE, SIZE)
    # Twice as wide as high, it is fitted into the middle half of the height.
    assert cover.sum() == SIZE / 2 * SIZE / 2 and cover[0, SIZE // 2, 0] == 1
    for column in (0, SIZE - 1):
        torch.testing.assert_close(pixels[:, SIZE // 2, column], torch.tensor([10, 20, 30]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ([], "`color_hint`.*empty"),
        (["crimsonish"], "`color_hint`.*'crimsonish'"),
        ([(0, 0, 300)], "`color_hint`.*0, 0, 300"),
        (Image.new("RGB", (8, 8), "white"), "`color_hint` holds no color"),
        ("nowhere.png", "nowhere.png.* does not exist"),
    ],
)
def test_hints_that_say_nothing_are_refused(tiny_pipeline, sketches, hint, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(sketches[0], "a", num_inference_steps=1, color_hint=hint)


def test_color_arguments_are_checked(tiny_pipeline, sketches):
    with pytest.raises(ValueError, match="`color_hint`.*palette"):
        tiny_pipeline(None, "a", num_inference_steps=1, color_hint=["red"])
    with pytest.raises(ValueError, match="`color_guidance_scale`.* 2"):
        tiny_pipeline(sketches[0], "a", num_inference_steps=1, color_hint=["red"], color_guidance_scale=2)


def test_old_spellings_give_the_same_pixels_and_a_warning(tiny_pipeline, sketches):
    def run(**hint):
        return tiny_pipeline(sketches[0], "a", 1, 2, generator=seeded(), output_type="pt", **hint).images

    wanted = run(color_hint=["red"], color_guidance_scale=1.0)
    with pytest.warns(FutureWarning, match="`colour_guidance_scale` is now `color_guidance_scale`"):
        assert torch.equal(run(color_hint=["red"], colour_guidance_scale=1.0), wanted)
    with pytest.warns(FutureWarning, match="`colour_hint` is now `color_hint`") as warned:
        assert torch.equal(run(colour_hint=["red"], color_guidance_scale=1.0), wanted)
    assert warned[0].filename == __file__
    assert not torch.equal(run(color_hint=["blue"], color_guidance_scale=1.0), wanted)
    with pytest.raises(ValueError, match="`colour_hint`.*`color_hint`"), pytest.warns(FutureWarning):
        run(colour_hint=["red"], color_hint=["red"])


def test_old_names_are_the_new_ones_and_warn():
    for module, old, new in (
        ("", "ColourGuidanceCallback", ColorGuidanceCallback),
        (".guidance", "Colours", Colors),
        (".images.colours", "preprocess_colour_strokes", preprocess_color_strokes),
    ):
        with pytest.warns(FutureWarning, match=f"`{old}` is now `{new.__name__}`"):
            assert getattr(importlib.import_module(f"diffsketching_pipeline{module}"), old) is new
    colors = Colors(torch.zeros(1, 3, 1, 1), torch.ones(1, 1, SIZE, SIZE))
    with pytest.warns(FutureWarning, match="`colours` is now `colors`"):
        assert ColorGuidanceCallback(colours=colors).colors is colors
