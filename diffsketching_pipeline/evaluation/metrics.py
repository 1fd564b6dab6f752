# SPDX-License-Identifier: Apache-2.0
"""The statistics behind the numbers of `evaluate.py`: functions of features, contours and groups of images."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.feature import canny
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffsketching_pipeline.evaluation.image_sets import squash


CONTOUR_RESOLUTION = 128
"""Side in pixels at which contours are compared; drawings are normalized to it as the pipeline does to its own size."""

CANNY_SIGMA = 3.0
"""Blur in pixels at `CONTOUR_RESOLUTION`: of 2, 3, 4 and 6 the best at finding real photos by distorted contours."""

CHAMFER_CAP = 0.1
"""Distances are cut off at this share of the side, so that an edge of the background counts as one miss and no more."""

MIN_GROUPS = 10
"""A bootstrap over fewer drawings (or photos) than this says nothing about the spread."""

MANIFOLD_NEIGHBORS = 3
"""The k of improved precision and recall, as in the paper."""


# ---- statistics -----------------------------------------------------------------------------------------------------


def bootstrap_means(
    values: np.ndarray, groups: np.ndarray, num_samples: int, weights: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """
    Weighted means over resampled groups, `[num_samples]`.

    Whole groups are drawn with replacement: images of one drawing succeed and fail together.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _, index = np.unique(groups, return_inverse=True)
    sums, norms = np.bincount(index, values * weights), np.bincount(index, weights)
    chosen = np.random.default_rng(seed).integers(len(sums), size=(num_samples, len(sums)))
    return sums[chosen].sum(1) / norms[chosen].sum(1)


def percentile_interval(samples: np.ndarray, num_groups: int) -> tuple[float, float] | None:
    """The central 95% of bootstrap samples; None for none, or for a bootstrap of fewer than `MIN_GROUPS` groups."""
    if len(samples) == 0 or num_groups < MIN_GROUPS:
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


class _Precomputed(nn.Module):
    """Lets torchmetrics take features where it expects images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


# Several processes generate, but one of them scores: a metric that waits for the others waits for ever.
THIS_PROCESS: dict[str, Any] = {"sync_on_compute": False}


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features `[N, D]` and `[M, D]` (Heusel et al., 2017)."""
    features, reference = features.double(), reference.double()
    if 4 * min(len(features), len(reference)) < features.shape[1]:
        return _frechet_distance_of_few(features, reference)
    metric = FrechetInceptionDistance(_Precomputed(features.shape[1]), **THIS_PROCESS).set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return float(metric.compute())


def _frechet_distance_of_few(features: Tensor, reference: Tensor) -> float:
    """
    The same where one set is much smaller than the dimensions, in a fraction of the time: with A^T A and B^T B the covariances,
    the trace of their product's root is the sum of the singular values of A B^T, which is only `[N, M]`.
    """
    means = [samples.mean(0) for samples in (features, reference)]
    roots = [
        (samples - mean) / (len(samples) - 1) ** 0.5
        for samples, mean in zip((features, reference), means, strict=True)
    ]
    traces = sum(root.square().sum() for root in roots)
    return float(
        (means[0] - means[1]).square().sum() + traces - 2 * torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    )


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """
    Unbiased squared MMD with the cubic kernel of KID (Binkowski et al., 2018), mean over random subsets of the size of
    the smaller set (at most 1000), as many as it takes to see about all of the larger one.
    """
    size = min(len(features), len(reference), 1000)
    subsets = -(-max(len(features), len(reference)) // size)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(0)
        network = _Precomputed(features.shape[1])
        metric = KernelInceptionDistance(network, subsets=subsets, subset_size=size, **THIS_PROCESS)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])


SET_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet_distance": frechet_distance,
    "kernel_distance": kernel_distance,
}


