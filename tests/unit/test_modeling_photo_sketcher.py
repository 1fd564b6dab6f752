# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
import torch.nn as nn

from diffsketching_pipeline import modeling_photo_sketcher
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher, PhotoSketcherNorm


def make_sketcher(**kwargs):
    torch.manual_seed(0)
    sketcher = PhotoSketcher(**({"ngf": 8, "n_blocks": 2} | kwargs))
    generator = torch.Generator().manual_seed(1)
    for module in sketcher.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # Larger than the initial weights, so that every layer shows in the result.
            module.weight.data.mul_(5)
        if isinstance(module, PhotoSketcherNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return sketcher


def make_photos(batch_size=3, height=32, width=32):
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("statistics", ["per_sample", "running"])
@torch.no_grad()
def test_a_sketch_depends_on_its_photo_only(statistics):
    sketcher, photos = make_sketcher(statistics=statistics), make_photos()
    photos[2] *= 0.1
    before = {name: buffer.clone() for name, buffer in sketcher.named_buffers()}
    together = sketcher.train()(photos)
    assert together.shape == (3, 1, 32, 32) and together.abs().max() <= 1
    torch.testing.assert_close(sketcher.eval()(photos), together, rtol=0, atol=0)
    alone = torch.cat([sketcher(photo[None]) for photo in photos])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in sketcher.named_buffers())


@torch.no_grad()
def test_statistics_are_those_of_batch_norm():
    reference = nn.BatchNorm2d(4)
    reference.running_mean.copy_(torch.randn(4))
    reference.running_var.copy_(torch.rand(4) + 0.5)
    reference.weight.copy_(torch.randn(4))
    reference.bias.copy_(torch.randn(4))
    features = torch.randn(1, 4, 5, 6) * 3 + 1
    for statistics, train in (("running", False), ("per_sample", True)):
        norm = PhotoSketcherNorm(4, statistics)
        norm.load_state_dict(reference.state_dict())
        torch.testing.assert_close(norm(features), reference.train(train)(features), rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(8, 9), (67, 34)])
@torch.no_grad()
def test_any_size(height, width):
    assert make_sketcher()(make_photos(1, height, width)).shape == (1, 1, height, width)


@torch.no_grad()
def test_odd_sizes_stay_aligned_with_the_photo():
    # Without residual blocks and with stored statistics a pixel's sketch depends on its neighborhood alone.
    sketcher, photos = make_sketcher(n_blocks=0, statistics="running"), make_photos(1, 72, 72)
    whole = sketcher(photos)
    for size in (65, 66, 67):
        part = sketcher(photos[..., :size, :size])
        torch.testing.assert_close(part[..., :40, :40], whole[..., :40, :40], rtol=0, atol=1e-5)
    assert (whole[..., :39, :40] - whole[..., 1:40, :40]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 7, 32)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=rf"`pixel_values`.* 8 .*{re.escape(str(shape))}"):
        make_sketcher()(torch.zeros(shape))


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="`statistics`.* 'batch'"):
        PhotoSketcher(ngf=8, statistics="batch")


@torch.no_grad()
def test_save_load_and_change_of_statistics(tmp_path):
    sketcher, photos = make_sketcher().eval(), make_photos()
    sketcher.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(PhotoSketcher.from_pretrained(tmp_path)(photos), sketcher(photos))
    running = PhotoSketcher.from_pretrained(tmp_path, statistics="running")
    assert torch.equal(running(photos), make_sketcher(statistics="running").eval()(photos))
    assert (running(photos) - sketcher(photos)).abs().max() > 1e-2


@torch.no_grad()
def test_dropout_is_for_training():
    sketcher, photos = make_sketcher(dropout=0.5), make_photos()
    torch.testing.assert_close(sketcher.eval()(photos), make_sketcher()(photos), rtol=0, atol=0)
    assert (sketcher.train()(photos) - sketcher(photos)).abs().max() > 1e-3


def test_gradient_is_that_of_finite_differences():
    sketcher, photo = make_sketcher().double(), make_photos(1, 16, 16).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(sketcher(photo).square().sum(), photo)
    direction = torch.randn(photo.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (sketcher(photo + sign * step * direction).square().sum() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4)


@pytest.mark.slow
def test_learns_a_drawing():
    torch.manual_seed(0)
    sketcher, photos = PhotoSketcher(ngf=8, n_blocks=2), make_photos(4, 16, 16)
    photos[:, :, :, 8:] = 0.9
    drawing = torch.ones(4, 1, 16, 16)
    drawing[..., 8] = -1
    optimizer = torch.optim.Adam(sketcher.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for _ in range(60):
        loss = (sketcher(photos) - drawing).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_module_offers_the_name_by_which_diffusers_finds_component_classes():
    assert hasattr(modeling_photo_sketcher, "ModelMixin")
