# SPDX-License-Identifier: Apache-2.0
"""Numbers with all that they depend on, and the metrics that there are."""

from dataclasses import dataclass, field


METRICS = {
    "class_agreement": ("class agreement", "higher"),
    "class_agreement_reweighted": ("class agreement, classes as frequent as among the drawings", "higher"),
    "class_agreement_relative": ("class agreement relative to real photos'", "higher"),
    "conditioning_class_agreement": ("agreement with the class an image was generated with", "higher"),
    "conditioning_class_accuracy": ("share generated with the drawing's own class", "higher"),
    "retrieval_at_1": ("nearest-drawing retrieval R@1", "higher"),
    "retrieval_at_5": ("nearest-drawing retrieval R@5", "higher"),
    "contour_distance": ("contour distance to the drawing", "lower"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "frechet_distance_drawn_classes": ("Fréchet distance, classes of the drawings", "lower"),
    "kernel_distance": ("kernel distance", "lower"),
    "kernel_distance_drawn_classes": ("kernel distance, classes of the drawings", "lower"),
    "patch_distance": ("distance of colours and textures (sliced Wasserstein)", "lower"),
    "precision": ("improved precision", "higher"),
    "precision_drawn_classes": ("improved precision, classes of the drawings", "higher"),
    "recall": ("improved recall", "higher"),
    "recall_drawn_classes": ("improved recall, classes of the drawings", "higher"),
    "pairwise_distance": ("mean pairwise feature distance", "higher"),
    "pairwise_distance_same_class": ("mean pairwise feature distance within a class", "higher"),
    "pairwise_lpips": ("mean pairwise LPIPS", "higher"),
    "nearest_training_distance": ("nearest training photo, feature distance", "higher"),
    "nearest_training_pixel_distance": ("nearest training photo, pixel distance", "higher"),
    "near_copy_share": ("share of near copies of training photos", "lower"),
    "perceptual_sketch_distance": ("perceptual distance L_p to the drawing, eq. 5 (a loss, not a judge)", "lower"),
    "network_evaluations": ("network evaluations per image", "lower"),
    "seconds_per_image": ("seconds per image", "lower"),
    "peak_memory": ("peak memory while generating, MiB", "lower"),
}
"""Title and better direction of each metric, in the order of the table."""


@dataclass
class Measurement:
    """A number with everything it depends on; `value` is None for a `reason`."""

    title: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def judge(self) -> str | None:
        """The network that the number is of, or the side of the pictures where there is none; None for neither."""
        return self.conditions.get("extractor") or self.conditions.get("side")

    @property
    def name(self) -> str:
        """The name to quote the number with."""
        return f"{self.title} [{'; '.join(f'{k}: {v}' for k, v in {**self.conditions, 'N': self.n}.items())}]"


Scores = dict[str, Measurement]


def base_metric(key: str) -> str:
    """Return the entry of `METRICS` for a key: a second judge's numbers are `metric (judge)`, a second size's `metric (side)`."""
    return key.partition(" (")[0]


def add_judge(scores: Scores, others: Scores) -> Scores:
    """Scores with those of another judge, each under a key that names it; what does not depend on the judge stays as it is."""
    more = {
        f"{base_metric(key)} ({measured.judge})": measured
        for key, measured in others.items()
        if measured.judge is not None and (key not in scores or scores[key].judge != measured.judge)
    }
    return {**scores, **more}
