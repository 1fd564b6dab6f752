# SPDX-License-Identifier: Apache-2.0
import warnings

import numpy as np
import pytest
import torch
from testing_utils import COMPONENTS, SIZE, along, directional_derivatives, make_resnet, randn

from diffsketching_pipeline import DiffSketchingLoss, ImageIdentityLoss, SketchPerceptualLoss
from diffsketching_pipeline.losses import clamp_straight_through


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return make_resnet(1).eval()


def smooth_sketches(n, seed):
    return torch.tanh(randn(n, 1, SIZE, SIZE, seed=seed))


def eq_5(encoder, first, second, weights=None):
    """Eq. 5 with LPIPS' normalization, one feature vector at a time."""
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


@pytest.mark.parametrize("paper", [1.0, 0.0])
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
        (lambda x: x.mul(255).to(torch.uint8), "`pred_sketch`.* torch.uint8"),
        (lambda x: x.numpy(), "`pred_sketch`.* ndarray"),
        (lambda x: x[0], r"`pred_sketch`.* \(1, 16, 16\)"),
        (lambda x: x[:0], r"`pred_sketch`.* \(0, 1, 16, 16\)"),
        (lambda x: 2 * x, r"`pred_sketch`.* in \[-1\.\d+, 1\.\d+\]"),
        (lambda x: x * float("nan"), r"`pred_sketch`.* \[nan, nan\]"),
        (lambda x: x[:1], r"`pred_sketch`.*\(1, 1, 16, 16\).*\(2, 1, 16, 16\)"),
    ],
)
def test_what_is_not_a_sketch_batch_is_refused(encoder, make, message):
    sketch = smooth_sketches(2, seed=1)
    with pytest.raises(ValueError, match=message):
        SketchPerceptualLoss(encoder)(make(sketch), sketch)


def test_the_reference_sketch_is_checked_too(encoder):
    with pytest.raises(ValueError, match="`sketch`.* 255"):
        SketchPerceptualLoss(encoder)(torch.zeros(1, 1, SIZE, SIZE) - 1, torch.full((1, 1, SIZE, SIZE), 255.0))


def test_a_batch_in_0_to_1_is_warned_of_and_blank_paper_is_not(encoder):
    sketch, loss = smooth_sketches(2, seed=1), SketchPerceptualLoss(encoder)
    with pytest.warns(UserWarning, match=r"`sketch`.* \[0, 1\]"):
        loss(sketch, (sketch + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.full((2, 1, SIZE, SIZE), 0.97), sketch)


# ---- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_eq_5_on_the_networks_of_lpips_is_lpips(net):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    torch.manual_seed(0)
    loss = SketchPerceptualLoss.from_lpips(net, pretrained_backbone=False)
    first, second = (torch.tanh(randn(2, 1, 64, 64, seed=seed)) for seed in (1, 2))
    with torch.no_grad():
        expected = reference(first.expand(-1, 3, -1, -1), second.expand(-1, 3, -1, -1)).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(loss(first, second), expected, rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    blank = torch.ones(1, 1, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(blank, first[:1]).sum(), blank)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


# ---- eq. 6 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_encoder():
    torch.manual_seed(1)
    return make_resnet(3).eval()


def smooth_photos(n, seed):
    return torch.tanh(randn(n, 3, SIZE, SIZE, seed=seed))


def eq_6(encoder, first, second):
    with torch.no_grad():
        # Global average pooling of the last stage, and the cosine, written out.
        a, b = (
            encoder(x, output_hidden_states=True).hidden_states[-1].mean(dim=(2, 3)).double() for x in (first, second)
        )
    return 1 - (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())


def test_identity_loss_is_eq_6_as_a_distance(image_encoder):
    loss, first, second = ImageIdentityLoss(image_encoder), smooth_photos(3, seed=1), smooth_photos(3, seed=2)
    found = loss(first, second)
    assert found.shape == (3,) and found.min() > 1e-4
    torch.testing.assert_close(found.double(), eq_6(image_encoder, first, second), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss(first, first), torch.zeros(3), rtol=0, atol=1e-6)


def test_identity_loss_feeds_a_public_network_what_it_was_trained_on(image_encoder):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    loss, first, second = (
        ImageIdentityLoss(image_encoder, mean, std),
        smooth_photos(2, seed=1),
        smooth_photos(2, seed=2),
    )
    to_input = lambda x: torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)  # noqa: E731
    expected = eq_6(image_encoder, to_input(first), to_input(second))
    torch.testing.assert_close(loss(first, second).double(), expected, rtol=1e-3, atol=1e-6)
    sizes = []
    image_encoder.register_forward_pre_hook(lambda *_: None)
    image_encoder.resnet.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
    ImageIdentityLoss(image_encoder, image_size=24)(first, second)
    assert sizes == [(24, 24)] * 2
    with pytest.raises(ValueError, match="`image_mean`.*`image_std`"):
        ImageIdentityLoss(image_encoder, image_mean=mean)


def test_identity_gradient_matches_finite_differences(image_encoder):
    loss = ImageIdentityLoss(image_encoder.double())
    first, second = smooth_photos(2, seed=1).double() * 0.9, smooth_photos(2, seed=2).double()
    directions, expected = directional_derivatives(lambda x, row: loss(x, second[row].expand_as(x)), first)
    first.requires_grad_(True)
    (found,) = torch.autograd.grad(loss(first, second).sum(), first)
    torch.testing.assert_close(along(found, directions), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :1], r"`pred_images`.* \(2, 1, 16, 16\)"),
        (lambda x: x[:1], r"`pred_images`.*\(1, 3, 16, 16\).*\(2, 3, 16, 16\)"),
    ],
)
def test_what_is_not_a_photo_batch_is_refused(image_encoder, make, message):
    photos = smooth_photos(2, seed=1)
    with pytest.raises(ValueError, match=message):
        ImageIdentityLoss(image_encoder)(make(photos), photos)


