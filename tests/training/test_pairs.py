# SPDX-License-Identifier: Apache-2.0
"""Drawings that people made of photos, in the layouts that people have them in."""

import io
import logging
import pickle
import shutil
import unicodedata

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffsketching_pipeline.splits import in_validation
from diffsketching_pipeline.training.arguments import TrainingArguments, check_dataset_name, resolve_data_dir
from diffsketching_pipeline.training.pairs import PairedPhotoDataset, find_pairs, load_dataset_pairs, split_pairs


SIZE = (96, 64)  # width, height: the drawing covers the photo's frame, whatever its shape


def draw_pair(i, k=0):
    """A photo of a dark box on light cloth, and the outline of the box as drawing k of it."""
    rng = np.random.default_rng([i, 1])
    left, top = (int(v) for v in rng.integers(8, 20, 2))
    box = (left, top, left + 40, top + 30)
    photo = Image.fromarray(np.clip(220 + rng.normal(0, 4, (SIZE[1], SIZE[0], 3)), 0, 255).astype(np.uint8))
    ImageDraw.Draw(photo).rectangle(box, fill=(30, 30, 90))
    sketch = Image.new("L", (2 * SIZE[0], 2 * SIZE[1]), 255)
    ImageDraw.Draw(sketch).rectangle([2 * v + k for v in box], outline=0, width=3)
    return photo, sketch


@pytest.fixture
def sketchy_dir(tmp_path):
    """`photo/<class>/<id>.png` with two drawings each, `sketch/<class>/<id>-<k>.png`."""
    root = tmp_path / "sketchy"
    for i in range(12):
        label = ("cat", "dog")[i % 2]
        for folder in ("photo", "sketch"):
            (root / folder / label).mkdir(parents=True, exist_ok=True)
        photo, _ = draw_pair(i)
        photo.save(root / "photo" / label / f"{label}_{i:02d}.png")
        for k in (1, 2):
            draw_pair(i, k)[1].save(root / "sketch" / label / f"{label}_{i:02d}-{k}.png")
    return root


