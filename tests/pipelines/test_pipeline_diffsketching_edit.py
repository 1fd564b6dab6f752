# SPDX-License-Identifier: Apache-2.0
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image, ImageCms, ImageDraw
from testing_utils import SIZE, make_scheduler

from diffsketching_pipeline import (
    DiffSketchingEditPipeline,
    DiffSketchingInterpolationPipeline,
    GuidanceCallback,
)
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import predict_noise
from diffsketching_pipeline.schedulers import ddim_inverse_step, sampling_scheduler


PHOTO_SIZE = (48, 40)
BOX = (12, 10, 28, 30)
STEPS = {"num_inference_steps": 4, "class_labels": "a", "strength": 0.8, "num_resample_steps": 1}


@pytest.fixture
def pipe(tiny_pipeline):
    pipe = DiffSketchingEditPipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def photo():
    noise = np.random.default_rng(0).integers(0, 256, (PHOTO_SIZE[1], PHOTO_SIZE[0], 4), dtype=np.uint8)
    return Image.fromarray(noise)


def box_mask(box=BOX, size=PHOTO_SIZE):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def draw(*lines, size=PHOTO_SIZE, scale=4):
    """A page of `scale` times the photo's size with lines in the photo's pixels."""
    page = Image.new("L", (size[0] * scale, size[1] * scale), 255)
    for line in lines:
        ImageDraw.Draw(page).line([(scale * x, scale * y) for x, y in line], fill=0, width=scale)
    return page


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Spy(GuidanceCallback):
    """Adds nothing and keeps what it was given."""

    def noise_delta(self, pipeline, timestep, callback_kwargs):
        self.seen = callback_kwargs
        return torch.zeros_like(callback_kwargs["latents"])


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_outside_of_the_mask_the_photo_stays_bit_for_bit(pipe, photo, mode):
    photo = photo.convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
    out = pipe(photo, box_mask(), generator=seeded(), num_images_per_sketch=2, eta=1.0, **STEPS)
    kept = photo.convert("RGBA" if mode == "RGBA" else "RGB")
    inside = np.asarray(box_mask()) > 0
    for image in out.images:
        assert image.size == PHOTO_SIZE and image.mode == kept.mode
        changed = (np.asarray(image) != np.asarray(kept)).any(axis=2)
        assert not changed[~inside].any()
        assert changed[inside].mean() > 0.9
    assert out.images[0].tobytes() != out.images[1].tobytes()


def test_mask_box_and_strokes_may_say_what_changes(pipe, photo):
    by_mask = pipe(photo, box_mask(), generator=seeded(), **STEPS).images[0]
    by_box = pipe(photo, BOX, generator=seeded(), **STEPS).images[0]
    assert by_mask.tobytes() == by_box.tobytes()
    sketch = draw([(20, 10), (20, 28)])
    mask = np.asarray(pipe.prepare_mask_image(photo, None, sketch)) > 0
    by_strokes = np.asarray(pipe(photo, None, sketch, generator=seeded(), **STEPS).images[0])
    assert ((by_strokes != np.asarray(photo)).any(axis=2) <= mask).all()


def test_the_mask_of_strokes_is_what_they_span(pipe, photo):
    open_outline = draw([(10, 30), (10, 12), (26, 12), (26, 30)])

    def mask_of(sketch, padding):
        return np.asarray(pipe.prepare_mask_image(photo, None, sketch, padding)) > 0

    spanned = mask_of(open_outline, 0.02)
    assert spanned[20, 18] and spanned[29, 18] and not spanned[36, 18] and not spanned[20, 4] and not spanned[20, 40]
    grown = mask_of(open_outline, 0.1)
    assert (grown >= spanned).all()
    # The padding is a share of the longer side: 0.02 and 0.1 of 48 pixels.
    assert 10 - np.flatnonzero(spanned[20])[0] == pytest.approx(1, abs=1)
    assert 10 - np.flatnonzero(grown[20])[0] == pytest.approx(5, abs=1)
    # Two marks far from one another do not free what lies between them.
    apart = mask_of(draw([(6, 10), (6, 30)], [(42, 10), (42, 30)]), 0.05)
    assert apart[20, 6] and apart[20, 42] and not apart[20, 24]