# ---- eq. 7 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sketcher():
    torch.manual_seed(2)
    return COMPONENTS["sketcher"]().eval()


def test_total_loss_is_eq_7(encoder, image_encoder, sketcher):
    loss = DiffSketchingLoss(sketcher, SketchPerceptualLoss(encoder), ImageIdentityLoss(image_encoder), 0.3)
    # What a chain leaves is not all inside [-1, 1]; the constraints see it clamped.
    pred, photos, sketch = 1.3 * smooth_photos(2, seed=1), smooth_photos(2, seed=2), smooth_sketches(2, seed=3)
    found = loss(pred, photos, sketch)
    clamped = pred.clamp(-1, 1)
    with torch.no_grad():
        perceptual, identity = eq_5(encoder, sketcher(clamped), sketch), eq_6(image_encoder, clamped, photos)
    torch.testing.assert_close(found.perceptual.double(), perceptual, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.identity.double(), identity, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.loss.double(), 0.3 * identity + 0.7 * perceptual, rtol=1e-3, atol=1e-5)


def test_terms_without_weight_need_no_networks(encoder, image_encoder, sketcher):
    pred, photos, sketch = smooth_photos(2, seed=1), smooth_photos(2, seed=2), smooth_sketches(2, seed=3)
    only_shape = DiffSketchingLoss(sketcher, SketchPerceptualLoss(encoder), None, identity_weight=0.0)
    assert only_shape(pred, photos, sketch).identity is None
    only_identity = DiffSketchingLoss(None, None, ImageIdentityLoss(image_encoder), identity_weight=1.0)
    found = only_identity(pred, photos, sketch)
    assert found.perceptual is None and torch.equal(found.loss, found.identity)
    with pytest.raises(ValueError, match="`identity_weight=0.5`.*`identity_loss`"):
        DiffSketchingLoss(sketcher, SketchPerceptualLoss(encoder), None)
    with pytest.raises(ValueError, match="`identity_weight=0.5`.*`sketcher`.*`perceptual_loss`"):
        DiffSketchingLoss(None, SketchPerceptualLoss(encoder), ImageIdentityLoss(image_encoder))
    with pytest.raises(ValueError, match=r"`identity_weight`.* 1.5"):
        DiffSketchingLoss(None, None, ImageIdentityLoss(image_encoder), 1.5)


def test_saturated_pixels_keep_their_gradient(encoder, image_encoder, sketcher):
    loss = DiffSketchingLoss(sketcher, SketchPerceptualLoss(encoder), ImageIdentityLoss(image_encoder))
    pred = (3 * smooth_photos(1, seed=1)).requires_grad_(True)
    total = loss(pred, smooth_photos(1, seed=2), smooth_sketches(1, seed=3)).loss
    (gradient,) = torch.autograd.grad(total.sum(), pred)
    outside = pred.detach().abs() > 1
    assert outside.any() and (gradient[outside] != 0).float().mean() > 0.9
    values = torch.tensor([-2.0, 0.5, 2.0], requires_grad=True)
    clamped = clamp_straight_through(values)
    assert clamped.tolist() == [-1.0, 0.5, 1.0]
    assert torch.autograd.grad(clamped.sum(), values)[0].tolist() == [1, 1, 1]


def test_a_broken_chain_is_refused(encoder, image_encoder, sketcher):
    loss = DiffSketchingLoss(sketcher, SketchPerceptualLoss(encoder), ImageIdentityLoss(image_encoder))
    pred = smooth_photos(1, seed=1)
    pred[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="`pred_images`.*nan"):
        loss(pred, smooth_photos(1, seed=2), smooth_sketches(1, seed=3))
    with pytest.raises(ValueError, match=r"`pred_images`.*\(1, 1, 16, 16\)"):
        loss(smooth_sketches(1, seed=1), smooth_photos(1, seed=2), smooth_sketches(1, seed=3))