@pytest.mark.slow
def test_sketchys_layout(sketchy_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pairs = find_pairs(sketchy_dir / "photo", sketchy_dir / "sketch")
    assert len(pairs) == 12 and not caplog.records
    assert all(len(pair.sketches) == 2 and pair.label == pair.stem.split("/")[0] for pair in pairs)
    dataset = PairedPhotoDataset(pairs, ["cat", "dog"], resolution=16, train=False, cache_dir=tmp_path / "cache")
    assert dataset.ids == [pair.stem for pair in pairs]
    assert dataset.class_labels == [("cat", "dog").index(pair.label) for pair in pairs]
    for index in (0, 5):
        pixels, drawings, box = dataset.view(index)
        assert pixels.shape == (3, 16, 16) and len(drawings) == 2 and drawings.dtype == bool
        assert torch.equal(dataset.view(index)[0], pixels)


@pytest.mark.slow
def test_a_drawing_lies_on_the_photo_it_was_made_of(sketchy_dir):
    pairs = find_pairs(sketchy_dir / "photo", sketchy_dir / "sketch")
    dataset = PairedPhotoDataset(pairs, ["cat", "dog"], resolution=32, train=False)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        dark = sample["pixel_values"].mean(0) < 0
        rows, columns = torch.nonzero(dark.any(1)).flatten(), torch.nonzero(dark.any(0)).flatten()
        strokes = sample["sketch"][0] < 0.3
        drawn_rows, drawn_columns = torch.nonzero(strokes.any(1)).flatten(), torch.nonzero(strokes.any(0)).flatten()
        for photo, drawing in ((rows, drawn_rows), (columns, drawn_columns)):
            assert abs(int(photo[0]) - int(drawing[0])) <= 2 and abs(int(photo[-1]) - int(drawing[-1])) <= 2
    train = PairedPhotoDataset(pairs, ["cat", "dog"], resolution=32, train=True)
    seen = {train.sample(3, epoch)["sketch"].numpy().tobytes() for epoch in range(6)}
    assert len(seen) == 6


def test_two_folders_matched_by_stem_have_no_class(tmp_path):
    for folder in ("photos", "drawings"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        photo, sketch = draw_pair(i)
        photo.save(tmp_path / "photos" / f"{i}.jpg")
        sketch.save(tmp_path / "drawings" / f"{i}.png")
    pairs = find_pairs(tmp_path / "photos", tmp_path / "drawings")
    assert [pair.stem for pair in pairs] == ["0", "1", "2"] and {pair.label for pair in pairs} == {None}
    assert PairedPhotoDataset(pairs, ["cat"], 16, null_class=1).class_labels == [1, 1, 1]
    with pytest.raises(ValueError, match="the photos have no class, and the model has no 'no class'"):
        PairedPhotoDataset(pairs, ["cat"], 16)


@pytest.mark.slow
def test_what_does_not_fit_is_named_once_and_left_out(sketchy_dir, caplog):
    photos, sketches = sketchy_dir / "photo", sketchy_dir / "sketch"
    for k in (1, 2):
        (sketches / "cat" / f"cat_00-{k}.png").unlink()  # a photo without drawings
    shutil.copy(sketches / "dog" / "dog_01-1.png", sketches / "dog" / "dog_99-1.png")  # a drawing without a photo
    shutil.copy(photos / "cat" / "cat_02.png", photos / "cat" / "cat_98.png")  # a copy under another name
    shutil.copy(sketches / "cat" / "cat_02-1.png", sketches / "cat" / "cat_98-1.png")
    Image.open(photos / "dog" / "dog_03.png").save(photos / "dog" / "dog_03.webp")  # one name, two suffixes
    (sketches / "dog" / "dog_05-2.png").write_bytes(b"not a picture")
    (photos / "dog" / "dog_07.png").write_bytes((photos / "dog" / "dog_07.png").read_bytes()[:200])
    for k in (1, 2):
        Image.new("L", (20, 20), 255).save(sketches / "dog" / f"dog_09-{k}.png")  # nothing drawn
    with caplog.at_level(logging.WARNING):
        pairs = find_pairs(photos, sketches)
        dataset = PairedPhotoDataset(pairs, ["cat", "dog"], resolution=16, train=False)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "1 of 13 photos have no drawing, left out: cat/cat_00" in text
    assert "1 of 13 photos share their name with another, left out: dog_03.webp" in text
    assert "1 of 13 photos are copies of another, left out with their drawings: cat/cat_98" in text
    assert "1 of 24 drawings have no photo, left out: dog/dog_99-1" in text
    assert "2 of 11 files unreadable, left out: dog/dog_07, dog/dog_09" in text
    assert "drawings of train unreadable or empty, left out: dog/dog_05 (drawing 1)" in text
    assert len(dataset) == 9 and len(dataset.view(dataset.ids.index("dog/dog_05"))[1]) == 1


def test_splits_are_by_photo(sketchy_dir):
    pairs = find_pairs(sketchy_dir / "photo", sketchy_dir / "sketch")
    splits = split_pairs(pairs)
    stems = {split: {pair.stem for pair in members} for split, members in splits.items()}
    assert stems["train"] | stems["validation"] == {pair.stem for pair in pairs}
    assert not stems["train"] & stems["validation"] and stems["validation"]
    assert 40 < sum(in_validation(f"photo-{i}") for i in range(1000)) < 120
    # Another photo more does not move the others to the other side.
    by_hash = [pair for pair in pairs if in_validation(pair.stem)]
    if by_hash:
        assert stems["validation"] == {pair.stem for pair in by_hash}
    with pytest.raises(ValueError, match="at least two photos with drawings are needed, .* but got 1"):
        split_pairs(pairs[:1])


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_dataset_with_columns(several, tmp_path, sketchy_dir):
    rows = {"image": [], "drawing": [], "kind": []}
    for i in range(4):
        label = ("cat", "dog")[i % 2]
        drawings = [str(sketchy_dir / "sketch" / label / f"{label}_{i:02d}-{k}.png") for k in (1, 2)]
        for drawing in [drawings] if several else drawings:
            rows["image"].append(str(sketchy_dir / "photo" / label / f"{label}_{i:02d}.png"))
            rows["drawing"].append(drawing)
            rows["kind"].append(i % 2)
    list_type = getattr(datasets, "List", datasets.Sequence)
    features = datasets.Features(
        image=datasets.Image(),
        drawing=list_type(datasets.Image()) if several else datasets.Image(),
        kind=datasets.ClassLabel(names=["cat", "dog"]),
    )
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    cache = str(tmp_path / "datasets")
    pairs = load_dataset_pairs(str(folder), "image", "drawing", "kind", cache_dir=cache)
    assert [pair.label for pair in pairs] == ["cat", "dog", "cat", "dog"]
    assert all(len(pair.sketches) == 2 for pair in pairs)
    expected = find_pairs(sketchy_dir / "photo", sketchy_dir / "sketch")
    by_photo = {pair.photo(): [read() for read in pair.sketches] for pair in expected}
    assert all(by_photo[pair.photo()] == [read() for read in pair.sketches] for pair in pairs)
    dataset = PairedPhotoDataset(pairs, ["cat", "dog"], resolution=16, train=False)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).view(1)[0], dataset.view(1)[0])

    assert {pair.label for pair in load_dataset_pairs(str(folder), "image", "drawing", None, cache_dir=cache)} == {
        None
    }
    with pytest.raises(ValueError, match=r"`conditioning_image_column`.* 'sketch'"):
        load_dataset_pairs(str(folder), cache_dir=cache)
    with pytest.raises(ValueError, match="`image_column` must be a column of images, but 'kind' holds ClassLabel"):
        load_dataset_pairs(str(folder), "kind", "drawing", cache_dir=cache)


