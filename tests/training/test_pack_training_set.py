# SPDX-License-Identifier: Apache-2.0
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from pack_training_set import decode_contours, encode_contours, main, unpack
from scipy import ndimage
from skimage.morphology import disk

from diffsketching_pipeline.training.dataset import PhotoSketchDataset


def test_contours_come_back_exactly():
    rng = np.random.default_rng(0)
    lines = rng.random((5, 61, 47)) > 0.97
    lines[0, 0] = lines[1, :, -1] = True  # up to the rim
    contours = np.stack([ndimage.binary_dilation(line, disk(1)) for line in lines])
    np.testing.assert_array_equal(decode_contours(encode_contours(contours)), contours)


def test_unpacked_photos_train_with_the_contours_of_the_originals(
    shapes_dir, cache_dir, tmp_path, capsys, monkeypatch
):
    packed, folder = tmp_path / "shapes.tar", tmp_path / "shapes"
    main(
        ["pack", str(shapes_dir), str(packed), "--cache_dir", str(cache_dir), "--max_size", "1", "--resolution", "32"]
    )
    main(["unpack", str(packed), str(folder), "--resolution", "32"])
    size = packed.stat().st_size / 2**20
    assert capsys.readouterr().out == f"{packed}: {size:.1f} MiB\n{folder}: 24 photos\n"

    original = PhotoSketchDataset(shapes_dir, "validation", 32, train=False, cache_dir=cache_dir)
    monkeypatch.setattr(
        "diffsketching_pipeline.training.cache.contours_and_box", lambda image: pytest.fail("contours are made again")
    )
    for split, count in (("train", 16), ("validation", 8)):
        dataset = PhotoSketchDataset(folder, split, 32, train=False, cache_dir=folder / "cache")
        assert len(dataset) == count and dataset.id2label == original.id2label
    assert dataset.ids == original.ids and dataset.class_labels == original.class_labels
    for i in range(len(dataset)):
        ours, theirs = dataset.sample(i), original.sample(i)
        assert torch.equal(ours["sketch"], theirs["sketch"])
        # WebP at its best quality, from 64 pixels up to 256 and back.
        assert (ours["pixel_values"] - theirs["pixel_values"]).abs().mean() < 0.03


def test_what_does_not_fit_or_is_in_the_way_is_refused_and_nothing_is_left(shapes_dir, cache_dir, tmp_path):
    options = ["--cache_dir", str(cache_dir), "--resolution", "32"]
    with pytest.raises(SystemExit, match="max_size.*larger"):
        main(["pack", str(shapes_dir), str(tmp_path / "small.tar"), *options, "--max_size", "0.01"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there.tar").write_text("mine")
    with pytest.raises(SystemExit, match="there.tar.*exists"):
        main(["pack", str(shapes_dir), str(tmp_path / "there.tar"), *options])
    assert (tmp_path / "there.tar").read_text() == "mine"


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_hostile_and_damaged_files_are_refused(tmp_path):
    index = {"format": "packed-photos-1", "contours": ["fine", "medium", "coarse", "object", "silhouette"]}

    def packed(**changes):
        return json.dumps(index | {"content_boxes": {}} | changes).encode()

    box = [0, 0, 1, 1]
    for files, message in (
        ({"index.json": packed(format="other")}, "format packed-photos-1.*'other'"),
        ({"index.json": packed(content_boxes={"../../evil": box})}, "evil.*leads out"),
        ({"index.json": packed(content_boxes={"train/a/b": box})}, "photos/train/a/b.webp"),
        ({"index.json": b"{"}, "no packed training set"),
        ({"readme": b""}, "index.json"),
    ):
        write_tar(tmp_path / "bad.tar", files)
        with pytest.raises(ValueError, match=message):
            unpack(tmp_path / "bad.tar", tmp_path / "out")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="no packed training set"):
        unpack(tmp_path / "bad.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path.parent / "evil.webp").exists()