def bootstrap_distances(
    distance: Callable[[Tensor, Tensor], float],
    features: Tensor,
    groups: np.ndarray,
    reference: Tensor,
    num_samples: int,
    seed: int = 0,
) -> np.ndarray:
    """Distances of resampled groups of `features` from a fixed reference, minus their mean, `[num_samples]`."""
    members = [torch.from_numpy(np.flatnonzero(groups == group)) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        chosen = torch.cat([members[i] for i in rng.integers(len(members), size=len(members))])
        samples.append(distance(features[chosen], reference))
    # A resampled set has fewer distinct images, so it lies farther away than the set itself: only the spread counts.
    return np.asarray(samples) - np.mean(samples) if samples else np.empty(0)


def random_halves(labels: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of indices of equal size (one is left out of an odd number), with about the same classes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    half = len(order) // 2
    return order[0 : 2 * half : 2], order[1 : 2 * half : 2]


def sample_like(labels: Sequence[str], wanted: Sequence[str], allowed: np.ndarray, seed: int) -> np.ndarray:
    """Random indices into `labels`, allowed ones only, as many of each class as `wanted` has, or all there are."""
    rng = np.random.default_rng(seed)
    names, chosen = np.asarray(labels), []
    for label, count in sorted(Counter(wanted).items()):
        available = np.flatnonzero((names == label) & allowed)
        chosen.append(rng.permutation(available)[:count])
    return np.sort(np.concatenate(chosen))


def pairwise_means(features: Tensor, groups: np.ndarray) -> dict[int, float]:
    """Mean distance between the unit-normalized features of two images of a group, for each group of at least two."""
    unit = F.normalize(features.double(), dim=1)
    means = {}
    for group in np.unique(groups):
        members = unit[torch.from_numpy(groups == group)]
        if len(members) > 1:
            means[int(group)] = float(torch.pdist(members).mean())
    return means


def random_pair_distance(
    features: Tensor, same: np.ndarray | None, num_samples: int, seed: int = 0
) -> tuple[float, np.ndarray]:
    """
    Mean distance between unit-normalized features `[N, D]` over pairs of different images (only those that `same`
    `[N, N]` marks, if given), and its bootstrap samples over images.
    """
    unit = F.normalize(features.double(), dim=1)
    distances = torch.cdist(unit, unit).numpy()
    pairs = 1.0 - np.eye(len(unit)) if same is None else same * (1.0 - np.eye(len(unit)))
    draws = np.random.default_rng(seed).integers(len(unit), size=(num_samples, len(unit)))
    counts = np.stack([np.bincount(draw, minlength=len(unit)) for draw in draws]) if num_samples else np.empty((0, 1))
    value = (distances * pairs).sum() / pairs.sum()
    if not num_samples:
        return float(value), np.empty(0)
    return float(value), ((counts @ (distances * pairs)) * counts).sum(1) / ((counts @ pairs) * counts).sum(1)


def nearest(queries: Tensor, keys: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances from each query `[N, D]` to its `count` nearest keys `[M, D]`, and their indices."""
    keys = keys.double()
    found = [torch.cdist(chunk.double(), keys).topk(count, largest=False) for chunk in queries.split(256)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def manifold_membership(queries: Tensor, keys: Tensor, neighbors: int = MANIFOLD_NEIGHBORS) -> Tensor:
    """
    Return which balls around `keys` each query is in, bool `[N, M]` for features `[N, D]` and `[M, D]`.

    A ball reaches as far as the key's `neighbors`-th nearest other key; together they are what improved precision and
    recall take for the support of a distribution (Kynkäänniemi et al., 2019).
    """
    keys = keys.double()
    # The nearest of all keys is the key itself.
    radii = nearest(keys, keys, neighbors + 1)[0][:, -1]
    return torch.cat([torch.cdist(chunk.double(), keys) <= radii for chunk in queries.split(256)])


def precision(features: Tensor, reference: Tensor) -> float:
    """Share of `features` `[N, D]` inside the support of `reference` `[M, D]`: how many images might be real ones."""
    return float(manifold_membership(features, reference).any(1).double().mean())


def recall(features: Tensor, reference: Tensor) -> float:
    """Share of `reference` `[M, D]` inside the support of `features` `[N, D]`: how many real ones might be generated."""
    return precision(reference, features)


def bootstrap_recall(covered: Tensor, groups: np.ndarray, num_samples: int, seed: int = 0) -> np.ndarray:
    """
    Recall of resampled groups of images, minus its mean, `[num_samples]`.

    Args:
        covered: bool `[M, N]`, the balls of N images that M real photos are in. The balls stay as they are: a doubled
            image would shrink its own to nothing.
        groups: int `[N]`, the images that are drawn together.
    """
    members = [torch.from_numpy(np.flatnonzero(groups == group)) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        chosen = torch.cat([members[i] for i in rng.integers(len(members), size=len(members))])
        samples.append(float(covered[:, chosen].any(1).double().mean()))
    # As for distances: fewer distinct images cover less, so only the spread counts.
    return np.asarray(samples) - np.mean(samples) if samples else np.empty(0)


# ---- contours -------------------------------------------------------------------------------------------------------


def edge_map(image: Image.Image) -> np.ndarray:
    """
    Edges of a photo by Canny's method, bool `[CONTOUR_RESOLUTION, CONTOUR_RESOLUTION]`.

    A classical method: no network that a loss has used decides what a contour is. Its thresholds fall until something is
    found, because pale garments have weak edges.
    """
    pixels = np.asarray(squash(image, CONTOUR_RESOLUTION).convert("L"), dtype=np.float32) / 255
    edges = np.zeros(pixels.shape, dtype=bool)
    for factor in (1.0, 0.5, 0.25):
        edges = canny(pixels, sigma=CANNY_SIGMA, low_threshold=0.1 * factor, high_threshold=0.2 * factor)
        if edges.sum() >= CONTOUR_RESOLUTION:
            break
    return edges


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest True one as a share of the side, at most `CHAMFER_CAP`; flat `[S * S]`."""
    if not mask.any():
        return np.full(mask.size, CHAMFER_CAP)
    return np.minimum(ndimage.distance_transform_edt(~mask) / mask.shape[-1], CHAMFER_CAP).ravel()


def contour_distances(edges: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """
    Symmetric chamfer distance between contours of photos and drawings, as a share of the side.

    Args:
        edges (`np.ndarray`): bool `[N, S, S]`.
        strokes (`np.ndarray`): bool `[G, S, S]`, none of them empty.

    Returns:
        `np.ndarray`: `[N, G]`, half the sum of the mean distance from edges to strokes and from strokes to edges, each
        distance at most `CHAMFER_CAP`. A photo without edges is `CHAMFER_CAP` away from every drawing.
    """
    to_edges = np.stack([_distance_to(mask) for mask in edges])
    to_strokes = np.stack([_distance_to(mask) for mask in strokes])
    flat_edges = edges.reshape(len(edges), -1).astype(np.float64)
    flat_strokes = strokes.reshape(len(strokes), -1).astype(np.float64)
    num_edges = flat_edges.sum(1, keepdims=True)
    from_edges = np.where(num_edges > 0, flat_edges @ to_strokes.T / np.maximum(num_edges, 1), CHAMFER_CAP)
    from_strokes = to_edges @ flat_strokes.T / flat_strokes.sum(1)
    return (from_edges + from_strokes) / 2


def retrieval_ranks(distances: np.ndarray, own: np.ndarray) -> np.ndarray:
    """
    Count the other drawings that are at most as far from an image as its own, `[N]`; 0 is a hit at 1.

    Ties count against the image, so an image without edges, equally far from all drawings, ranks last.
    """
    own_distance = np.take_along_axis(distances, own[:, None], axis=1)
    return (distances <= own_distance + 1e-9).sum(1) - 1


THUMBNAIL_SIDE = 32


def thumbnails(pixels: Tensor) -> Tensor:
    """uint8 `[N, 3, R, R]` -> float `[N, 3 * THUMBNAIL_SIDE ** 2]` in [0, 1], small enough to forgive small shifts."""
    chunks = [F.adaptive_avg_pool2d(chunk.float() / 255, THUMBNAIL_SIDE).flatten(1) for chunk in pixels.split(256)]
    return torch.cat(chunks)
