# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from testing_utils import make_unet

from diffsketching_pipeline import interpolate_unets


@pytest.fixture
def unets():
    unets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        unets.append(make_unet().eval())
    return unets


def test_weights_lie_between_the_two(unets):
    first, second = unets
    middle = interpolate_unets(first, second, 0.25)
    for name, value in middle.state_dict().items():
        expected = 0.75 * first.state_dict()[name] + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(value, expected)
    for ratio, unet in ((0.0, first), (1.0, second)):
        same = interpolate_unets(first, second, ratio)
        assert all(torch.equal(value, unet.state_dict()[name]) for name, value in same.state_dict().items())
    assert middle.config.in_channels == first.config.in_channels and not middle.training


def test_a_saved_unet_is_like_the_one_that_was_saved(unets, tmp_path):
    unets[0].save_pretrained(tmp_path)
    loaded = type(unets[0]).from_pretrained(tmp_path)
    found = interpolate_unets(unets[0], loaded, 0.5)
    torch.testing.assert_close(found.state_dict(), loaded.state_dict())


def test_half_precision_is_mixed_in_float32(unets):
    first, second = (unet.half() for unet in unets)
    found = interpolate_unets(first, second, 0.001)
    assert found.dtype == torch.float16
    weight = first.conv_in.weight.float() * 0.999 + second.conv_in.weight.float() * 0.001
    assert torch.equal(found.conv_in.weight, weight.half())
    assert first.conv_in.weight.dtype == torch.float16


def test_what_cannot_be_mixed_is_refused(unets):
    with pytest.raises(ValueError, match=r"`ratio`.* 1.5"):
        interpolate_unets(*unets, 1.5)
    with pytest.raises(ValueError, match="`first` and `second`.* the in_channels 4 and 3"):
        interpolate_unets(unets[0], make_unet(in_channels=3), 0.5)
