# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from diffsketching_pipeline.autoencoding import encode_photos
from diffsketching_pipeline.images.contours import contour_to_sketch
from diffsketching_pipeline.training.dataset import PhotoSketchDataset
from diffsketching_pipeline.training.latents import LatentDataset, encoder_sha256


OPTIONS = {"jitter": 0.0, "line_gain": (1.8, 1.8), "contour_probabilities": (1, 0, 0, 0, 0)}


def make_vae(seed=0, scaling_factor=0.7):
    torch.manual_seed(seed)
    return AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        scaling_factor=scaling_factor,
        shift_factor=0.1,
    ).eval()


@pytest.fixture(scope="module")
def vae():
    return make_vae()


class CountingVae:
    """The autoencoder, counting what it encodes."""

    def __init__(self, vae):
        self.vae, self.count = vae, 0

    def __getattr__(self, name):
        return getattr(self.vae, name)

    def encode(self, photos):
        self.count += len(photos)
        return self.vae.encode(photos)


def test_latents_are_those_of_the_crop_that_the_drawing_shows(shapes_dir, cache_dir, vae):
    dataset = LatentDataset(shapes_dir, "train", vae, 32, cache_dir=cache_dir, crops_per_photo=3, **OPTIONS)
    pixels = PhotoSketchDataset(shapes_dir, "train", 32, cache_dir=cache_dir, **OPTIONS)
    boxes = {dataset.latents(2, crop)[1] for crop in range(3)}
    assert len(boxes) == 3
    for epoch in range(6):
        sample = dataset.sample(2, epoch)
        assert sample["latents"].shape == (4, 8, 8) and sample["sketch"].shape == (1, 32, 32)
        assert sample["class_label"] == pixels.class_labels[2] and sample["id"] == pixels.ids[2]
        # Which of the crops it is, mirrored or not, the drawing tells: it is rendered for that one.
        matches = []
        for crop in range(3):
            latents, box = dataset.latents(2, crop)
            drawn = torch.from_numpy(contour_to_sketch(pixels.photo(2).contours[0], 32, box))[None]
            for mirrored in (False, True):
                if torch.equal(sample["sketch"], drawn.flip(-1) if mirrored else drawn):
                    matches.append(torch.equal(sample["latents"], dataset.latents(2, crop, mirrored)[0]))
        assert True in matches


def test_latents_are_encoded_from_the_augmented_photo_in_half_precision(shapes_dir, cache_dir, vae):
    dataset = LatentDataset(shapes_dir, "validation", vae, 32, train=False, cache_dir=cache_dir)
    pixels = PhotoSketchDataset(shapes_dir, "validation", 32, train=False, cache_dir=cache_dir)
    with torch.no_grad():
        expected = encode_photos(vae, torch.stack([pixels.sample(i)["pixel_values"] for i in range(4)]))
        mirrored = encode_photos(vae, pixels.sample(0)["pixel_values"].flip(-1)[None])
    for i in range(4):
        sample = dataset.sample(i, epoch=i)
        torch.testing.assert_close(sample["latents"], expected[i], atol=2e-3, rtol=1e-3)
        assert torch.equal(sample["sketch"], pixels.sample(i)["sketch"]) and sample["sketch_abstraction"] == 0
    torch.testing.assert_close(dataset.latents(0, mirrored=True)[0], mirrored[0], atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_cache_is_used_added_to_and_belongs_to_one_encoder(shapes_dir, tmp_path, vae):
    counting, options = CountingVae(vae), {"resolution": 32, "cache_dir": tmp_path}
    first = LatentDataset(shapes_dir, "train", counting, crops_per_photo=1, **options)
    photos = len(first)
    assert counting.count == 2 * photos
    kept = first.latents(3)[0]
    more = LatentDataset(shapes_dir, "train", counting, crops_per_photo=3, **options)
    assert counting.count == 6 * photos
    again = LatentDataset(shapes_dir, "train", counting, crops_per_photo=2, **options)
    assert counting.count == 6 * photos
    assert torch.equal(more.latents(3)[0], kept) and torch.equal(again.latents(3, 1)[0], more.latents(3, 1)[0])
    in_memory = LatentDataset(shapes_dir, "train", vae, 32, crops_per_photo=3)
    for epoch in range(3):
        ours, theirs = more.sample(5, epoch), in_memory.sample(5, epoch)
        assert torch.equal(ours["latents"], theirs["latents"]) and torch.equal(ours["sketch"], theirs["sketch"])
    # A damaged file is made again.
    first._latents[0].write_bytes(b"cut")
    LatentDataset(shapes_dir, "train", counting, crops_per_photo=1, **options)
    assert counting.count == 6 * photos + 2

    decoder = make_vae()
    torch.nn.init.zeros_(next(decoder.decoder.parameters()))
    other = CountingVae(decoder)
    LatentDataset(shapes_dir, "train", other, crops_per_photo=1, **options)
    assert other.count == 0
    # Shared weights are in half precision, and the same to the cache.
    assert encoder_sha256(make_vae().half()) == encoder_sha256(vae)
    for different in (make_vae(seed=1), make_vae(scaling_factor=0.6)):
        assert encoder_sha256(different) != encoder_sha256(vae)
        counted = CountingVae(different)
        LatentDataset(shapes_dir, "train", counted, crops_per_photo=1, **options)
        assert counted.count == 2 * photos


def test_drawings_are_made_anew_at_each_draw(shapes_dir, cache_dir, vae):
    dataset = LatentDataset(
        shapes_dir,
        "train",
        vae,
        32,
        cache_dir=cache_dir,
        crops_per_photo=1,
        free_hand_share=0.5,
        free_hand_strength=1.0,
    )
    samples = [dataset.sample(1, epoch) for epoch in range(12)]
    assert len({sample["sketch"].numpy().tobytes() for sample in samples}) > 8
    assert len({sample["latents"].numpy().tobytes() for sample in samples}) == 2  # as it is and mirrored
    abstraction = np.array([float(sample["sketch_abstraction"]) for sample in samples])
    assert (abstraction == 0).any() and (abstraction > 0).any() and abstraction.max() <= 1
    assert torch.equal(dataset.sample(1, 4)["sketch"], samples[4]["sketch"])


def test_a_size_that_the_autoencoder_cannot_fold_is_refused(shapes_dir, vae):
    with pytest.raises(ValueError, match="resolution.*factor 4.*30"):
        LatentDataset(shapes_dir, "train", vae, 30)