def test_the_network_sees_strokes_in_their_place_and_the_photos_contours_around(pipe, photo):
    spy = Spy()
    # The box with its margin is (0, 0, 40, 40), so that a model's pixel is 2.5 of the photo.
    sketch = draw([(20, 11), (20, 29)])
    pipe(photo, BOX, sketch, guidance_callbacks=spy, generator=seeded(), **STEPS)
    seen = spy.seen["sketch"][0, 0]
    region = pipe.prepare_region(photo, box_mask(), 0.5)
    assert region.box == (0, 0, 40, 40)
    part, inside = pipe.prepare_photo(region)
    assert inside[0, 0].nonzero().aminmax(dim=0).min.tolist() == [4, 4]
    assert inside[0, 0].nonzero().aminmax(dim=0).max.tolist() == [11, 11]
    columns = (seen < 0)[inside[0, 0]].reshape(8, 8).float().mean(dim=0)
    # The line at 20 of 40 pixels is where the eighth of 16 columns meets the ninth: the fourth and fifth of the mask's.
    assert columns.argmax() in (3, 4) and columns[[0, 1, 6, 7]].max() == 0
    with torch.no_grad():
        contours = pipe.sketcher(part)[0, 0]
    torch.testing.assert_close(seen[~inside[0, 0]], contours[~inside[0, 0]])
    # Without strokes there are contours inside, too.
    pipe(photo, BOX, guidance_callbacks=spy, generator=seeded(), **STEPS)
    torch.testing.assert_close(spy.seen["sketch"][0, 0], contours)


def test_the_surroundings_are_those_of_the_inverted_photo(pipe, photo):
    steps = []

    def on_step_end(pipe, step_index, timestep, kwargs):
        steps.append(kwargs["latents"])
        return {}

    out = pipe(photo, BOX, generator=seeded(), callback_on_step_end=on_step_end, output_type="latent", **STEPS)
    part, inside = pipe.prepare_photo(pipe.prepare_region(photo, box_mask(), 0.5))
    outside = ~inside.expand(1, 3, -1, -1)
    torch.testing.assert_close(out.images[outside], part[outside])
    # Strength 0.8 of 4 steps is the last 3; a step of the way back leads from one x_t of the photo to the next.
    assert len(steps) == 3
    expected = inverted_trajectory(pipe, part, 4)
    for index, latents in enumerate(steps[:-1]):
        torch.testing.assert_close(latents[outside], expected[index + 2][outside])


def inverted_trajectory(pipe, part, num_inference_steps):
    """x_t of the photo at each timestep, noisiest first, with one fixed-point iteration per step."""
    scheduler = sampling_scheduler(pipe.scheduler, num_inference_steps)
    null, x, trajectory = Conditioning(torch.tensor([pipe.null_class])), part, []
    with torch.no_grad():
        for timestep in scheduler.timesteps.flip(0):
            guess = x
            for _ in range(2):
                noise = predict_noise(
                    *(pipe.unet, pipe.unet.config, pipe.scheduler, guess, timestep, null), clip_sample=False
                ).noise_pred
                guess = ddim_inverse_step(scheduler, noise, timestep, x)
            x = guess
            trajectory.insert(0, x)
    return trajectory


def test_strength_and_resampling_set_the_steps(pipe, photo):
    for strength, resample, steps in ((0.25, 1, 1), (0.5, 1, 2), (1.0, 1, 4), (0.5, 3, 6)):
        options = {**STEPS, "strength": strength, "num_resample_steps": resample}
        pipe(photo, BOX, generator=seeded(), **options)
        assert pipe.num_timesteps == steps


