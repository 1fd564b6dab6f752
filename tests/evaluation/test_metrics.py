# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.stats import wasserstein_distance

from diffsketching_pipeline.evaluation import metrics
from diffsketching_pipeline.images import patches


# -- distances between sets --


def test_frechet_distance_is_its_closed_form():
    rng = np.random.default_rng(0)
    white = rng.standard_normal((200, 5))
    white -= white.mean(0)
    white = torch.from_numpy(white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T)
    scale, shift = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1]), torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0])
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    assert metrics.frechet_distance(white * scale + shift, white) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(white, white) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_more_features_than_images_is_the_same():
    """Features in as many dimensions as there are images, and rotated into many more."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    reference = 0.3 + 2 * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(100, 20, generator=generator, dtype=torch.float64))[0]
    few, many = (metrics.frechet_distance(features @ b, reference @ b) for b in (torch.eye(20).double(), basis.T))
    assert many == pytest.approx(few, rel=1e-5) and few > 10


def test_kernel_distance_is_the_unbiased_estimate():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9, 4))
    y += 0.7

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = [sum(kernel(a, b) for a, b in itertools.permutations(z, 2)) / (9 * 8) for z in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y) / 81
    value = metrics.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert value == pytest.approx(sum(within) - 2 * across, rel=1e-6)


def test_kernel_distance_uses_all_of_a_larger_set():
    rng = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    errors = []
    for _ in range(20):
        small, large = torch.randn(20, 3, generator=rng), torch.randn(200, 3, generator=rng)
        per_part = [metrics.kernel_distance(small, part) for part in large.split(20)]
        value = metrics.kernel_distance(small, large)
        assert value == metrics.kernel_distance(small, large)
        errors.append((value - np.mean(per_part), per_part[0] - np.mean(per_part)))
    of_all, of_one_part = np.std(errors, axis=0)
    assert of_all < of_one_part / 2
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_are_those_of_the_definition():
    rng = torch.Generator().manual_seed(0)
    images, photos = torch.randn(40, 3, generator=rng), torch.randn(50, 3, generator=rng) + 0.5

    def share_inside(queries, keys, k=3):
        radii = [sorted(float((key - other).norm()) for other in keys)[k] for key in keys]
        inside = [any((q - key).norm() <= r for key, r in zip(keys, radii, strict=True)) for q in queries]
        return np.mean(inside)

    assert 0.2 < share_inside(images, photos) < 0.98
    assert metrics.precision(images, photos) == pytest.approx(share_inside(images, photos))
    assert metrics.recall(images, photos) == pytest.approx(share_inside(photos, images))


@pytest.mark.parametrize(
    ("left", "width", "precision", "recall"),
    [(0.5, 1.0, 0.5, 0.5), (0.0, 0.5, 1.0, 0.5), (0.0, 4.0, 0.25, 1.0), (3.0, 1.0, 0.0, 0.0)],
)
def test_precision_and_recall_find_a_known_overlap(left, width, precision, recall):
    """Real ones fill a square; generated ones fill half of it, more than it, or miss it."""
    rng = torch.Generator().manual_seed(0)
    photos = torch.rand(1500, 2, generator=rng)
    images = torch.rand(1500, 2, generator=rng) * torch.tensor([width, 1.0]) + torch.tensor([left, 0.0])
    assert metrics.precision(images, photos) == pytest.approx(precision, abs=0.06)
    assert metrics.recall(images, photos) == pytest.approx(recall, abs=0.06)


def test_recall_interval_widens_with_images_that_come_together():
    rng = torch.Generator().manual_seed(0)
    centers = torch.rand(40, 1, 2, generator=rng)
    images = (centers + 0.02 * torch.randn(40, 5, 2, generator=rng)).flatten(0, 1)
    covered = metrics.manifold_membership(torch.rand(300, 2, generator=rng), images)
    together = metrics.bootstrap_recall(covered, np.repeat(np.arange(40), 5), 200)
    alone = metrics.bootstrap_recall(covered, np.arange(200), 200)
    assert abs(together.mean()) < 1e-12 and together.std() > 1.5 * alone.std() > 0


# -- intervals --


def test_bootstrap_resamples_whole_drawings():
    rng = np.random.default_rng(0)
    per_drawing = rng.standard_normal(100)
    values, groups = np.repeat(per_drawing, 4), np.repeat(np.arange(100), 4)
    spread = metrics.bootstrap_means(values, groups, 4000).std()
    assert spread == pytest.approx(per_drawing.std() / 10, rel=0.05)
    as_if_independent = metrics.bootstrap_means(values, np.arange(400), 4000).std()
    assert as_if_independent == pytest.approx(per_drawing.std() / 20, rel=0.05)


def test_bootstrap_weights_images():
    values, weights = np.array([1.0, 0.0, 0.0]), np.array([3.0, 1.0, 1.0])
    one_group = metrics.bootstrap_means(values, np.zeros(3, dtype=int), 5, weights)
    np.testing.assert_allclose(one_group, 0.6)


def test_no_interval_from_few_groups_or_no_samples():
    samples = np.linspace(0, 1, 1001)
    assert metrics.percentile_interval(samples, 50) == pytest.approx((0.025, 0.975))
    assert metrics.percentile_interval(samples, metrics.MIN_GROUPS - 1) is None
    assert metrics.percentile_interval(np.empty(0), 50) is None


def test_distance_interval_is_not_shifted_by_resampling():
    features = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    value = metrics.frechet_distance(features, reference)
    spread = metrics.bootstrap_distances(metrics.frechet_distance, features, np.arange(60), reference, 50)
    resampled = features[torch.from_numpy(np.random.default_rng(0).integers(60, size=60))]
    assert metrics.frechet_distance(resampled, reference) > value  # why the samples are centered
    assert spread.mean() == pytest.approx(0, abs=1e-9)
    low, high = metrics.percentile_interval(value + spread, 60)
    assert low < value < high


# -- choosing photos --


def test_random_halves_are_disjoint_and_alike():
    labels = ["a"] * 21 + ["b"] * 10
    first, second = metrics.random_halves(labels, seed=3)
    assert len(first) == len(second) == 15 and not set(first) & set(second)
    assert abs(sum(i < 21 for i in first) - sum(i < 21 for i in second)) <= 1
    assert set(first) != set(metrics.random_halves(labels, seed=4)[0])


def test_sample_like_matches_classes_and_takes_allowed_photos_only():
    labels = ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    allowed = np.arange(30) % 2 == 0
    chosen = metrics.sample_like(labels, ["b"] * 3 + ["a"] * 9, allowed, seed=0)
    assert [labels[i] for i in chosen].count("b") == 3
    assert [i for i in chosen if i < 10] == [0, 2, 4, 6, 8]  # 9 wanted, 5 allowed
    assert allowed[chosen].all() and all(labels[i] != "c" for i in chosen)


# -- diversity and nearest neighbors --


def test_pairwise_means_are_zero_for_identical_and_root_two_for_orthogonal_features():
    features = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [1.0, 0.0], [7.0, 7.0]])
    means = metrics.pairwise_means(features, np.array([0, 0, 1, 1, 2]))
    assert means == {0: pytest.approx(0), 1: pytest.approx(math.sqrt(2))}


@pytest.mark.parametrize("within_class", [False, True])
def test_random_pair_distance_is_the_mean_over_pairs(within_class):
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    labels = np.array([0, 0, 1, 1, 1, 0, 2])
    unit = (features / features.norm(dim=1, keepdim=True)).double().numpy()

    def mean_over(indices):
        pairs = [
            np.linalg.norm(unit[i] - unit[k])
            for i, k in itertools.combinations(indices, 2)
            if i != k and (not within_class or labels[i] == labels[k])
        ]
        return np.mean(pairs)

    same = labels[:, None] == labels[None, :] if within_class else None
    value, samples = metrics.random_pair_distance(features, same, num_samples=3, seed=5)
    assert value == pytest.approx(mean_over(range(7)))
    draws = np.random.default_rng(5).integers(7, size=(3, 7))
    np.testing.assert_allclose(samples, [mean_over(draw) for draw in draws])


def test_nearest_finds_copies_and_their_distances():
    keys = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    queries = keys[[17, 3]] + torch.tensor([[0.0] * 4, [3e-3, 4e-3, 0.0, 0.0]])
    distances, indices = metrics.nearest(queries, keys, count=2)
    assert indices[:, 0].tolist() == [17, 3]
    torch.testing.assert_close(distances[:, 0], torch.tensor([0.0, 5e-3]).double(), atol=1e-6, rtol=0)
    assert distances[0, 1] == pytest.approx(float((keys[17] - keys).norm(dim=1).sort().values[1]), rel=1e-6)


# -- contours --


def test_contour_distance_is_the_symmetric_capped_chamfer_distance():
    edges, strokes = np.zeros((2, 2, 40, 40), dtype=bool)
    edges[0, 10, 10] = edges[0, 30, 12] = True  # the second photo has no edge
    strokes[0, 10, 13] = True
    strokes[1, 8:12, 10] = True
    cap = metrics.CHAMFER_CAP
    # In pixels: from edges 3 and more than the cap (4), from strokes 3; then 0 and 4, from strokes 2, 1, 0 and 1.
    expected = [[((3 + 4) / 2 + 3) / 2 / 40, ((0 + 4) / 2 + 1) / 2 / 40], [cap, cap]]
    np.testing.assert_allclose(metrics.contour_distances(edges, strokes), expected)


def test_ties_count_against_the_image():
    distances = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.3], [0.1, 0.1, 0.1], [0.3, 0.2, 0.1]])
    assert metrics.retrieval_ranks(distances, np.array([0, 0, 1, 0])).tolist() == [0, 1, 2, 2]


def test_edge_map_follows_a_pale_shape_and_is_empty_for_a_plain_page():
    page = Image.new("RGB", (64, 64), (235, 235, 235))
    assert not metrics.edge_map(page).any()
    ImageDraw.Draw(page).rectangle((16, 16, 47, 47), fill=(215, 215, 215))
    rows, columns = np.nonzero(metrics.edge_map(page))
    for positions in (rows, columns):
        assert abs(positions.min() - 32) <= 2 and abs(positions.max() - 95) <= 2


def photos_of(tint, count, seed=0):
    """uint8 `[count, 3, 64, 64]`: smooth random pictures of a tint."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    return ((0.7 * smooth + 0.3 * torch.tensor(tint)[:, None, None]) * 255).byte()


