# SPDX-License-Identifier: Apache-2.0
import io
import logging
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from diffsketching_pipeline.images import free_hand
from diffsketching_pipeline.images.contours import (
    CONTOUR_NAMES,
    CONTOUR_SIZE,
    DEFAULT_LINE_GAIN,
    contour_to_sketch,
    photo_to_contours,
    photo_to_sketch,
)
from diffsketching_pipeline.images.free_hand import free_hand_distortion
from diffsketching_pipeline.training import cache
from diffsketching_pipeline.training import dataset as data
from diffsketching_pipeline.training.dataset import PhotoSketchDataset


def rectangle_photo(size=(96, 128), box=(24, 30, 71, 97), color=(30, 60, 160)):
    """A dark rectangle on light cloth with a little texture."""
    rng = np.random.default_rng(0)
    cloth = np.clip(225 + rng.normal(0, 3, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    photo = Image.fromarray(cloth)
    ImageDraw.Draw(photo).rectangle(box, fill=color)
    return photo


@pytest.fixture
def dataset(shapes_dir, cache_dir):
    return PhotoSketchDataset(shapes_dir, "train", resolution=32, cache_dir=cache_dir)


# ---- contours --------------------------------------------------------------------------------------------------------


def test_contours_run_along_the_object():
    box = (24, 30, 71, 97)
    contours = photo_to_contours(rectangle_photo(box=box))
    assert len(contours) == len(CONTOUR_NAMES)
    scale = CONTOUR_SIZE / 96
    truth = np.zeros(contours[0].shape, bool)
    left, top, right, bottom = (round(v * scale) for v in (box[0], box[1], box[2] + 1, box[3] + 1))
    truth[top:bottom, left:right] = True
    outline = truth & ~ndimage.binary_erosion(truth)
    for name, contour in zip(CONTOUR_NAMES, contours, strict=True):
        assert contour.dtype == bool and min(contour.shape) == CONTOUR_SIZE
        # Both ways: ink only near the outline, and the outline everywhere near ink (rounded corners included).
        assert (ndimage.distance_transform_edt(~outline)[contour]).max() < 14, name
        assert np.mean(ndimage.distance_transform_edt(~contour)[outline] < 8) > 0.95, name


def test_photos_of_any_mode_and_without_edges():
    assert not np.any(photo_to_contours(Image.new("RGB", (40, 40), "white")))
    for mode in ("L", "RGBA", "CMYK", "P"):
        assert photo_to_contours(rectangle_photo().convert(mode))[4].any()
    assert max(photo_to_contours(Image.new("RGB", (4, 400)))[0].shape) == 4 * CONTOUR_SIZE


def test_sketch_is_area_coverage_times_gain():
    rng = np.random.default_rng(0)
    contour = rng.random((32, 64)) < 0.3
    coverage = contour.reshape(8, 4, 8, 8).mean((1, 3))
    expected = np.maximum(1 - 2 * 1.7 * coverage, -1)
    np.testing.assert_allclose(contour_to_sketch(contour, 8, line_gain=1.7), expected, atol=1e-5)
    part = contour_to_sketch(contour, 8, box=(0.5, 0.0, 1.0, 0.5), line_gain=1.7)
    np.testing.assert_allclose(part, contour_to_sketch(contour[:16, 32:], 8, line_gain=1.7), atol=1e-5)
    with pytest.raises(ValueError, match="2-D"):
        contour_to_sketch(contour[None], 8)


def test_photo_to_sketch_draws_one_named_contour():
    photo = rectangle_photo()
    expected = contour_to_sketch(photo_to_contours(photo)[4], 64)
    sketch = photo_to_sketch(photo, 64, contour="silhouette")
    np.testing.assert_array_equal(sketch, expected)
    assert sketch.dtype == np.float32 and sketch.min() == -1 and sketch.max() == 1
    with pytest.raises(ValueError, match="`contour`.*'thick'"):
        photo_to_sketch(photo, 64, contour="thick")


def test_jitter_moves_strokes_by_at_most_its_bound():
    contour = np.zeros((256, 256), bool)
    contour[:, 127:130] = True
    columns = (np.arange(64) + 0.5)[None, :]
    furthest = 0.0
    for seed in range(30):
        sketch = free_hand.render_jittered(contour, 64, (0, 0, 1, 1), 1.0, 1.0, np.random.default_rng(seed))
        ink = (1 - sketch) / 2
        ink = ink[3:-3]  # at the rim a stroke may leave the page
        assert (ink.sum(1) > 0.4).all()
        furthest = max(furthest, np.abs((ink * columns).sum(1) / ink.sum(1) - 128.5 / 4).max())
    assert 0.5 < furthest <= 1.6


# ---- free-hand distortion --------------------------------------------------------------------------------------------


def two_part_drawing():
    ink = np.zeros((128, 128), bool)
    ink[30:100, 30:33] = ink[30:33, 30:100] = ink[97:100, 30:100] = ink[30:100, 97:100] = True
    ink[60:70, 60:62] = True
    return ink


def test_distortion_is_keyed_binary_and_never_empty():
    ink = two_part_drawing()
    np.testing.assert_array_equal(free_hand_distortion(ink, np.random.default_rng(0), 0.0), ink)
    for seed in range(40):
        drawn = free_hand_distortion(ink, np.random.default_rng(seed), 1.0)
        again = free_hand_distortion(ink, np.random.default_rng(seed), 1.0)
        np.testing.assert_array_equal(drawn, again)
        assert drawn.dtype == bool and drawn.shape == ink.shape and drawn.any() and (drawn != ink).any()
    assert not free_hand_distortion(np.zeros((8, 8)), np.random.default_rng(0)).any()


def test_distortion_grows_with_strength():
    ink = two_part_drawing()
    distance = ndimage.distance_transform_edt(~ink)

    def mean_distance(strength):
        drawn = [free_hand_distortion(ink, np.random.default_rng(seed), strength) for seed in range(30)]
        return np.mean([distance[d].mean() for d in drawn])

    weak, medium, strong = (mean_distance(strength) for strength in (0.1, 0.4, 1.0))
    assert weak < 1 < medium < strong < 12


def test_straightened_outline_has_few_corners_near_the_drawing():
    disc = np.hypot(*np.mgrid[-64:64, -64:64]) < 40
    ring = disc & ~ndimage.binary_erosion(disc, iterations=2)
    polygon = free_hand.straightened_outline(ring, tolerance=5.0)
    distance = ndimage.distance_transform_edt(~ring)[polygon]
    assert 2 < distance.max() < 8
    # Lines of 2 pixels about as long as the circle: chords, but all the way round.
    assert 0.8 * 40 * 2 * np.pi < polygon.sum() / 2 < 1.1 * 40 * 2 * np.pi
    closer = ndimage.distance_transform_edt(~ring)[free_hand.straightened_outline(ring, tolerance=1.0)]
    assert closer.mean() < distance.mean()
    ring[60:68] = False
    assert free_hand.straightened_outline(ring, tolerance=5.0) is None


def test_dropped_parts_are_never_the_largest():
    ink, kept_small = two_part_drawing(), []
    for seed in range(60):
        parts = free_hand._drop_parts(ink, np.random.default_rng(seed), 1.0)
        assert parts[30:100, 30:33].all()
        kept_small.append(parts[65, 60])
    assert 0.3 < np.mean(kept_small) < 0.8


def test_deleted_strokes_are_a_share_of_what_was_drawn():
    ink = two_part_drawing()
    for seed in range(20):
        assert np.array_equal(free_hand.delete_strokes(ink, np.random.default_rng(seed), 0.0), ink)
        half, most, but_one = (
            free_hand.delete_strokes(ink, np.random.default_rng(seed), share) for share in (0.5, 0.9, 1.0)
        )
        np.testing.assert_array_equal(half, free_hand.delete_strokes(ink, np.random.default_rng(seed), 0.5))
        assert not (half & ~ink).any() and not (most & ~half).any() and not (but_one & ~most).any()
        assert but_one.any() and 0.1 < half.sum() / ink.sum() < 0.95
        # The square is one connected part of which a stroke stays: it is cut.
        assert but_one.sum() < 0.9 * ink.sum()
    assert not free_hand.delete_strokes(np.zeros((8, 8)), np.random.default_rng(0), 0.5).any()
    with pytest.raises(ValueError, match="`share`.* 1.5"):
        free_hand.delete_strokes(ink, np.random.default_rng(0), 1.5)


def test_distortion_refuses_what_is_no_drawing():
    with pytest.raises(ValueError, match="`sketch`.*2-D"):
        free_hand_distortion(np.zeros((1, 8, 8)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="`strength`"):
        free_hand_distortion(np.ones((8, 8)), np.random.default_rng(0), -1.0)


# ---- dataset ---------------------------------------------------------------------------------------------------------


def assert_same_sample(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_samples_are_keyed_by_seed_epoch_and_index(shapes_dir, cache_dir, dataset):
    assert (len(dataset), dataset.id2label) == (16, {0: "disc", 1: "square"})
    later = [dataset.sample(i, 3) for i in (5, 2)]
    fresh = PhotoSketchDataset(shapes_dir, "train", resolution=32, cache_dir=cache_dir)
    assert_same_sample(fresh.sample(2, 3), later[1])
    assert_same_sample(fresh.sample(5, 3), later[0])
    assert_same_sample(fresh[(3, 5)], later[0])
    assert not torch.equal(fresh.sample(5, 4)["pixel_values"], later[0]["pixel_values"])
    other_seed = PhotoSketchDataset(shapes_dir, "train", resolution=32, seed=1, cache_dir=cache_dir)
    assert not torch.equal(other_seed.sample(5, 3)["sketch"], later[0]["sketch"])


def test_sample_holds_what_it_says(dataset):
    sample = dataset.sample(9, 0)
    assert (sample["id"], sample["class_label"]) == (dataset.files[9].stem, dataset.class_labels[9])
    assert dataset.id2label[sample["class_label"]] == dataset.files[9].parent.name
    for name, channels in (("pixel_values", 3), ("sketch", 1)):
        assert sample[name].shape == (channels, 32, 32) and sample[name].dtype == torch.float32
        assert -1 <= sample[name].min() < -0.2 and 0.7 < sample[name].max() <= 1


def test_sketch_and_photo_stay_aligned(shapes_dir, cache_dir):
    silhouette_only = (0, 0, 0, 0, 1)
    dataset = PhotoSketchDataset(
        shapes_dir, "train", resolution=64, cache_dir=cache_dir, contour_probabilities=silhouette_only
    )
    for draw in range(40):
        sample = dataset.sample(draw % len(dataset), draw)
        # Paper is white, the shapes are saturated: they differ in the spread over channels.
        shape = np.ptp(sample["pixel_values"].numpy(), axis=0) > 0.5
        ink = sample["sketch"][0].numpy() < 0.5
        for axis in (0, 1):
            inside, drawn = np.flatnonzero(shape.any(axis)), np.flatnonzero(ink.any(axis))
            assert abs(inside[0] - drawn[0]) <= 4 and abs(inside[-1] - drawn[-1]) <= 4


def test_a_share_of_the_drawings_is_only_roughly_where_the_photo_is(shapes_dir, cache_dir):
    plain, drawn = (
        PhotoSketchDataset(
            shapes_dir,
            "train",
            resolution=64,
            cache_dir=cache_dir,
            contour_probabilities=(0, 0, 0, 0, 1),
            free_hand_share=share,
        )
        for share in (0.0, 0.5)
    )
    distances, exact = [], 0
    for draw in range(40):
        one, other = (dataset.sample(draw % 16, draw) for dataset in (plain, drawn))
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and other["sketch"].min() < 0.5
        near_outline = ndimage.distance_transform_edt(one["sketch"][0].numpy() > 0)
        distances.append(float(near_outline[other["sketch"][0].numpy() < 0].mean()))
        exact += distances[-1] < 1
    # About half are within the jitter of 1.5 pixels; the others are off by some more, but of the same shape.
    assert 10 <= exact <= 30
    assert 2 < max(distances) < 16


def assert_half_made(shapes_dir, cache_dir, **options):
    """Compares drawings of which a half lack up to 0.9 of their strokes with the whole ones; returns the shares left."""
    plain, half_made = (
        PhotoSketchDataset(
            shapes_dir,
            resolution=64,
            cache_dir=cache_dir,
            contour_probabilities=(0, 0, 0, 0, 1),
            stroke_deletion_share=share,
            **options,
        )
        for share in (0.0, 0.5)
    )
    left = []
    for draw in range(40):
        one, other = (dataset.sample(draw % 16, draw) for dataset in (plain, half_made))
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert other["sketch_abstraction"] == 0
        left.append(float((1 - other["sketch"]).sum() / (1 - one["sketch"]).sum()))
    return left


def test_half_made_drawings_trace_the_photo_and_are_never_empty(shapes_dir, cache_dir):
    left = assert_half_made(shapes_dir, cache_dir, jitter=0.0)
    assert 0.02 < min(left) < 0.3 and max(left) == 1.0
    assert 10 <= sum(share == 1.0 for share in left) <= 30
    assert min(assert_half_made(shapes_dir, cache_dir)) > 0.02
    with pytest.raises(ValueError, match="`max_stroke_deletion`.* 2"):
        PhotoSketchDataset(shapes_dir, max_stroke_deletion=2)


def test_abstraction_is_the_strength_in_use_over_the_largest(shapes_dir, cache_dir, monkeypatch):
    strengths = []

    def distort(ink, rng, strength):
        strengths.append(strength)
        return ink

    monkeypatch.setattr(data, "free_hand_distortion", distort)
    monkeypatch.setattr(free_hand, "straightened_outline", lambda ink, tolerance: ink.copy())

    def abstractions(straightened_share, **options):
        monkeypatch.setattr(data, "STRAIGHTENED_SHARE", straightened_share)
        strengths.clear()
        dataset = PhotoSketchDataset(shapes_dir, resolution=32, cache_dir=cache_dir, **options)
        samples = [dataset.sample(draw % 16, draw)["sketch_abstraction"] for draw in range(30)]
        assert all(value.dtype == torch.float32 and value.shape == () for value in samples)
        return np.array([float(value) for value in samples])

    assert (abstractions(0.0) == 0).all() and not strengths
    values = abstractions(0.0, free_hand_share=1.0, free_hand_strength=0.5)
    np.testing.assert_allclose(values, np.array(strengths) / 0.5, rtol=1e-6)
    assert values.min() < 0.2 and values.max() > 0.8
    half_made = abstractions(0.0, free_hand_share=1.0, free_hand_strength=0.5, stroke_deletion_share=1.0)
    np.testing.assert_allclose(half_made, np.array(strengths) / 0.5, rtol=1e-6)
    values = abstractions(1.0, free_hand_share=1.0, free_hand_strength=0.5)
    np.testing.assert_allclose(values, np.maximum(strengths, free_hand.STRAIGHTENED_STRENGTH) / 0.5, rtol=1e-6)
    assert (values == 0.5).sum() > 5
    assert (abstractions(1.0, free_hand_share=1.0, free_hand_strength=0.0) == 1).all()
    mixed = abstractions(0.0, free_hand_share=0.5)
    assert (mixed == 0).sum() == 30 - len(strengths) and 5 < len(strengths) < 25


def test_photos_are_not_enlarged_for_large_samples(tmp_path):
    photo = rectangle_photo((150, 200), box=(30, 30, 99, 149))
    content = io.BytesIO()
    photo.save(content, "png")
    assert cache.prepare_photo(content.getvalue(), 512).image.shape == (200, 150, 3)
    # Small sizes stay as they were, or all that was made at them would change.
    assert cache.prepare_photo(content.getvalue(), 256).image.shape == (341, 256, 3)
    np.testing.assert_array_equal(cache.photo_to_keep(photo, 512), np.asarray(photo))


def test_crops_squash_by_at_most_four_to_three(tmp_path):
    for i, size in enumerate([(60, 240), (240, 60), (90, 120)]):
        path = tmp_path / "train" / "thing" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rectangle_photo(size, box=(20, 20, 39, 39)).save(path)
    dataset = PhotoSketchDataset(tmp_path, "train", resolution=32)
    for index in range(3):
        photo = dataset.photo(index)
        height, width = photo.image.shape[:2]
        for seed in range(50):
            left, top, right, bottom = dataset._crop_box(photo, np.random.default_rng(seed))
            assert 0 <= left < right <= 1 + 1e-9 and 0 <= top < bottom <= 1 + 1e-9
            w, h = (right - left) * width, (bottom - top) * height
            assert max(w / h, h / w) <= 4 / 3 + 1e-6
            x0, y0, x1, y1 = photo.content_box
            assert left <= x0 + 1e-6 and top <= y0 + 1e-6 and right >= x1 - 1e-6 and bottom >= y1 - 1e-6


def test_validation_samples_are_plain(shapes_dir, cache_dir):
    dataset = PhotoSketchDataset(shapes_dir, "validation", resolution=32, train=False, cache_dir=cache_dir)
    assert_same_sample(dataset.sample(3, 0), dataset.sample(3, 7))
    photo = Image.fromarray(dataset.photo(3).image).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(photo, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(dataset.sample(3)["pixel_values"], expected, atol=1e-6)
    drawn = contour_to_sketch(dataset.photo(3).contours[3], 32)
    np.testing.assert_allclose(dataset.sample(3)["sketch"][0], drawn, atol=1e-6)


def test_all_contours_come_in_one_stack(shapes_dir, cache_dir):
    dataset = PhotoSketchDataset(
        shapes_dir,
        "train",
        resolution=32,
        cache_dir=cache_dir,
        contours="all",
        jitter=0.0,
        line_gain=(DEFAULT_LINE_GAIN,) * 2,
    )
    for draw in range(6):
        sample = dataset.sample(1, draw)
        assert sample["sketches"].shape == (len(CONTOUR_NAMES), 1, 32, 32)
        # The single sketch is one of them: crop and flip agree.
        assert (sample["sketches"] - sample["sketch"]).abs().amax((1, 2, 3)).min() < 1e-6
    photos = PhotoSketchDataset(shapes_dir, "train", resolution=32, cache_dir=cache_dir, contours="none")
    assert photos.sample(0).keys() == {"pixel_values", "class_label", "id"}


@pytest.mark.slow
def test_cache_is_shared_remade_when_damaged_and_equal_to_memory(shapes_dir, tmp_path):
    dataset = PhotoSketchDataset(shapes_dir, "validation", resolution=32)
    cached = PhotoSketchDataset(shapes_dir, "validation", resolution=32, cache_dir=tmp_path)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 8 and not list(tmp_path.rglob("*.tmp"))
    assert_same_sample(cached.sample(4, 1), dataset.sample(4, 1))

    times = [file.stat().st_mtime_ns for file in files]
    for file in files[1:3]:
        file.write_bytes(file.read_bytes()[:500])
    again = PhotoSketchDataset(shapes_dir, "validation", resolution=32, cache_dir=tmp_path)
    for index in range(8):
        assert_same_sample(again.sample(index, 1), dataset.sample(index, 1))
    changed = [file.stat().st_mtime_ns != time for file, time in zip(files, times, strict=True)]
    assert changed == [False, True, True] + [False] * 5


def test_interrupted_write_leaves_nothing(shapes_dir, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PhotoSketchDataset(shapes_dir, "train", resolution=32, cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["a file is in its place", "the disk is full"])
def test_a_cache_that_fails_loses_no_photo_and_is_said_once(problem, shapes_dir, tmp_path, caplog, capsys):
    cache_dir = tmp_path / "cache"
    if problem == "a file is in its place":
        cache_dir.touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = {"the disk is full": 1000}.get(problem, limits[0])
    plain = PhotoSketchDataset(shapes_dir, "train", resolution=32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        dataset = PhotoSketchDataset(shapes_dir, "train", resolution=32, cache_dir=cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert dataset.ids == plain.ids and not dataset.corrupt_files
    for index in range(len(plain)):
        assert_same_sample(dataset.sample(index, 1), plain.sample(index, 1))
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(cache_dir) in message and "cannot be written to" in message
    assert not [path for path in tmp_path.glob("cache/*/*") if path.is_file()]


def test_unreadable_files_are_named_once_and_left_out(tmp_path, caplog):
    folder = tmp_path / "train" / "thing"
    folder.mkdir(parents=True)
    rectangle_photo().save(folder / "good.png")
    (folder / "empty.jpg").touch()
    whole = tmp_path / "whole.jpg"
    rectangle_photo().save(whole)
    (folder / "truncated.jpg").write_bytes(whole.read_bytes()[:900])
    with caplog.at_level(logging.WARNING):
        dataset = PhotoSketchDataset(tmp_path, "train", resolution=32)
    assert dataset.ids == ["good"]
    assert [file.name for file in dataset.corrupt_files] == ["empty.jpg", "truncated.jpg"]
    assert [r.getMessage() for r in caplog.records] == ["2 of 3 files unreadable, left out: empty.jpg, truncated.jpg"]


def test_folders_that_are_no_dataset_are_refused(shapes_dir, tmp_path):
    with pytest.raises(ValueError, match="`root` must hold at least two photos, .* holds 0"):
        PhotoSketchDataset(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images"):
        PhotoSketchDataset(tmp_path)
    (tmp_path / "train" / "a" / "1.png").touch()
    with pytest.raises(ValueError, match="no readable photo"):
        PhotoSketchDataset(tmp_path)
    (tmp_path / "validation" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="classes that the training photos lack: b"):
        PhotoSketchDataset(tmp_path, "validation")
    with pytest.raises(ValueError, match="`contour_probabilities` needs 5 values"):
        PhotoSketchDataset(shapes_dir, contour_probabilities=(1.0,))


def test_keep_chooses_photos_by_name(shapes_dir):
    dataset = PhotoSketchDataset(shapes_dir, "train", resolution=32, keep=lambda name: name.endswith("4"))
    assert dataset.ids == ["disc-04", "disc-14"] and dataset.id2label == {0: "disc", 1: "square"}