def test_below_full_strength_the_inverted_photo_is_the_only_noise(pipe, photo):
    def run(seed, **options):
        options = {**STEPS, "eta": 0.0, "output_type": "latent", **options}
        return pipe(photo, BOX, generator=seeded(seed), **options).images

    assert torch.equal(run(0), run(1))
    assert not torch.allclose(run(0, strength=1.0), run(1, strength=1.0))
    assert not torch.allclose(run(0, num_resample_steps=2), run(1, num_resample_steps=2))


def test_an_image_does_not_depend_on_its_batch(pipe, photo):
    options = {**STEPS, "output_type": "latent", "eta": 1.0, "num_resample_steps": 2}
    generators = [seeded(3), seeded(4)]
    both = pipe(photo, BOX, num_images_per_sketch=2, generator=generators, **options).images
    alone = pipe(photo, BOX, generator=[seeded(4)], **options).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_the_seam_is_blended_inside_the_mask(pipe):
    photo = Image.new("RGB", PHOTO_SIZE, "black")
    region = pipe.prepare_region(photo, box_mask(), 0.5)
    white = torch.ones(1, 3, SIZE, SIZE)
    # A tenth of 40 pixels.
    row = np.asarray(pipe.paste(region, white, 0.1, "pil")[0])[20, :, 0].astype(int)
    assert row[11] == 0 and row[28] == 0
    ramp = [round(255 * s * s * (3 - 2 * s)) for s in (0.25, 0.5, 0.75, 1.0)]
    assert row[12:16].tolist() == ramp and row[27:23:-1].tolist() == ramp
    assert (row[16:24] == 255).all()
    hard = np.asarray(pipe.paste(region, white, 0.0, "pil")[0])[20, :, 0]
    assert (hard[12:28] == 255).all() and hard[11] == hard[28] == 0


def test_the_seam_is_blended_wherever_the_mask_ends(pipe):
    """Also where the part ends with the mask, and not where the photo does."""
    black, white = Image.new("RGB", PHOTO_SIZE, "black"), torch.ones(1, 3, SIZE, SIZE)

    def row(box, crop_margin):
        region = pipe.prepare_region(black, box_mask(box), crop_margin)
        return np.asarray(pipe.paste(region, white, 0.2, "pil")[0])[20, :, 0].astype(int)

    # A fifth of 20 pixels.
    ramp = [round(255 * s * s * (3 - 2 * s)) for s in (0.25, 0.5, 0.75, 1.0)]
    assert row((12, 10, 28, 30), 0.0)[12:16].tolist() == ramp
    inner = row((14, 10, 34, 30), 0.0)
    assert inner[13] == inner[34] == 0 and inner[14:18].tolist() == inner[33:29:-1].tolist() == ramp
    assert (row((0, 0, *PHOTO_SIZE), 0.5) == 255).all()
    at_border = row((0, 10, 20, 30), 0.0)
    assert (at_border[:16] == 255).all() and at_border[19:15:-1].tolist() == ramp


def test_what_is_transparent_has_no_color_in_the_blend(pipe):
    photo = Image.new("RGBA", PHOTO_SIZE, (0, 0, 0, 0))
    region = pipe.prepare_region(photo, box_mask(), 0.5)
    row = np.asarray(pipe.paste(region, torch.ones(1, 3, SIZE, SIZE), 0.1, "pil")[0])[20, 12:28]
    assert (row[:, :3] == 255).all() and 0 < row[0, 3] < row[1, 3] < 255 and row[8, 3] == 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "I;16", "CMYK", "P", "P transparent", "turned"])
