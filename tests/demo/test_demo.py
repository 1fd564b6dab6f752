# SPDX-License-Identifier: Apache-2.0
"""Tests of the drawing page without a browser."""

import base64
import io
import json
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw


pytest.importorskip("gradio", reason="Gradio is not installed: pip install .[demo]")

from diffsketching_pipeline.demo import service as demo  # noqa: E402
from diffsketching_pipeline.demo.service import DemoService, PhotoRequest, Photos, Progress, more_like_this  # noqa: E402


STEPS = {"num_inference_steps": 6, "eta": 1.0}


@pytest.fixture
def service(tiny_pipeline_factory):
    recommended = {"num_inference_steps": 6, "sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.5}
    return DemoService(tiny_pipeline_factory(recommended=recommended))


@pytest.fixture
def drawing():
    page = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(page).rectangle((30, 20, 90, 100), outline="black", width=4)
    return page


def finish(updates):
    return list(updates)[-1]


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def alone(service, drawing, seed, **arguments):
    """Return what the pipeline makes of one seed, without the service."""
    settings = {**service.call_settings(0.5), **STEPS, **arguments}
    generator = [torch.Generator().manual_seed(seed)]
    return service.pipe(drawing, class_labels="b", num_images_per_sketch=1, generator=generator, **settings).images


def test_photos_form_step_by_step_and_are_those_of_the_pipeline(service, drawing):
    request = PhotoRequest(drawing, "b", 2, seed=7, settings=STEPS)
    *progress, photos = service.make_photos(request, "me")
    assert [(p.step, p.num_steps) for p in progress] == [(k, 6) for k in range(1, 7)]
    assert [p.step for p in progress if p.images] == [1, 4] and all(len(p.images or "12") == 2 for p in progress)
    assert progress[-1].seconds_left == 0 < progress[0].seconds_left
    assert [record["seed"] for record in photos.records] == [7, 8]
    for k in range(2):
        assert np.abs(pixels(photos.images[k : k + 1]) - pixels(alone(service, drawing, 7 + k))).max() <= 2


def test_two_at_once_get_their_own_and_one_stops_alone(service, drawing):
    results = {}

    def ask(owner, seed, stop_at=None):
        seen = []
        for update in service.make_photos(PhotoRequest(drawing, "b", 1, seed, settings=STEPS), owner):
            seen.append(update)
            if stop_at is not None and isinstance(update, Progress) and update.step == stop_at:
                service.stop(owner)
        results[owner] = seen

    asked = [("a", 1), ("b", 2, 1), ("c", 3)]
    threads = [threading.Thread(target=ask, args=arguments) for arguments in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for owner, seed in (("a", 1), ("c", 3)):
        assert np.abs(pixels(results[owner][-1].images) - pixels(alone(service, drawing, seed))).max() <= 2
    # The step that was running when it was stopped is the last one, or the one after it.
    assert len(results["b"]) <= 3 and all(isinstance(update, Progress) for update in results["b"])
    assert service._running == []


def test_who_leaves_frees_the_model(service, drawing):
    updates = service.make_photos(
        PhotoRequest(drawing, "b", 1, settings={**STEPS, "num_inference_steps": 100}), "gone"
    )
    next(updates)
    updates.close()
    assert isinstance(finish(service.make_photos(PhotoRequest(drawing, "b", 1, 5, settings=STEPS), "next")), Photos)
    assert not service.pipe.interrupt and service._running == []


def test_an_edit_stops_while_its_photo_is_inverted(service, drawing):
    passes = []

    def stop_at_third(unet, args):
        passes.append(args[1])
        if len(passes) == 3:
            service.stop("a")

    with service.pipe.unet.register_forward_pre_hook(stop_at_third):
        updates = list(
            service.edit_photo(Image.effect_noise((64, 64), 60).convert("RGB"), drawing, "b", 1, 3, 0.9, "a")
        )
    assert updates == [] and len(passes) == 3
    assert isinstance(finish(service.make_photos(PhotoRequest(drawing, "b", 1, 5, settings=STEPS), "a")), Photos)


def test_a_request_that_fails_harms_no_other(service, drawing):
    blank = Image.new("RGB", (64, 64), "white")
    with pytest.raises(ValueError, match="holds no drawing"):
        finish(service.make_photos(PhotoRequest(blank), "a"))
    assert isinstance(finish(service.make_photos(PhotoRequest(drawing, settings=STEPS), "a")), Photos)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "`num_images`.* 0"),
        ({"num_images": 9}, "`num_images`.* 9"),
        ({"seed": -1}, "`seed`.* -1"),
        ({"realism": 1.5}, r"`realism`.* 1.5"),
        (
            {"settings": {"num_inference_steps": 101}},
            "`num_inference_steps`.* 101",
        ),
        ({"variations": (demo.Variation(1, 0.0),)}, "`variations`.*=0.0"),
        ({"class_label": "z"}, "unknown class 'z'"),
    ],
)
def test_out_of_bounds_is_told(service, drawing, changes, message):
    with pytest.raises(ValueError, match=message):
        finish(service.make_photos(PhotoRequest(drawing, **changes), "a"))