def test_patches_see_tints_and_checkerboards_that_a_classifier_may_overlook():
    red, other_red, blue = photos_of([1.0, 0, 0], 60), photos_of([1.0, 0, 0], 90, seed=1), photos_of([0, 0, 1.0], 90)
    reference = patches.patch_quantiles(patches.patch_projections(red))
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 12
    checkered = (other_red.int() + board.int()).clamp(0, 255).byte()

    def distance(pixels):
        return patches.patch_distance(patches.patch_projections(pixels), reference)

    assert distance(red) == 0
    assert distance(other_red) < 0.2
    assert distance(checkered) > 3 * distance(other_red) and distance(blue) > 3 * distance(other_red)


def test_patch_distance_is_the_wasserstein_distance_along_each_direction():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, 3, 32, 8, generator=generator) * scale + 0.3 for scale in (1.0, 2.0))
    expected = np.mean(
        [
            np.mean([wasserstein_distance(first[:, k, :, d].ravel(), second[:, k, :, d].ravel()) for d in range(8)])
            / second[:, k].flatten(0, 1).std(dim=0).mean().item()
            for k in range(3)
        ]
    )
    assert patches.patch_distance(first, patches.patch_quantiles(second)) == pytest.approx(expected, rel=0.03)


def projections_by_convolution(pixels, num_levels):
    """Every place along every direction, of which the random ones are taken: what is now computed of those alone."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_levels, 32, 3, 7, 7)
    directions = F.normalize(torch.randn(shape, generator=generator).flatten(2), dim=2).reshape(shape)
    level, projections = pixels.float() / 255, []
    for index in range(num_levels):
        band = level
        if index < num_levels - 1:
            smaller = F.interpolate(level, scale_factor=0.5, mode="bilinear", antialias=True)
            band = level - F.interpolate(smaller, size=level.shape[-2:], mode="bilinear")
            level = smaller
        along = F.conv2d(band, directions[index]).flatten(2)
        where = torch.randint(along.shape[-1], (len(pixels), 1, 32), generator=generator)
        projections.append(along.gather(2, where.expand(-1, 32, -1)).transpose(1, 2))
    return torch.stack(projections, dim=1)


def test_patches_of_64_pixels_are_those_that_they_were():
    # More than one batch of 64, on the three levels that all published numbers have.
    pixels = photos_of([1.0, 0.5, 0], 70)
    assert pixels.shape[-1] == 64 and patches.pyramid_levels(64) == patches.PYRAMID_LEVELS == 3
    torch.testing.assert_close(
        patches.patch_projections(pixels), projections_by_convolution(pixels, 3), atol=1e-5, rtol=0
    )


def test_larger_photos_have_more_levels_down_to_the_same_coarse_one():
    levels = {side: patches.pyramid_levels(side) for side in (7, 16, 32, 64, 127, 128, 255, 256, 512)}
    assert levels == {7: 1, 16: 2, 32: 3, 64: 3, 127: 3, 128: 4, 255: 4, 256: 5, 512: 6}
    with pytest.raises(ValueError, match="`side`.* 6"):
        patches.pyramid_levels(6)
    large = F.interpolate(photos_of([1.0, 0, 0], 9).float(), 256, mode="bilinear").byte()
    projections = patches.patch_projections(large, num_levels=5)
    assert projections.shape == (9, 5, 32, 32)
    torch.testing.assert_close(projections, projections_by_convolution(large, 5), atol=1e-5, rtol=0)
    # A shade that comes and goes once over the photo: too slow for a patch of 7 of 64 pixels, not for one of 7 of 16.
    wave = 25 * torch.sin(torch.linspace(0, 2 * torch.pi, 256))
    shaded = (large.float() + wave).clamp(0, 255).byte()
    reference, found = (patches.patch_quantiles(patches.patch_projections(p, num_levels=5)) for p in (large, shaded))
    apart = (found - reference).abs().mean(dim=(1, 2))
    assert apart[4] > 10 * apart[:3].max() and apart[4] > 2 * apart[3]