def test_nothing_outside_of_the_mask_is_touched_by_pasting(pipe, tmp_path, mode):
    size = (37, 29)
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    photo = Image.fromarray(noise)
    if mode == "I;16":
        photo = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode == "P transparent":
        photo = photo.convert("RGB").quantize(16)
        photo.info["transparency"] = 3
    elif mode == "turned":
        exif = photo.getexif()
        exif[0x0112] = 6
        photo.save(tmp_path / "turned.png", exif=exif)
        photo, size = tmp_path / "turned.png", size[::-1]
    else:
        photo = photo.convert(mode)
    inner, corner, edge, whole = (5, 4, 18, 17), (0, 0, 9, 9), (size[0] - 5, 3, *size), (0, 0, *size)
    for box, crop_margin in ((inner, 0.0), (inner, 0.5), (corner, 0.5), (edge, 0.0), (whole, 0.5)):
        mask = pipe.prepare_mask_image(photo, box)
        region = pipe.prepare_region(photo, mask, crop_margin)
        assert region.photo.size == size
        image = pipe.paste(region, -torch.ones(1, 3, SIZE, SIZE), 0.1, "pil")[0]
        changed = (np.asarray(image) != np.asarray(region.photo)).any(axis=2)
        assert image.mode == region.photo.mode and not changed[np.asarray(mask) == 0].any()
        assert changed[np.asarray(mask) > 0].mean() > 0.4


def test_the_profile_of_an_rgb_photo_is_kept(pipe):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, colors, kept in (("RGB", b"RGB ", profile), ("CMYK", b"CMYK", None)):
        photo = Image.new(mode, PHOTO_SIZE)
        photo.info["icc_profile"] = profile[:16] + colors + profile[20:]
        region = pipe.prepare_region(photo, box_mask(), 0.5)
        image = pipe.paste(region, torch.ones(1, 3, SIZE, SIZE), 0.1, "pil")[0]
        assert image.info.get("icc_profile") == kept


def test_a_box_between_two_pixels_is_not_empty(pipe, photo):
    for box, expected in (((47.6, 0, 48, 40), (47, 0, 48, 40)), ((3.7, 4.2, 9.1, 8), (3, 4, 10, 8))):
        assert pipe.prepare_mask_image(photo, box).getbbox() == expected


@pytest.mark.parametrize("label", ["b", {"a": 1, "b": 3}])
def test_a_network_that_needs_a_class_inverts_under_it(tiny_pipeline_factory, photo, label):
    pipe = DiffSketchingEditPipeline.from_pipe(tiny_pipeline_factory(num_class_embeds=3))
    pipe.set_progress_bar_config(disable=True)
    steps = []
    pipe(
        *(photo, BOX),
        callback_on_step_end=lambda pipe, i, t, kwargs: steps.append(kwargs["latents"]) or {},
        **{**STEPS, "class_labels": label},
    )
    part, inside = pipe.prepare_photo(pipe.prepare_region(photo, box_mask(), 0.5))
    outside = ~inside.expand(1, 3, -1, -1)
    back = []
    pipe._invert(
        *(sampling_scheduler(pipe.scheduler, 4), sampling_scheduler(pipe.scheduler, 4).timesteps[1:], part),
        *(Conditioning(torch.tensor([1])), 1, lambda latents: back.insert(0, latents)),
    )
    found = torch.allclose(steps[0][outside], back[1][outside], atol=1e-5)
    assert found == (label == "b")


def test_output_types_agree(pipe, photo):
    pil = np.asarray(pipe(photo, BOX, generator=seeded(), **STEPS).images[0])
    array = pipe(photo, BOX, generator=seeded(), output_type="np", **STEPS).images
    tensor = pipe(photo, BOX, generator=seeded(), output_type="pt", return_dict=False, **STEPS)[0]
    assert array.shape == (1, 40, 48, 4) and tensor.shape == (1, 4, 40, 48)
    assert np.array_equal(np.rint(array[0] * 255), pil)
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": box_mask(size=(40, 48))}, "`mask_image`.* 48 x 40 .* 40 x 48"),
        ({"mask_image": Image.new("L", PHOTO_SIZE, 127)}, "`mask_image`.*empty"),
        ({"mask_image": (12, 10, 60, 30)}, "`mask_image`.* 48 x 40 .*12, 10, 60, 30"),
        ({"mask_image": (12, 10, 12, 30)}, "`mask_image`.*12, 10, 12, 30"),
        ({"mask_image": None}, "`mask_image`.*`sketch`.* None"),
        ({"sketch": draw([(20, 11), (20, 29)], size=(40, 40))}, "`sketch`.*photo's page"),
        ({"sketch": Image.new("L", PHOTO_SIZE, 255)}, "sketch 0 .*no drawing"),
        ({"sketch": draw([(2, 2), (8, 36)])}, "`sketch`.*no line"),
        ({"strength": 0.1}, "`strength=0.1`.* 4 "),
        ({"feather": 2}, "`feather`.* 2"),
        ({"num_resample_steps": 0}, "`num_resample_steps`.* 0"),
        ({"image": "nowhere.png"}, "nowhere.png.* does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(pipe, photo, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": photo, "mask_image": BOX, **STEPS, **arguments})