def test_the_slider_leads_from_the_drawing_over_the_recommendation_to_realism(service, tiny_pipeline_factory):
    ends = [service.call_settings(position) for position in (0.0, 0.5, 1.0)]
    assert ends[1]["sketch_guidance_scale"] == 2.0 and ends[1]["classifier_guidance_scale"] == 1.5
    sketch, classifier = ([end[f"{name}_guidance_scale"] for end in ends] for name in ("sketch", "classifier"))
    assert sketch == sorted(sketch, reverse=True) and sketch[-1] == 1.0
    assert classifier[0] < classifier[1] == classifier[2]
    poor = DemoService(tiny_pipeline_factory(components=(), in_channels=3))
    assert poor.call_settings(0.2).keys() == {"guidance_start", "guidance_end"}


def test_more_like_one_starts_as_it_did_and_ends_otherwise(service, drawing):
    photos = finish(service.make_photos(PhotoRequest(drawing, "b", 2, 3, settings=STEPS), "a"))
    request = more_like_this(photos, 1, seed=40, num_images=2)
    assert (request.seed, request.variations) == (4, (demo.Variation(40, 0.6),))
    *progress, near = service.make_photos(request, "a")
    *origin, _ = service.make_photos(PhotoRequest(drawing, "b", 2, 4, settings=STEPS), "a")
    # Of six steps the first two are the same, the fourth is not.
    first, fourth = ([pixels(run[k].images[:1]) for run in (progress, origin)] for k in (0, 3))
    assert np.abs(first[0] - first[1]).max() <= 2 < np.abs(fourth[0] - fourth[1]).max()
    assert np.abs(pixels(near.images[:1]) - pixels(near.images[1:])).max() > 2
    assert [record["variations"][0]["seed"] for record in near.records] == [40, 41]
    nearer = more_like_this(near, 1, seed=9, num_images=1)
    assert nearer.variations == (demo.Variation(41, 0.6), demo.Variation(9, pytest.approx(0.36)))
    assert finish(service.make_photos(nearer, "a")).records[0]["file"] == "photo_4_41_9.png"
    with pytest.raises(ValueError, match="`index`.* 5"):
        more_like_this(photos, 5, 0)


