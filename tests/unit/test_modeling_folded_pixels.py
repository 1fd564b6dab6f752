# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from testing_utils import make_scheduler, make_unet

from diffsketching_pipeline import DiffSketchingPipeline, FoldedPixels
from diffsketching_pipeline.autoencoding import decode_latents, encode_photos


@pytest.fixture
def folded_pixels():
    return FoldedPixels(latent_channels=48, block_out_channels=(3, 3, 3), scaling_factor=0.5)


def test_folding_puts_each_block_into_one_latent_and_loses_nothing(folded_pixels):
    photos = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_photos(folded_pixels, photos)
    assert latents.shape == (2, 48, 8, 4)
    # Channel, row and column inside of the block, in this order.
    assert torch.equal(latents[:, 1 * 16 + 2 * 4 + 3], photos[:, 1, 2::4, 3::4] * 0.5)
    assert torch.equal(decode_latents(folded_pixels, latents), photos)


def test_a_pipeline_with_folded_pixels_samples_and_loads(folded_pixels, large_sketches, tmp_path):
    unet = make_unet(in_channels=48 + 16, out_channels=48, sample_size=8)
    scheduler = make_scheduler(prediction_type="sample", clip_sample=False)
    pipe = DiffSketchingPipeline(unet=unet, scheduler=scheduler, vae=folded_pixels)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "num_images_per_sketch": 1, "class_labels": 0, "output_type": "np"}
    photos = pipe(large_sketches, generator=torch.Generator().manual_seed(0), **options).images
    assert photos.shape == (3, 32, 32, 3)

    pipe.save_pretrained(tmp_path)
    loaded = DiffSketchingPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is FoldedPixels and loaded.vae.config.scaling_factor == 0.5
    assert (loaded(large_sketches, generator=torch.Generator().manual_seed(0), **options).images == photos).all()


def test_channels_that_are_not_those_of_the_blocks_are_refused():
    with pytest.raises(ValueError, match="`latent_channels` must be 192 .* got 48"):
        FoldedPixels(latent_channels=48)