def test_a_photo_that_does_not_decode_and_a_scheduler_that_does_not_invert(pipe, photo, tmp_path):
    path = tmp_path / "broken.png"
    photo.save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="`image`.*broken.png.* is damaged or truncated"):
        pipe(path, BOX, **STEPS)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`invert`.*DDIMScheduler.*UniPCMultistepScheduler"):
        pipe(photo, BOX, **STEPS)


def test_all_pipelines_come_from_one_checkpoint(pipe, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    for cls in (DiffSketchingEditPipeline, DiffSketchingInterpolationPipeline):
        shared = cls.from_pipe(tiny_pipeline)
        loaded = cls.from_pretrained(tmp_path)
        assert type(shared) is type(loaded) is cls
        assert loaded.id2label == shared.id2label == tiny_pipeline.id2label
        for name, component in tiny_pipeline.components.items():
            assert getattr(shared, name) is component or name in ("id2label", "recommended")
        for name, value in loaded.unet.state_dict().items():
            assert torch.equal(value, tiny_pipeline.unet.state_dict()[name])


def test_the_colors_of_a_palette_reach_the_part_that_is_drawn(pipe, photo):
    sketch = draw([(14, 12), (26, 12), (26, 28), (14, 28), (14, 12)])
    options = {**STEPS, "output_type": "latent", "eta": 0.0, "generator": None}
    plain = pipe(photo, BOX, sketch, **options).images
    red = pipe(photo, BOX, sketch, color_hint=["#ff0000"], color_guidance_scale=1.0, **options).images
    inner = (slice(None), slice(None), slice(6, 10), slice(6, 10))
    target = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    assert (red[inner].mean((2, 3), True) - target).norm() < 0.7 * (plain[inner].mean((2, 3), True) - target).norm()


def test_strokes_of_color_lie_on_the_photos_page(pipe, photo):
    hint = Image.new("RGB", PHOTO_SIZE, "white")
    hint.paste("red", (12, 10, 20, 30))
    region = pipe.prepare_region(photo, box_mask(), 0.5)
    _, inside = pipe.prepare_photo(region)
    colors = pipe.prepare_part_colors(hint, region, inside, None, 1)
    # The part is (0, 0, 40, 40), so that a model's pixel is 2.5 of the photo.
    mask = colors.mask[0, 0]
    assert mask[5:11, 5:7].min() > 0.6 and mask[:, 11:].max() < 0.05 and mask[~inside[0, 0]].max() == 0
    assert colors.candidates[0, :, 6, 6].tolist() == [1.0, -1.0, -1.0]
    hint.paste("red", (0, 0, 40, 40))
    assert pipe.prepare_part_colors(hint, region, inside, None, 1).mask[~inside].max() == 0


def test_strokes_of_color_have_to_lie_where_something_changes(pipe, photo):
    region = pipe.prepare_region(photo, box_mask(), 0.5)
    _, inside = pipe.prepare_photo(region)
    for place in ((0, 0, 8, 8), (44, 0, 48, 40)):
        hint = Image.new("RGB", PHOTO_SIZE, "white")
        hint.paste("red", place)
        with pytest.raises(ValueError, match="`color_hint`.*no stroke"):
            pipe.prepare_part_colors(hint, region, inside, None, 1)
    with pytest.raises(ValueError, match="`color_hint`.*photo's page"):
        pipe.prepare_part_colors(Image.new("RGB", (48, 48), "red"), region, inside, None, 1)
    # One pixel of a page that is much larger than the model is still seen.
    hint = Image.new("RGB", (480, 400), "white")
    hint.putpixel((203, 207), (0, 0, 255))
    colors = pipe.prepare_part_colors(hint, region, inside, None, 1)
    assert colors.mask.max() > 0
    torch.testing.assert_close(colors.candidates[0, :, 8, 8], torch.tensor([-1.0, -1.0, 1.0]))


def test_a_small_change_of_a_huge_photo_still_reads_its_drawing(pipe):
    photo = Image.new("RGB", (6000, 20), "white")
    box = (2950, 5, 3050, 15)
    region = pipe.prepare_region(photo, box_mask(box, photo.size), 0.5)
    assert region.size == (math.ceil(6000 / 16), 20)
    out = pipe(photo, box, draw([(2955, 10), (3045, 10)], size=photo.size, scale=1), **STEPS)
    assert out.images[0].size == photo.size


def test_guidance_of_pure_noise_is_left_out_at_each_walk_of_its_timestep(tiny_pipeline_factory, photo):
    scheduler = make_scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipe = DiffSketchingEditPipeline.from_pipe(tiny_pipeline_factory(scheduler=scheduler))
    pipe.set_progress_bar_config(disable=True)
    options = {**STEPS, "strength": 1.0, "num_resample_steps": 3, "classifier_guidance_scale": 1.0}
    calls = []
    pipe.classifier.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
    # Of twelve steps the first three are at timestep 999; the second is from 1/12 to 2/12 of the way.
    for start, end in ((0.0, 0.1), (0.08, 0.2)):
        pipe(photo, BOX, guidance_start=start, guidance_end=end, **options)
    assert calls == []
    pipe(photo, BOX, **options)
    assert calls == [749] * 3 + [499] * 3 + [249] * 3


def test_a_drawing_that_is_not_used_is_warned_of(tiny_pipeline_factory, photo, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = DiffSketchingEditPipeline.from_pipe(tiny_pipeline_factory(in_channels=3))
    pipe.set_progress_bar_config(disable=True)
    for sketch, count in ((draw([(20, 11), (20, 29)]), 1), (None, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipe(photo, BOX, sketch, **STEPS)
        assert len([r for r in caplog.records if "does not use the `sketch`" in r.message]) == count


def test_an_edit_in_bfloat16_under_inference_mode_and_interrupted(pipe, photo):
    pipe.to(torch.bfloat16)
    sketch = draw([(14, 12), (26, 12), (26, 28), (14, 28), (14, 12)])
    guided = {"classifier_guidance_scale": 1.0, "perceptual_guidance_scale": 0.1, "color_hint": ["red"]}
    with torch.inference_mode():
        image = pipe(photo, BOX, sketch, generator=seeded(), **guided, **STEPS).images[0]
    assert torch.equal(inside_box(image, False), inside_box(photo, False))
    assert not torch.equal(inside_box(image, True), inside_box(photo, True))

    def stop(pipe, step_index, timestep, kwargs):
        pipe._interrupt = step_index == 0
        walked.append(step_index)
        return {}

    walked = []
    stopped = pipe(photo, BOX, sketch, generator=seeded(), callback_on_step_end=stop, **STEPS).images[0]
    assert walked == [0] and torch.equal(inside_box(stopped, False), inside_box(photo, False))


def inside_box(image, inside):
    mask = np.asarray(box_mask()) > 0
    return torch.from_numpy(np.asarray(image)[mask == inside])


def test_callbacks_see_the_part_at_the_models_size(pipe, photo):
    shapes = set()
    pipe(
        *(photo, BOX),
        callback_on_step_end=lambda pipe, i, t, kwargs: shapes.update(tuple(x.shape) for x in kwargs.values()) or {},
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **STEPS,
    )
    assert shapes == {(1, 3, SIZE, SIZE)}