def test_the_archive_makes_its_photos_again(service, drawing):
    photos = finish(service.make_photos(PhotoRequest(drawing, None, 2, 11, realism=0.8, settings=STEPS), "a"))
    with zipfile.ZipFile(io.BytesIO(service.archive(photos))) as archive:
        assert archive.namelist() == ["drawing.png", "photo_11.png", "photo_12.png", "metadata.json"]
        document = json.loads(archive.read("metadata.json"))
        kept, written = (Image.open(io.BytesIO(archive.read(name))) for name in ("drawing.png", "photo_12.png"))
    record = document["images"][1]
    assert record["class_predicted"] and document["model"] == service.model_record
    again = service.pipe(
        kept,
        class_labels=record["class_label"],
        num_images_per_sketch=1,
        generator=[torch.Generator().manual_seed(record["seed"])],
        **{name: record[name] for name in demo.CALL_SETTINGS if name in record},
    )
    assert np.abs(pixels([written]) - pixels(again.images)).max() <= 2


def test_classes_without_names_are_numbers(tiny_pipeline_factory, drawing):
    service = DemoService(tiny_pipeline_factory(id2label={}))
    assert service.class_names[:2] == ["0", "1"]
    photos = finish(service.make_photos(PhotoRequest(drawing, "0", 1, settings=STEPS), "a"))
    assert photos.records[0]["class_label"] == 0 and not photos.records[0]["class_predicted"]
    with pytest.raises(ValueError, match="unknown class 'shoe'"):
        finish(service.make_photos(PhotoRequest(drawing, "shoe", 1, settings=STEPS), "a"))


def test_history_comes_back_from_json_and_stays_small(monkeypatch, service, drawing):
    photos = finish(service.make_photos(PhotoRequest(drawing, "b", 1, settings=STEPS), "a"))
    history = json.loads(json.dumps(demo.remember([], photos)))
    back = demo.recall(history[0])
    assert (pixels(back.images) == pixels(photos.images)).all() and back.records == photos.records
    assert not ImageChops.difference(back.sources["drawing"], drawing).getbbox()
    monkeypatch.setattr(demo, "MAX_HISTORY_BYTES", int(2.5 * len(json.dumps(history[0]))))
    for _ in range(4):
        history = demo.remember(history, photos)
    assert len(history) == 2
    for broken in ({}, {**history[0], "pictures": ["!"]}, {**history[0], "records": []}):
        with pytest.raises(ValueError, match="this entry of the history cannot be read"):
            demo.recall(broken)


def test_a_crafted_history_is_refused_before_its_pictures_are_decoded(service, drawing):
    photos = finish(service.make_photos(PhotoRequest(drawing, "b", 1, settings=STEPS), "a"))
    entry = json.loads(json.dumps(demo.remember([], photos)))[0]
    (record,) = entry["records"]
    large = io.BytesIO()
    Image.new("1", (8000, 8000)).save(large, "PNG")
    bomb = base64.b64encode(large.getvalue()).decode()
    changes = [{"file": name} for name in (3, None, "../photo_0.png", "photo_0.svg", "photo_" + "1" * 99 + ".png")]
    changes += [{"seed": seed} for seed in (-1, 2**40, 0.5, "0", None, True, [])]
    changes += [{"variations": value} for value in (3, [3], [{"seed": 0}], [{"seed": 0, "strength": 2}], {"a": 1})]
    changes += [{"variations": [{"seed": "0", "strength": 0.5}]}, {"class_label": {"b": 1}}, {"class_label": [1]}]
    changes += [{"eta": value} for value in ("1", [], 1e30, float("nan"))]
    crafted = [{**entry, "records": [record | change]} for change in changes]
    crafted += [{**entry, "pictures": [bomb, bomb]}, {**entry, "pictures": [entry["pictures"][0], 3]}]
    crafted += [
        {"pictures": 9 * ["A" * 10**6], "records": 8 * [record]},
        {"pictures": 1002 * [""], "records": 1001 * [record]},
    ]
    crafted += [{"pictures": {}, "records": {}}, {**entry, "records": "ab"}, None, 3, "text", [entry], [[]]]
    began = time.process_time()
    for value in crafted:
        with pytest.raises(ValueError, match="this entry of the history cannot be read"):
            demo.recall(value)
    assert time.process_time() - began < 2
    assert demo.recall(entry).records == photos.records