def png_bytes(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


NAMED, NUMBERED = datasets.Value("string"), datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing, label_kind, labels, expected",
    [
        ("label", NUMBERED, [0, 1, -1, None], ["cat", "dog", None, None]),
        ("label", NAMED, ["cat", None, "", " "], ["cat", None, None, None]),
        ("label", datasets.Value("float64"), [0.0, float("nan"), None, 1.0], ["0.0", None, None, "1.0"]),
        ("image", NAMED, ["cat"] * 4, ["cat"] * 3),
        ("sketch", NAMED, ["cat"] * 4, ["cat"] * 3),
    ],
)
def test_missing_values_of_a_dataset(missing, label_kind, labels, expected, tmp_path, caplog):
    drawn = [draw_pair(i) for i in range(4)]
    list_type = getattr(datasets, "List", datasets.Sequence)
    features = datasets.Features(image=datasets.Image(), sketch=list_type(datasets.Image()), label=label_kind)
    rows = {
        "image": [png_bytes(photo) for photo, _ in drawn],
        "sketch": [[png_bytes(sketch), None] for _, sketch in drawn],  # one of two is always missing
        "label": labels,
    }
    if missing != "label":
        rows[missing][2] = None
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    with caplog.at_level(logging.WARNING):
        pairs = load_dataset_pairs(str(tmp_path / "set"), cache_dir=str(tmp_path / "datasets"))
    assert [pair.label for pair in pairs] == expected and all(len(pair.sketches) == 1 for pair in pairs)
    assert ("1 of 4 rows have no photo, left out: row 2" in caplog.text) == (missing == "image")
    assert ("1 of 4 photos have no drawing" in caplog.text) == (missing == "sketch")
    if missing == "label" and label_kind is not NUMBERED:
        return
    known = [label for label in expected if label is not None]
    with caplog.at_level(logging.WARNING):
        assert len(PairedPhotoDataset(pairs, ["cat", "dog"], 16, train=False)) == len(known)
    left_out = len(expected) - len(known)
    assert (f"{left_out} of 4 photos of train have no class, which the model needs, left out" in caplog.text) == bool(
        left_out
    )
    dataset = PairedPhotoDataset(pairs, ["cat", "dog"], 16, train=False, null_class=2)
    assert sorted(dataset.class_labels) == sorted({"cat": 0, "dog": 1, None: 2}[label] for label in expected)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_match_however_their_accents_are_written(forms, tmp_path):
    for folder, form, ending in zip(("photo", "sketch"), forms, (".png", "-1.png"), strict=True):
        place = tmp_path / folder / unicodedata.normalize(form, "caf\u00e9")
        place.mkdir(parents=True)
        draw_pair(0)[folder == "sketch"].save(place / unicodedata.normalize(form, f"\u00e9clair{ending}"))
    [pair] = find_pairs(tmp_path / "photo", tmp_path / "sketch")
    assert (pair.label, pair.stem) == ("caf\u00e9", "caf\u00e9/\u00e9clair")
    assert PairedPhotoDataset([pair], ["caf\u00e9"], 16, train=False).class_labels == [0]


def test_folders_of_the_wrong_kind_are_told_which_argument_they_are(sketchy_dir, tmp_path):
    # The root of Sketchy has several renderings of the same photos and drawings.
    for folder in ("photo", "sketch"):
        (tmp_path / "256x256" / folder).mkdir(parents=True)
        for rendering in ("tx_000000000000", "tx_000100000000"):
            (sketchy_dir / folder).rename(tmp_path / "256x256" / folder / rendering)
            shutil.copytree(tmp_path / "256x256" / folder / rendering, sketchy_dir / folder)
    with pytest.raises(
        ValueError, match="in 2 renderings, tx_000000000000, tx_000100000000: choose one .*--photo_dir"
    ):
        find_pairs(tmp_path / "256x256" / "photo", tmp_path / "256x256" / "sketch")
    with pytest.raises(ValueError, match="Sketchy's drawings in 2 renderings, .*`--sketch_dir` of"):
        find_pairs(sketchy_dir / "photo", tmp_path / "256x256" / "sketch")

    for has_columns in (False, True):
        with pytest.raises(
            ValueError, match="`dataset_name` must be a dataset on the Hub, .*: give it as `--train_data_dir`"
        ):
            check_dataset_name(str(sketchy_dir), has_columns)
        check_dataset_name("ana/set", has_columns)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").touch()
    check_dataset_name(str(tmp_path / "set"), has_columns=True)
    with pytest.raises(ValueError, match="give it as `--train_data_dir`"):
        resolve_data_dir(TrainingArguments(dataset_name=str(tmp_path / "set")))


def test_folders_that_cannot_be_used(sketchy_dir, tmp_path):
    with pytest.raises(ValueError, match="the folder of photos is missing"):
        find_pairs(tmp_path / "nowhere", sketchy_dir / "sketch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no images in"):
        find_pairs(sketchy_dir / "photo", tmp_path / "empty")
    with pytest.raises(ValueError, match="no drawing in .* has the name of a photo in"):
        find_pairs(sketchy_dir / "photo" / "cat", sketchy_dir / "sketch" / "dog")
    pairs = find_pairs(sketchy_dir / "photo", sketchy_dir / "sketch")
    with pytest.raises(ValueError, match=r"the data has classes that the model lacks: dog. It has \['cat'\]"):
        PairedPhotoDataset(pairs, ["cat"], 16)
