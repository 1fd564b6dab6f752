# SPDX-License-Identifier: Apache-2.0
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_garments
import pytest
from PIL import Image


SCRIPT = Path(prepare_garments.__file__)


def make_checkout(root, labels, size=(300, 400)):
    """A checkout of the Clothing dataset with one photo per label; returns the ids in the order of the labels."""
    (root / "images").mkdir(parents=True)
    ids = [f"{i:04d}-photo" for i in range(len(labels))]
    rows = [f"{name},7,{label},False" for name, label in zip(ids, labels, strict=True)]
    (root / "images.csv").write_text("\n".join(["image,sender_id,label,kids", *rows]) + "\n")
    for i, name in enumerate(ids):
        Image.new("RGB", size, (10 * i % 256, 90, 40)).save(root / "images" / f"{name}.jpg")
    return ids


def expected_split(image_id):
    bucket = int.from_bytes(hashlib.sha256(image_id.encode()).digest(), "big") % 100
    return ["test", "validation", "train"][(bucket >= 8) + (bucket >= 16)]


def run(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_script_writes_the_split_and_goes_on_after_a_stop(tmp_path):
    labels = ["T-Shirt", "Body", "Not sure"] * 12 + ["Top"]
    ids = make_checkout(tmp_path / "checkout", labels)
    broken, missing = ids[0], ids[4]
    (tmp_path / "checkout" / "images" / f"{broken}.jpg").write_bytes(b"no picture")
    (tmp_path / "checkout" / "images" / f"{missing}.jpg").unlink()

    result = run(tmp_path / "checkout", tmp_path / "out", "--min_photos_per_class", 12, "--short_side", 32)
    assert result.returncode == 0, result.stderr
    assert "bodysuit 12, t-shirt 12" in result.stdout
    assert f"2 photos are missing or unreadable and left out: {broken}, {missing}" in result.stdout

    names = {"T-Shirt": "t-shirt", "Body": "bodysuit"}
    expected = {
        f"{expected_split(i)}/{names[label]}/{i}.jpg"
        for i, label in zip(ids, labels, strict=True)
        if label in names and i not in (broken, missing)
    }
    written = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(written) == expected
    assert {path.split("/")[0] for path in written} == {"train", "validation", "test"}
    assert all(Image.open(p).size == (32, 43) for p in written.values())

    first, removed = sorted(written)[:2]
    times = {name: path.stat().st_mtime_ns for name, path in written.items()}
    written[removed].unlink()
    assert (
        run(tmp_path / "checkout", tmp_path / "out", "--min_photos_per_class", 12, "--short_side", 32).returncode == 0
    )
    assert written[removed].stat().st_mtime_ns > times[removed]
    assert written[first].stat().st_mtime_ns == times[first]


def test_split_rule_is_the_published_one():
    # The first id is in the public training photos, the others follow from the rule by hand.
    assert prepare_garments.split_of("014b2a1b-c5a0-469b-b115-bc02b2001db5") == "train"
    ids = [f"photo-{i}" for i in range(2000)]
    splits = np.array([prepare_garments.split_of(i) for i in ids])
    assert [prepare_garments.split_of(i) for i in ids] == [expected_split(i) for i in ids]
    assert 0.06 < (splits == "test").mean() < 0.10 and 0.06 < (splits == "validation").mean() < 0.10


def test_rotated_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "in.jpg", exif=exif)
    prepare_garments.resize_photo(tmp_path / "in.jpg", tmp_path / "out.jpg", 20, 90)
    assert Image.open(tmp_path / "out.jpg").size == (20, 40)


@pytest.mark.parametrize(
    "csv_text, message",
    [
        (None, "must hold `images.csv`"),
        ("image,kind\n1,Hat\n", "no column label"),
        ("image,label\n1,Hat\n1,Hat\n", "the id 1 appears twice"),
        ("image,label\n../1,Hat\n", "line 2"),
        ("image,label\n1,Hat\n", "leaves no class"),
    ],
)
def test_other_folders_are_refused_in_one_line(tmp_path, csv_text, message):
    (tmp_path / "images").mkdir()
    if csv_text is not None:
        (tmp_path / "images.csv").write_text(csv_text)
    with pytest.raises(ValueError, match=message):
        prepare_garments.prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_checkout_has_exit_code_2(tmp_path):
    result = run(tmp_path, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith("error: `clothing_dataset_dir`") and len(result.stderr.splitlines()) == 1