def test_an_upload_is_redrawn_and_its_place_is_not_told(service, tmp_path):
    path = tmp_path / "secret" / "paper.png"
    path.parent.mkdir()
    page = Image.new("L", (300, 200), 40)
    ImageDraw.Draw(page).ellipse((100, 50, 200, 150), outline=230, width=5)
    page.save(path)
    layer = service.read_drawing(path)
    assert layer.size == (demo.CANVAS_SIZE, demo.CANVAS_SIZE) and layer.getpixel((0, 0))[3] == 0
    column = np.asarray(layer)[:, demo.CANVAS_SIZE // 2, 3]
    assert np.flatnonzero(column > 200).min() < 30 and np.flatnonzero(column > 200).max() > demo.CANVAS_SIZE - 30
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="^paper.png is damaged or truncated; save it again") as error:
        service.read_drawing(path)
    assert "secret" not in str(error.value)


def test_the_model_is_shown_what_the_page_shows(service, drawing):
    seen, probabilities = service.preview_drawing(drawing)
    assert seen.size == (16, 16) and sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    sketch = service.pipe.prepare_sketches(drawing)[0]
    torch.testing.assert_close(
        torch.tensor(list(probabilities.values())), service.pipe.predict_class_probabilities(sketch)
    )


def test_a_guess_without_a_favorite_is_told(service):
    even, sure = {"a": 0.4, "b": 0.3, "c": 0.3}, {"a": 0.9, "b": 0.05, "c": 0.05}
    assert not service.is_unfamiliar(even)
    service.pipe.recommended["max_class_entropy"] = 0.9
    assert service.is_unfamiliar(even) and not service.is_unfamiliar(sure) and not service.is_unfamiliar({})


def test_a_photo_is_edited_where_it_was_drawn_on(service):
    photo = Image.effect_noise((64, 64), 60).convert("RGB")
    strokes = Image.new("RGB", photo.size, "white")
    ImageDraw.Draw(strokes).rectangle((20, 20, 40, 40), outline="black", width=2)
    edited = finish(service.edit_photo(photo, strokes, "b", 1, 3, 0.9, "a"))
    changed = np.abs(pixels(edited.images)[0] - pixels([photo])[0]).max(-1) > 0
    assert changed[22:38, 22:38].mean() > 0.5 and not changed[:8].any() and not changed[:, 56:].any()
    assert list(edited.sources) == ["photo", "drawing"] and edited.records[0]["strength"] == 0.9
    with pytest.raises(ValueError, match="`num_images` has to be between"):
        finish(service.edit_photo(photo, strokes, "b", 99, 3, 0.9, "a"))


def test_frames_lead_from_one_drawing_to_the_other(service, drawing):
    other = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(other).ellipse((20, 40, 100, 80), outline="black", width=4)
    frames = finish(service.interpolate([drawing, other], "b", 3, 5, "a"))
    assert [record["file"] for record in frames.records] == ["frame_00.png", "frame_01.png", "frame_02.png"]
    assert len({image.tobytes() for image in frames.images}) == 3
    for k, key in ((0, drawing), (2, other)):
        photo = finish(service.make_photos(PhotoRequest(key, "b", 1, 5), "a"))
        assert np.abs(pixels(frames.images[k : k + 1]) - pixels(photo.images)).max() <= 2
    with pytest.raises(ValueError, match="`num_frames`.* 17"):
        finish(service.interpolate([drawing, other], "b", 17, 5, "a"))


def test_the_examples_are_six_drawings():
    assert [path.stem for path in demo.example_drawings()] == [
        "dress",
        "hat",
        "longsleeve",
        "pants",
        "shoes",
        "t-shirt",
    ]


def test_the_old_name_of_the_service_is_accepted_with_a_warning():
    with pytest.warns(FutureWarning, match="`Studio` is now `DemoService`"):
        assert demo.Studio is DemoService
