# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import warnings

import numpy as np
import pytest
import torch
from testing_utils import SIZE, along, directional_derivatives, make_resnet, randn

from diffsketching_pipeline import SketchPerceptualLoss


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return make_resnet(1).eval()


def smooth_sketches(n, seed):
    return torch.tanh(randn(n, 1, SIZE, SIZE, seed=seed))


def eq_5(encoder, first, second, weights=None):
    """Eq. 5 with LPIPS' normalisation, one feature vector at a time."""
    with torch.no_grad():
        maps = [
            (encoder.resnet.embedder.embedder(x), *encoder(x, output_hidden_states=True).hidden_states)
            for x in (first, second)
        ]
    total = np.zeros(len(first))
    for level, (a, b) in enumerate(zip(*maps, strict=True)):
        weight = np.ones(a.shape[1]) if weights is None else weights[level].numpy()
        for row in range(len(first)):
            for h in range(a.shape[2]):
                for w in range(a.shape[3]):
                    u, v = a[row, :, h, w].numpy(), b[row, :, h, w].numpy()
                    difference = weight * (u / np.sqrt(u @ u + 1e-10) - v / np.sqrt(v @ v + 1e-10))
                    total[row] += difference @ difference / (a.shape[2] * a.shape[3])
    return torch.from_numpy(total)


def test_loss_is_eq_5(encoder):
    first, second = smooth_sketches(3, seed=1), smooth_sketches(3, seed=2)
    found = SketchPerceptualLoss(encoder)(first, second)
    assert found.shape == (3,) and found.min() > 0.1
    torch.testing.assert_close(found.double(), eq_5(encoder, first, second), rtol=1e-4, atol=1e-6)
    assert torch.equal(SketchPerceptualLoss(encoder)(first, first), torch.zeros(3))


def test_weights_are_per_channel(encoder):
    first, second = smooth_sketches(2, seed=1), smooth_sketches(2, seed=2)
    weights = [randn(channels, seed=channels).abs() for channels in (8, 8, 8, 16)]
    loss = SketchPerceptualLoss(encoder, weights)
    expected = eq_5(encoder, first, second, weights)
    torch.testing.assert_close(loss(first, second).double(), expected, rtol=1e-4, atol=1e-6)
    assert {name for name in loss.state_dict() if name.startswith("weight")} == {f"weight_{k}" for k in range(4)}
    with pytest.raises(ValueError, match="`weights` has 2 entries for 4 feature maps"):
        SketchPerceptualLoss(encoder, weights[:2])(first, second)


def test_distance_of_known_features_is_the_loss(encoder):
    loss, first, second = SketchPerceptualLoss(encoder), smooth_sketches(2, seed=1), smooth_sketches(2, seed=2)
    assert torch.equal(loss.distance(loss.features(first), loss.features(second)), loss(first, second))
    for features in loss.features(first):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(features.norm(dim=1).shape), atol=1e-4, rtol=0)


def test_any_callable_gives_the_feature_maps():
    first, second = smooth_sketches(2, seed=1), smooth_sketches(2, seed=2)
    # A vector of one channel, scaled to unit length, is its sign.
    expected = (first.sign() - second.sign()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(SketchPerceptualLoss(lambda x: [x])(first, second), expected, rtol=1e-3, atol=0)


def test_gradient_matches_finite_differences(encoder):
    loss = SketchPerceptualLoss(encoder.double())
    first, second = smooth_sketches(2, seed=1).double() * 0.9, smooth_sketches(2, seed=2).double()
    directions, expected = directional_derivatives(lambda x, row: loss(x, second[row].expand_as(x)), first)
    first.requires_grad_(True)
    (found,) = torch.autograd.grad(loss(first, second).sum(), first)
    torch.testing.assert_close(along(found, directions), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("paper", [1.0, -1.0, 0.0])
def test_gradient_is_finite_where_features_vanish(encoder, paper):
    # Without a bias or a shift the features of an empty drawing are zero vectors.
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.zero_()
                module.running_mean.zero_()
    blank = torch.full((1, 1, SIZE, SIZE), paper).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = SketchPerceptualLoss(encoder)(blank, smooth_sketches(1, seed=1))
    (gradient,) = torch.autograd.grad(value.sum(), blank)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.mul(255).to(torch.uint8), "`pred_sketch` has to be a float tensor in .* but is torch.uint8"),
        (lambda x: x.numpy(), "`pred_sketch` has to be a float tensor in .* but is ndarray"),
        (lambda x: x[0], r"`pred_sketch` has to have shape \[batch, 1, height, width\] but has \(1, 16, 16\)"),
        (lambda x: x.expand(-1, 3, -1, -1), r"but has \(2, 3, 16, 16\)"),
        (lambda x: x[:0], r"but has \(0, 1, 16, 16\)"),
        (lambda x: 2 * x, r"`pred_sketch` has to be in \[-1, 1\] but is in \[-1\.\d+, 1\.\d+\]"),
        (lambda x: x - 1, r"has to be in \[-1, 1\]"),
        (lambda x: x * float("nan"), r"has to be in \[-1, 1\] but is in \[nan, nan\]"),
        (lambda x: x[:1], r"have to have one shape but have \(1, 1, 16, 16\) and \(2, 1, 16, 16\)"),
    ],
)
def test_what_is_not_a_sketch_batch_is_refused(encoder, make, message):
    sketch = smooth_sketches(2, seed=1)
    with pytest.raises(ValueError, match=message):
        SketchPerceptualLoss(encoder)(make(sketch), sketch)


def test_the_reference_sketch_is_checked_too(encoder):
    with pytest.raises(ValueError, match=r"`sketch` has to be in \[-1, 1\]"):
        SketchPerceptualLoss(encoder)(torch.zeros(1, 1, SIZE, SIZE) - 1, torch.full((1, 1, SIZE, SIZE), 255.0))


def test_a_batch_in_0_to_1_is_warned_of_and_blank_paper_is_not(encoder):
    sketch, loss = smooth_sketches(2, seed=1), SketchPerceptualLoss(encoder)
    with pytest.warns(UserWarning, match=r"`sketch` has to be in \[-1, 1\] but looks like \[0, 1\]"):
        loss(sketch, (sketch + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.full((2, 1, SIZE, SIZE), 0.97), sketch)
