# SPDX-License-Identifier: Apache-2.0
"""HED: weights as Keras keeps them, drawings of known edges, and a cache beside the one of the classical contours."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffsketching_pipeline.images.contours import HED_CONTOUR_NAMES, contour_distribution, contour_to_sketch
from diffsketching_pipeline.training import hed_contours
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.hed_contours import (
    HEDNetwork,
    photo_to_edge_map,
    photo_to_hed_contours,
    thin_edges,
)


h5py = pytest.importorskip("h5py")

WIDTHS, CONVOLUTIONS = (2, 3, 2, 4, 3), (2, 2, 3, 3, 3)


def write_weights(path, seed=0, change=None):
    """A tiny network with the names and the layout that Keras writes; `change` edits the arrays by name."""
    rng = np.random.default_rng(seed)
    arrays, before = {}, 3
    for b, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS, strict=True), start=1):
        for k in range(count):
            layer = f"block{b}/layers/conv2d" + (f"_{k}" if k else "")
            arrays[layer] = rng.normal(0, 0.3, (3, 3, before, width)), rng.normal(0, 0.1, width)
            before = width
        arrays[f"dsn{b}"] = rng.normal(0, 0.3, (1, 1, width, 1)), np.zeros(1)
    arrays["fuse"] = np.full((1, 1, 5, 1), 0.2), np.zeros(1)
    if change is not None:
        change(arrays)
    with h5py.File(path, "w") as file:
        for layer, values in arrays.items():
            for i, value in enumerate(values):
                file[f"{layer}/vars/{i}"] = value.astype(np.float32)
    return path


def test_network_reads_kernels_and_colors_as_keras_keeps_them(tmp_path):
    def shifted_red(arrays):
        for layer in ("block1/layers/conv2d", "block1/layers/conv2d_1", "dsn1", "fuse"):
            for array in arrays[layer]:
                array[:] = 0
        arrays["block1/layers/conv2d"][0][0, 2, 2, 1] = 1.0  # red of the pixel above to the right
        arrays["block1/layers/conv2d_1"][0][1, 1, 1, 0] = 1.0
        arrays["dsn1"][0][0, 0, 0, 0] = 0.05
        arrays["dsn1"][1][:] = 0.5
        arrays["fuse"][0][0, 0, 0, 0] = 2.0
        arrays["fuse"][1][:] = -1.0

    network = HEDNetwork.from_file(write_weights(tmp_path / "a.weights.h5", change=shifted_red))
    pixels = np.random.default_rng(1).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    red = np.pad(pixels[..., 0] - 122.679, 1)[:-2, 2:]  # the padding is of what is left after the mean
    expected = 1 / (1 + np.exp(-(2 * (0.05 * np.maximum(red, 0) + 0.5) - 1)))
    np.testing.assert_allclose(photo_to_edge_map(Image.fromarray(pixels), network), expected, atol=1e-5)


def test_network_adds_up_the_sides_of_all_blocks_at_any_size(tmp_path):
    network = HEDNetwork.from_file(write_weights(tmp_path / "a.weights.h5"))
    pixels = 50 * torch.randn(2, 3, 37, 21, generator=torch.Generator().manual_seed(0))
    logits = network(pixels)
    assert logits.shape == (2, 1, 37, 21)
    for side in network.sides:
        weight = side.weight.clone()
        side.weight.zero_()
        assert not torch.allclose(network(pixels), logits)
        side.weight.copy_(weight)
    # The last block sees a sixteenth of the size, rounded up: nothing is cut off.
    sizes = []
    network.sides[4].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    network(pixels)
    assert sizes == [(3, 2)]


@pytest.mark.parametrize("content", [None, b"no weights", "no fuse"])
def test_files_without_the_weights_are_refused(tmp_path, content):
    path = tmp_path / "a.weights.h5"
    if content == "no fuse":
        write_weights(path, change=lambda arrays: arrays.pop("fuse"))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="`hed_weights` must be a file of HED weights"):
        HEDNetwork.from_file(path)


def ring(size, radius):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.abs(np.hypot(y, x) - radius)


def test_thin_edges_are_the_ridge():
    distance = ring(128, 40)
    ridges = thin_edges(np.exp(-((distance / 4) ** 2)).astype(np.float32))
    assert distance[ridges > 0.1].max() < 1.0
    # The ridge has no gaps: inside and outside are not connected.
    labels, _ = ndimage.label(ridges < 0.5)
    assert labels[64, 64] != labels[0, 0]


def test_drawings_hold_what_is_likely_enough():
    strong, weak = ring(256, 100), ring(256, 50)

    def network(pixels):
        assert pixels.shape == (1, 3, 256, 256)
        probability = np.maximum(0.9 * np.exp(-((strong / 4) ** 2)), 0.25 * np.exp(-((weak / 4) ** 2)))
        return torch.tensor(probability, dtype=torch.float32).logit(1e-6)[None, None]

    drawings = photo_to_hed_contours(Image.new("RGB", (64, 64), "white"), network)
    assert len(drawings) == len(HED_CONTOUR_NAMES)
    for ink in drawings:
        assert ink.dtype == bool and ink.shape == (256, 256)
        assert np.minimum(strong, weak)[ink].max() < 3
        # Lines of 3 pixels all the way round.
        assert 2.5 < (ink & (strong < 3)).sum() / (2 * np.pi * 100) < 4.5
    assert [bool((ink & (weak < 3)).any()) for ink in drawings] == [True, False, False, True]


# ---- in the dataset --------------------------------------------------------------------------------------------------


def make_dataset(shapes_dir, cache_dir, source, weights, **options):
    keep = {"disc-00", "square-05"}
    return PhotoSketchDataset(
        shapes_dir,
        "validation",
        resolution=32,
        train=options.pop("train", False),
        cache_dir=cache_dir,
        contour_source=source,
        hed_weights=weights,
        keep=keep.__contains__,
        **options,
    )


@pytest.mark.slow
def test_contours_by_both_are_cached_beside_each_other(shapes_dir, tmp_path, monkeypatch):
    weights, cache = write_weights(tmp_path / "a.weights.h5"), tmp_path / "cache"
    classical = make_dataset(shapes_dir, cache, "classical", None)
    files = {file: file.read_bytes() for file in cache.rglob("*.npz")}
    both = make_dataset(shapes_dir, cache, "both", weights)
    assert {file: file.read_bytes() for file in files} == files and len(list(cache.rglob("*.npz"))) == 4
    network = HEDNetwork.from_file(weights)
    for index in range(2):
        contours, plain = both.photo(index).contours, classical.photo(index)
        np.testing.assert_array_equal(contours[:5], plain.contours)
        with Image.open(both.files[index]) as photo:
            np.testing.assert_array_equal(contours[5:], photo_to_hed_contours(photo, network))
        assert both.photo(index).content_box == plain.content_box

    # A damaged entry is made again; nothing else is, and in memory all is the same.
    new = next(file for file in sorted(cache.rglob("*.npz")) if file not in files)
    new.write_bytes(new.read_bytes()[:100])
    drawn = []
    monkeypatch.setattr(
        hed_contours, "photo_to_hed_contours", lambda *args: drawn.append(0) or photo_to_hed_contours(*args)
    )
    again = make_dataset(shapes_dir, cache, "hed", weights)
    memory = make_dataset(shapes_dir, None, "hed", weights)
    drawn.clear()
    for index in range(2):
        np.testing.assert_array_equal(again.photo(index).contours, both.photo(index).contours[5:])
        np.testing.assert_array_equal(again.photo(index).contours, memory.photo(index).contours)
    assert len(drawn) == 1
    make_dataset(shapes_dir, cache, "hed", write_weights(tmp_path / "b.weights.h5", seed=1))
    assert len(drawn) == 3 and len(list(cache.rglob("*.npz"))) == 6


def test_each_source_draws_its_share(shapes_dir, cache_dir, tmp_path, monkeypatch):
    np.testing.assert_allclose(contour_distribution((1, 1, 2, 0, 0)), (0.25, 0.25, 0.5, 0, 0))
    np.testing.assert_allclose(contour_distribution((1, 1, 2, 0, 0), "hed"), [0.25] * 4)
    both = contour_distribution((1, 1, 2, 0, 0), "both")
    np.testing.assert_allclose(both, (0.125, 0.125, 0.25, 0, 0, *[0.125] * 4))
    # The drawing that is chosen is one of HED's: each of them is a bar in another quarter.
    bars = [np.zeros((256, 256), bool) for _ in HED_CONTOUR_NAMES]
    for k, bar in enumerate(bars):
        bar[:, 64 * k + 20 : 64 * k + 44] = True
    monkeypatch.setattr(hed_contours, "photo_to_hed_contours", lambda *args: bars)
    weights = write_weights(tmp_path / "a.weights.h5")
    dataset = make_dataset(shapes_dir, None, "hed", weights, train=True, jitter=0.0)
    assert (contour_to_sketch(dataset.photo(0).contours[1], 32)[:, 8:16] < 0).any()
    assert all((dataset.sample(0, epoch)["sketch"] < 0).any() for epoch in range(5))


def test_a_source_without_its_weights_is_refused_before_any_work(shapes_dir, tmp_path):
    with pytest.raises(ValueError, match="`hed_weights`.* None"):
        make_dataset(shapes_dir, None, "both", None)
    with pytest.raises(ValueError, match="`hed_weights` must be .*missing.h5"):
        make_dataset(shapes_dir, None, "hed", tmp_path / "missing.h5")
    (tmp_path / "bad.h5").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="`hed_weights` must be .*bad.h5"):
        make_dataset(shapes_dir, tmp_path / "cache", "hed", tmp_path / "bad.h5")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="`contours`.* 'canny'"):
        make_dataset(shapes_dir, None, "canny", None)
