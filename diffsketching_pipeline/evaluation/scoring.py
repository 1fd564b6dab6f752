# SPDX-License-Identifier: Apache-2.0
"""Every metric of `evaluate.py`, with all that its value depends on."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from diffsketching_pipeline.evaluation.extractors import Evaluator
from diffsketching_pipeline.evaluation.image_sets import Drawing, ImageSet
from diffsketching_pipeline.evaluation.measurements import METRICS, Measurement, Scores, base_metric
from diffsketching_pipeline.evaluation.metrics import (
    CANNY_SIGMA,
    CHAMFER_CAP,
    CONTOUR_RESOLUTION,
    MANIFOLD_NEIGHBORS,
    SET_DISTANCES,
    THUMBNAIL_SIDE,
    bootstrap_distances,
    bootstrap_means,
    bootstrap_recall,
    contour_distances,
    edge_map,
    manifold_membership,
    nearest,
    pairwise_means,
    percentile_interval,
    precision,
    random_halves,
    random_pair_distance,
    recall,
    retrieval_ranks,
    thumbnails,
)
from diffsketching_pipeline.evaluation.perceptual import load_lpips, lpips_means
from diffsketching_pipeline.images.patches import (
    PATCH_SIZE,
    PATCHES_PER_IMAGE,
    patch_distance,
    patch_projections,
    patch_quantiles,
    pyramid_levels,
)


MIN_DISTANCE_SAMPLES = 32
"""
Fewest images on either side of a Fréchet or kernel distance: of 16 images of a weak model, Fréchet distances overlap with
those of 16 real photos; of 32 they are three standard deviations apart.
"""

MAX_DISTANCE_RESAMPLES = 100
NUM_HALVES = 10
NEAR_COPY_QUANTILE = 0.05


class Scorer:
    """
    All metrics of one evaluation. Systems are sets of images of drawings, photos are sets of real ones.

    Args:
        evaluator: the evaluation network.
        drawings: all drawings, the gallery of the retrieval.
        strokes: bool `[len(drawings), S, S]`, the drawings as the model sees them.
        selected: the drawings that are scored.
        reference, train: real photos with their features.
        split: half of the drawings that `selected` is, for the names of the numbers.
        num_bootstrap_samples: resamples of the 95% intervals; 0 = no intervals.
        lpips_net: backbone of LPIPS.
        resolution: side in pixels at which colors and textures are compared in addition to the evaluation network's.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        drawings: list[Drawing],
        strokes: np.ndarray,
        selected: list[Drawing],
        reference: ImageSet,
        train: ImageSet,
        *,
        split: str = "all",
        num_bootstrap_samples: int = 1000,
        lpips_net: Literal["alex", "vgg", "squeeze"] = "alex",
        resolution: int | None = None,
    ):
        self.evaluator, self.strokes, self.train = evaluator, strokes, train
        self.num_bootstrap_samples, self.lpips_net = num_bootstrap_samples, lpips_net
        half = "all" if split == "all" else f"{split} half,"
        self.drawn = {"drawings": f"{half} {len(selected)} of {len(drawings)}"}
        self.mix = Counter(drawing.label for drawing in selected)
        self.reference = reference
        drawn = [i for i, label in enumerate(reference.labels) if label in self.mix]
        self.drawn_reference = reference.select(drawn, f"{reference.name} of drawn classes")
        sides = dict.fromkeys([evaluator.resolution, resolution or evaluator.resolution])
        self.reference_patches = {side: patch_quantiles(self.patches(reference, side)) for side in sides}
        self.lpips, self.lpips_reason = load_lpips(lpips_net)
        self.near_copy_limit = None
        if drawn:
            self.near_copy_limit = float(
                np.quantile(self.training_distances(self.drawn_reference), NEAR_COPY_QUANTILE)
            )

    def score_system(self, images: ImageSet) -> Scores:
        """Every metric of images that were made from drawings."""
        return {**self.judge_system(images), **self.retrieval(images), **self.cost(images)}

    def judge_system(self, images: ImageSet) -> Scores:
        """The metrics of such images that depend on the evaluation network, and some that come with them."""
        return {
            **self.class_agreement(images),
            **self.relative_agreement(images),
            **self.conditioning_class(images),
            **self.realism(images),
            **self.diversity(images),
            **self.memorisation(images),
        }

    def score_reference(self, photos: ImageSet) -> Scores:
        """Score the reference photos themselves: their distance is that of one half from the other."""
        return {
            **self.class_agreement(photos),
            **self.reweighted_agreement(photos),
            **self.halves(photos),
            **self.photo_diversity(photos),
            **self.memorisation(photos),
        }

    def score_training_photos(self, photos: ImageSet) -> Scores:
        """Score training photos: what perfect images of the same classes would reach at the same number."""
        return {**self.class_agreement(photos), **self.relative_agreement(photos), **self.realism(photos)}

    # -- building blocks

    def measure(
        self,
        key: str,
        value: float | None,
        images: ImageSet,
        conditions: dict[str, str],
        interval: tuple[float, float] | None = None,
        reason: str | None = None,
    ) -> Scores:
        conditions, title = {**images.conditions, **conditions}, METRICS[base_metric(key)][0]
        if "side" in conditions:
            title += f" ({conditions['side']})"
        return {key: Measurement(title, value, len(images), interval, conditions, reason)}

    def measure_mean(
        self,
        key: str,
        values: np.ndarray,
        images: ImageSet,
        conditions: dict[str, str],
        weights: np.ndarray | None = None,
    ) -> Scores:
        """The mean of one value per image, with its bootstrap interval."""
        values = np.asarray(values, dtype=np.float64)
        samples = bootstrap_means(values, images.groups, self.num_bootstrap_samples, weights)
        interval = percentile_interval(samples, len(np.unique(images.groups)))
        return self.measure(key, float(np.average(values, weights=weights)), images, conditions, interval)

    def agrees(self, images: ImageSet, labels: Sequence[str | None] | None = None) -> np.ndarray:
        """1 where the evaluation network takes an image for its label (`labels`, or its own), else 0."""
        predicted = [self.evaluator.labels[i] for i in images.probabilities.argmax(-1).tolist()]
        labels = images.labels if labels is None else labels
        return np.array([a == b for a, b in zip(predicted, labels, strict=True)], dtype=np.float64)

    def mix_weights(self, photos: ImageSet) -> np.ndarray | None:
        """Weights that make classes as frequent as among the drawings; None where a class is missing."""
        counts = Counter(photos.labels)
        if set(self.mix) - set(counts):
            return None
        return np.array([self.mix[label] / counts[label] for label in photos.labels])

    # -- faithfulness

    def no_classes(self, key: str, images: ImageSet) -> Scores:
        """Nothing, because no network names classes."""
        return self.measure(key, None, images, {}, reason="no `evaluator` names classes")

    def class_agreement(self, images: ImageSet) -> Scores:
        """Share of images that the evaluation network takes for their class."""
        if not self.evaluator.labels:
            return self.no_classes("class_agreement", images)
        return self.measure_mean("class_agreement", self.agrees(images), images, self.evaluator.conditions)

    def reweighted_agreement(self, photos: ImageSet) -> Scores:
        """The share for photos, if their classes were as frequent as the drawings'."""
        weights, key = self.mix_weights(photos), "class_agreement_reweighted"
        if not self.evaluator.labels:
            return self.no_classes(key, photos)
        if weights is None:
            reason = "the photos lack a class of the drawings"
            return self.measure(key, None, photos, self.evaluator.conditions, reason=reason)
        return self.measure_mean(key, self.agrees(photos), photos, self.evaluator.conditions, weights)

    def relative_agreement(self, images: ImageSet) -> Scores:
        """The share among images as a fraction of the reweighted share among the reference photos."""
        key, photos = "class_agreement_relative", self.drawn_reference
        if not self.evaluator.labels:
            return self.no_classes(key, images)
        against = f"{len(photos)} {photos.name}, classes as frequent as the drawings'"
        conditions = {**self.evaluator.conditions, "reference": against}
        weights = self.mix_weights(photos)
        real = None if weights is None else self.agrees(photos)
        if real is None or not real.any():
            reason = "no reference photo is recognized" if real is not None else "they lack a class of the drawings"
            return self.measure(key, None, images, conditions, reason=reason)
        agrees, num_samples = self.agrees(images), self.num_bootstrap_samples
        samples = bootstrap_means(agrees, images.groups, num_samples)
        # Another seed: the photos are drawn independently of the images.
        real_samples = bootstrap_means(real, photos.groups, num_samples, weights, seed=1)
        interval = percentile_interval(samples / np.maximum(real_samples, 1e-9), len(np.unique(images.groups)))
        value = float(agrees.mean() / np.average(real, weights=weights))
        return self.measure(key, value, images, conditions, interval)

    def conditioning_class(self, images: ImageSet) -> Scores:
        """
        Score how often the class that an image was generated with is the drawing's, and how often the evaluation network sees
        that class in it: what the class predictor costs, and what the generator does. Left out where it is not known.
        """
        if not images.given_labels or None in images.given_labels:
            return {}
        right = np.array([a == b for a, b in zip(images.given_labels, images.labels, strict=True)])
        scores = self.measure_mean("conditioning_class_accuracy", right, images, {})
        key = "conditioning_class_agreement"
        if not self.evaluator.labels:
            return self.no_classes(key, images) | scores
        seen = self.agrees(images, images.given_labels)
        return self.measure_mean(key, seen, images, self.evaluator.conditions) | scores

    def retrieval(self, images: ImageSet) -> Scores:
        """Score how often an image's own drawing is among the 1 or 5 of all drawings that are nearest to its contour."""
        edges = [edge_map(images.image(i)) for i in tqdm(range(len(images)), desc="Contours", leave=False)]
        distances = contour_distances(np.stack(edges), self.strokes)
        ranks = retrieval_ranks(distances, images.groups)
        size = len(self.strokes)
        conditions = {
            "contour": f"Canny sigma {CANNY_SIGMA:g} at {CONTOUR_RESOLUTION}px",
            "distance": f"symmetric chamfer capped at {CHAMFER_CAP:g} of the side",
        }
        scores: Scores = {}
        for k in (1, 5):
            if size <= k:
                reason = f"{size} drawing(s) are too few to choose {k} from"
                scores |= self.measure(f"retrieval_at_{k}", None, images, conditions, reason=reason)
                continue
            more = {"gallery": f"{size} drawings", "chance": f"{k / size:.3g}", **conditions}
            scores |= self.measure_mean(f"retrieval_at_{k}", ranks < k, images, more)
        own = distances[np.arange(len(images)), images.groups]
        return scores | self.measure_mean("contour_distance", own, images, conditions)

    # -- realism

    def realism(self, images: ImageSet) -> Scores:
        """Distances, precision and recall against all reference photos, and against those of the drawings' classes."""
        scores: Scores = {}
        for suffix, reference in (("", self.reference), ("_drawn_classes", self.drawn_reference)):
            for name, distance in SET_DISTANCES.items():
                described = (images.features, reference.features)
                scores |= self.set_distance(
                    name + suffix, distance, images, reference, described, self.evaluator.feature_conditions
                )
            scores |= self.precision_and_recall(suffix, images, reference)
        # Patches tell no class from another.
        for side, reference_patches in self.reference_patches.items():
            described = (self.patches(images, side), reference_patches)
            key, conditions = self.patch_key(side), self.patch_conditions(side)
            scores |= self.set_distance(key, patch_distance, images, self.reference, described, conditions)
        return scores

    def patches(self, images: ImageSet, side: int) -> Tensor:
        """The [`patch_projections`] of the images at `side` pixels; noise of that side has no larger grain."""
        if side != images.pixels.shape[-1]:
            images = images.at(side) if images.files else make_noise(images, side=side)
        return patch_projections(images.pixels, num_levels=pyramid_levels(side))

    def patch_key(self, side: int) -> str:
        """Return the key of the distance at the evaluation network's side, or at another, which it names."""
        return "patch_distance" if side == self.evaluator.resolution else f"patch_distance ({side} px)"

    def patch_conditions(self, side: int) -> dict[str, str]:
        """Return what a distance of patches at `side` pixels depends on."""
        levels = f"each of {pyramid_levels(side)} levels"
        return {
            "side": f"{side} px",
            "patches": f"{PATCHES_PER_IMAGE} of {PATCH_SIZE}x{PATCH_SIZE} on {levels}",
            "resize": f"squash4:3-bicubic-{side}px",
        }

    def too_few(self, images: ImageSet, reference: ImageSet) -> str | None:
        """Why two sets are not compared, if they are not."""
        if min(len(images), len(reference)) >= MIN_DISTANCE_SAMPLES:
            return None
        return f"fewer than {MIN_DISTANCE_SAMPLES} images: {len(images)} against {len(reference)}"

    def precision_and_recall(self, suffix: str, images: ImageSet, reference: ImageSet) -> Scores:
        """Shares of images inside the support of the reference photos, and of photos inside that of the images."""
        conditions = {
            **self.evaluator.feature_conditions,
            "reference": f"{len(reference)} {reference.name}",
            "neighbours": str(MANIFOLD_NEIGHBORS),
        }
        if (reason := self.too_few(images, reference)) is not None:
            names = (f"precision{suffix}", f"recall{suffix}")
            return {k: v for n in names for k, v in self.measure(n, None, images, conditions, reason=reason).items()}
        inside = manifold_membership(images.features, reference.features).any(1).numpy()
        scores = self.measure_mean(f"precision{suffix}", inside, images, conditions)
        covered = manifold_membership(reference.features, images.features)
        value = float(covered.any(1).double().mean())
        num_samples = min(self.num_bootstrap_samples, MAX_DISTANCE_RESAMPLES)
        spread = bootstrap_recall(covered, images.groups, num_samples)
        interval = percentile_interval(np.clip(value + spread, 0, 1), len(np.unique(images.groups)))
        return scores | self.measure(f"recall{suffix}", value, images, conditions, interval)

    def set_distance(
        self,
        key: str,
        distance: Callable[[Tensor, Tensor], float],
        images: ImageSet,
        reference: ImageSet,
        described: tuple[Tensor, Tensor],
        conditions: dict[str, str],
    ) -> Scores:
        """The distance between what describes the images (a row each) and the reference, with its bootstrap interval."""
        conditions = {**conditions, "reference": f"{len(reference)} {reference.name}"}
        if (reason := self.too_few(images, reference)) is not None:
            return self.measure(key, None, images, conditions, reason=reason)
        value = distance(*described)
        num_samples = min(self.num_bootstrap_samples, MAX_DISTANCE_RESAMPLES)
        spread = bootstrap_distances(distance, described[0], images.groups, described[1], num_samples)
        interval = percentile_interval(value + spread, len(np.unique(images.groups)))
        return self.measure(key, value, images, conditions, interval)

    def halves(self, photos: ImageSet) -> Scores:
        """Realism of random halves of the photos against each other: mean, smallest, largest of `NUM_HALVES` splits."""
        suffix = "_drawn_classes" if photos is self.drawn_reference else ""
        scores: Scores = {}
        for name, distance in {**SET_DISTANCES, "precision": precision, "recall": recall}.items():
            more = {} if name in SET_DISTANCES else {"neighbours": str(MANIFOLD_NEIGHBORS)}
            scores |= self.half_distance(
                name + suffix, distance, photos, photos.features, self.evaluator.feature_conditions, more
            )
        for side in self.reference_patches if photos is not self.drawn_reference else ():
            scores |= self.half_distance(
                self.patch_key(side),
                lambda first, second: patch_distance(first, patch_quantiles(second)),
                photos,
                self.patches(photos, side),
                self.patch_conditions(side),
            )
        return scores

    def half_distance(
        self,
        key: str,
        distance: Callable[[Tensor, Tensor], float],
        photos: ImageSet,
        described: Tensor,
        conditions: dict[str, str],
        more: dict[str, str] | None = None,
    ) -> Scores:
        """One distance between random halves of the photos, by what describes them (a row each)."""
        half = photos.select(range(len(photos) // 2), photos.name)
        conditions = {**conditions, "reference": f"the other half of {len(photos)} {photos.name}"}
        if len(half) < MIN_DISTANCE_SAMPLES:
            reason = f"fewer than {MIN_DISTANCE_SAMPLES} images in a half"
            return self.measure(key, None, half, conditions, reason=reason)
        halves = [random_halves(photos.labels, seed) for seed in range(NUM_HALVES)]
        values = [distance(described[first], described[second]) for first, second in halves]
        conditions |= {**(more or {}), "interval": f"smallest and largest of {NUM_HALVES} splits"}
        return self.measure(key, float(np.mean(values)), half, conditions, (min(values), max(values)))

    # -- diversity

    def diversity(self, images: ImageSet) -> Scores:
        """Distances between images of the same drawing, and between images of drawings of one class."""
        conditions = {"pairs": "within a drawing", "normalisation": "unit", **self.evaluator.feature_conditions}
        means = pairwise_means(images.features, images.groups)
        reason = None if means else "no drawing has two images"
        scores = self.group_means("pairwise_distance", means, images, conditions, reason)
        side = f"{self.evaluator.resolution} px"
        conditions = {"pairs": "within a drawing", "backbone": self.lpips_net, "side": side}
        reason = reason or self.lpips_reason
        means = {} if reason else lpips_means(self.lpips, images, self.evaluator.device)
        scores |= self.group_means("pairwise_lpips", means, images, conditions, reason)
        return scores | self.same_class_distance(images, {"pairs": "images of one class"})

    def group_means(
        self, key: str, means: dict[int, float], images: ImageSet, conditions: dict[str, str], reason: str | None
    ) -> Scores:
        """The mean over drawings of one value each."""
        if reason is not None:
            return self.measure(key, None, images, conditions, reason=reason)
        values = np.array(list(means.values()))
        samples = bootstrap_means(values, np.arange(len(values)), self.num_bootstrap_samples)
        interval = percentile_interval(samples, len(values))
        return self.measure(key, float(values.mean()), images, conditions, interval)

    def photo_diversity(self, photos: ImageSet) -> Scores:
        """Distances between random photos, and between random photos of one class."""
        conditions = {"pairs": "random photos", "normalisation": "unit", **self.evaluator.feature_conditions}
        value, samples = random_pair_distance(photos.features, None, self.num_bootstrap_samples)
        interval = percentile_interval(samples, len(photos))
        scores = self.measure("pairwise_distance", value, photos, conditions, interval)
        return scores | self.same_class_distance(photos, {"pairs": "random photos"})

    def same_class_distance(self, images: ImageSet, pairs: dict[str, str]) -> Scores:
        """Distance between two images of one class, of one drawing or of two; an interval for images of one drawing each."""
        labels, key = np.asarray(images.labels), "pairwise_distance_same_class"
        same = labels[:, None] == labels[None, :]
        conditions = {**pairs, "normalisation": "unit", **self.evaluator.feature_conditions}
        if same.sum() == len(images):
            return self.measure(key, None, images, conditions, reason="no class has two images")
        are_independent = len(np.unique(images.groups)) == len(images)
        num_samples = self.num_bootstrap_samples if are_independent else 0
        value, samples = random_pair_distance(images.features, same, num_samples)
        return self.measure(key, value, images, conditions, percentile_interval(samples, len(images)))

    # -- memorisation

    def training_distances(self, images: ImageSet) -> np.ndarray:
        """Distance of unit-normalized features from the nearest training photo, mirrored or not, `[N]`."""
        keys = F.normalize(self.train.features, dim=1)
        both = [nearest(F.normalize(f, dim=1), keys)[0] for f in (images.features, images.mirrored_features)]
        return torch.minimum(*both)[:, 0].numpy()

    def memorisation(self, images: ImageSet) -> Scores:
        """Distances from the nearest training photo, and how many are smaller than real photos' usually are."""
        against = {"reference": f"{len(self.train)} training photos and their mirror images"}
        distances = self.training_distances(images)
        conditions = {**self.evaluator.feature_conditions, "normalisation": "unit", **against}
        scores = self.measure_mean("nearest_training_distance", distances, images, conditions)
        keys = thumbnails(self.train.pixels)
        both = [nearest(thumbnails(pixels), keys)[0] for pixels in (images.pixels, images.pixels.flip(-1))]
        pixel_distances = torch.minimum(*both)[:, 0].numpy() / math.sqrt(keys.shape[1])
        more = {"resize": f"squash4:3 to {THUMBNAIL_SIDE}px", "unit": "root mean square of [0, 1]", **against}
        scores |= self.measure_mean("nearest_training_pixel_distance", pixel_distances, images, more)
        if self.near_copy_limit is None:
            reason = "no reference photo is of a drawn class"
            return scores | self.measure("near_copy_share", None, images, conditions, reason=reason)
        share = f"{NEAR_COPY_QUANTILE:.0%} of {len(self.drawn_reference)} {self.drawn_reference.name} are nearer"
        more = {"limit": f"{self.near_copy_limit:.4g}, {share}", **conditions}
        return scores | self.measure_mean("near_copy_share", distances < self.near_copy_limit, images, more)

    # -- what is watched, not judged by

    def perceptual_sketch_distance(self, images: ImageSet, distances: np.ndarray) -> Scores:
        """L_p by the model's own networks, which losses and guidance use."""
        conditions = {"networks": "P and F_s of the model, which its losses use"}
        return self.measure_mean("perceptual_sketch_distance", distances, images, conditions)

    def cost(self, images: ImageSet) -> Scores:
        """Measure what an image took to make; left out where the files do not say."""
        costs = [cost for cost in images.costs if cost is not None]
        if not costs or len(costs) < len(images):
            return {}
        seconds, machines = np.array([c["seconds"] for c in costs]), Counter(str(c.get("machine")) for c in costs)
        batches = sorted({int(c.get("batch_size", 1)) for c in costs})
        made = {"machine": " and ".join(machines), "batch": f"{batches[0]}-{batches[-1]}"}
        evaluations = np.array([sum(c["network_evaluations"].values()) for c in costs])
        mean = {
            k: np.mean([c["network_evaluations"].get(k, 0) for c in costs]) for k in costs[0]["network_evaluations"]
        }
        parts = {"forwards": ", ".join(f"{count:.4g} of {name}" for name, count in sorted(mean.items()))}
        spread = {"value": "median", "interval": "95% of the images", **made}
        interval = tuple(float(value) for value in np.percentile(seconds, [2.5, 97.5]))
        return {
            **self.measure("network_evaluations", float(evaluations.mean()), images, parts),
            **self.measure("seconds_per_image", float(np.median(seconds)), images, spread, cast(Any, interval)),
            **self.peak_memory(images, costs),
        }

    def peak_memory(self, images: ImageSet, costs: list[dict[str, Any]]) -> Scores:
        """Peak memory of a batch: what was allocated on a GPU, or what a fresh process needed beyond the loaded model."""
        conditions, value, reason = {}, None, None
        if all("peak_memory" in cost for cost in costs):
            value = max(cost["peak_memory"] for cost in costs)
            conditions = {"batch": str(max(cost["batch_size"] for cost in costs)), "memory": "allocated on the GPU"}
        elif images.memory is not None:
            value, reason = images.memory["peak_memory"], images.memory.get("reason")
            conditions = {"batch": str(images.memory["batch_size"]), "memory": "resident, beyond the loaded model"}
        else:
            return {}
        mebibytes = None if value is None else value / 2**20
        return self.measure("peak_memory", mebibytes, images, conditions, reason=reason)


def make_noise(images: ImageSet, seed: int = 0, side: int | None = None) -> ImageSet:
    """Uniform noise instead of a system's images, of `side` pixels or theirs: what every metric says about nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = images.pixels.shape if side is None else (len(images), 3, side, side)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageSet("noise", pixels, images.labels, images.groups, [])
