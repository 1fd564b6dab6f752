# SPDX-License-Identifier: Apache-2.0
"""Classes and drawings: what each image of a batch is to follow, read from the arguments of a call and joined to one."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image, ImageOps

from diffsketching_pipeline.images.reading import is_number, preprocess_mask
from diffsketching_pipeline.messages import CONTROL_CHARACTERS, brief
from diffsketching_pipeline.splits import normalize_name


logger = logging.get_logger(__name__)


@dataclass
class Conditioning:
    """
    Hold what the network is told about each of the `batch_size` images of a batch.

    One prediction is made per row, and those of an image are averaged: a row is one of several drawings of an image, one
    class of a mixture, or one end of an interpolation.

    Args:
        class_labels (`torch.LongTensor` of shape `[num_rows]`, *optional*):
            Class index of each row; `None` for a network without classes.
        sketch (`torch.Tensor` of shape `[num_rows, 1, height, width]`, *optional*):
            Drawing of each row in pixels, -1 = stroke and +1 = paper; `None` for no drawing.
        owner (`torch.LongTensor` of shape `[num_rows]`, *optional*):
            Index of the image that each row belongs to, in any order; every image owns at least one. `None` when row `i`
            belongs to image `i`.
        null_class_labels (`torch.LongTensor` of shape `[batch_size]`, *optional*):
            What classifier-free guidance puts in the place of `class_labels` where it withholds the drawing: the index
            of "no class", so that it strengthens both, or of a class to move away from. `None` for a network without
            it: the class then stays.
        weights (`torch.Tensor` of shape `[num_rows, 1, 1, 1]` or `[num_rows, 1, height, width]`, *optional*):
            Share of each row in its image's prediction, at each place of x_t maybe; those of an image sum to 1. `None` for
            equal shares.
        sketch_abstraction (`torch.Tensor` of shape `[num_rows]`, *optional*):
            How far each drawing may be off, in [0, 1]: 0 is to be traced, 1 to be understood. `None` for 0; a network
            without a plane for it ignores it.
    """

    class_labels: torch.Tensor | None = None
    sketch: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    null_class_labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    sketch_abstraction: torch.Tensor | None = None


@dataclass
class Condition:
    """
    Hold what one result follows: its rows (see [`Conditioning`]) before they are joined to a batch.

    Attributes:
        class_labels: `[num_rows]`, or `None` without classes.
        sketch: `[num_rows, 1, height, width]` in pixels, or `None` without a drawing.
        weights: `[num_rows, 1, 1, 1]`, or of the size of x_t `[num_rows, 1, height, width]`; summing to 1.
        null_class_label: class where the drawing is withheld, or `None`.
        sketch_abstraction: how far the drawings may be off, in [0, 1].
    """

    class_labels: torch.Tensor | None
    sketch: torch.Tensor | None
    weights: torch.Tensor
    null_class_label: int | None
    sketch_abstraction: float = 0.0


def join_conditions(conditions: Sequence[Sequence[tuple[Condition, float]]]) -> Conditioning:
    """
    Return the [`Conditioning`] of a batch.

    Args:
        conditions: for each image the conditions it follows and their shares, which sum to 1. All have a class or none
            has, and the same for drawings.
    """
    parts = [(image, *entry) for image, entries in enumerate(conditions) for entry in entries]
    device = parts[0][1].weights.device

    def join(name: str) -> torch.Tensor | None:
        values = [getattr(condition, name) for _, condition, _ in parts]
        return None if values[0] is None else torch.cat(values)

    null = [entries[0][0].null_class_label for entries in conditions]
    weights = [condition.weights * share for _, condition, share in parts]
    if any(weight.shape[-1] > 1 for weight in weights):
        size = max(weight.shape[-2:] for weight in weights)
        weights = [weight.expand(-1, -1, *size) for weight in weights]
    abstraction = [condition.sketch_abstraction for _, condition, _ in parts for _ in range(len(condition.weights))]
    return Conditioning(
        class_labels=join("class_labels"),
        sketch=join("sketch"),
        owner=torch.tensor([image for image, c, _ in parts for _ in range(len(c.weights))], device=device),
        null_class_labels=None if None in null else torch.tensor(null, device=device),
        weights=torch.cat(weights),
        sketch_abstraction=torch.tensor(abstraction, device=device) if any(abstraction) else None,
    )


def read_id2label(id2label: Any, where: str = "This pipeline") -> dict[int, str]:
    """
    Return the name of each class, from a dict whose keys JSON may have turned into strings.

    Args:
        where: what has it, for errors.

    Raises:
        ValueError: unless the keys are 0 ... n-1, and the names texts without control characters.
    """
    if id2label is None:
        return {}
    try:
        names = {int(key): normalize_name(str(name)) for key, name in id2label.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: `id2label` must be a dict of integers to names, but got {brief(id2label)}."
        ) from error
    if sorted(names) != list(range(len(id2label))):
        raise ValueError(f"{where}: `id2label` must have the keys 0 ... n-1, but got {brief(list(id2label))}.")
    for name in names.values():
        if not name.strip() or CONTROL_CHARACTERS.search(name):
            raise ValueError(
                f"{where}: `id2label` must name classes without control characters, but got '{brief(name)}'."
            )
    return names


@dataclass(frozen=True)
class ClassVocabulary:
    """
    Know the classes that a user may name, and the index of each.

    Args:
        id2label (`dict[int, str]`): the name of each class, or empty where classes are integers only.
        num_classes (`int`): how many there are; 0 for a checkpoint without classes.
        null_class (`int`, *optional*): index of "no class", which no user may name.
    """

    id2label: dict[int, str]
    num_classes: int
    null_class: int | None

    @classmethod
    def of_components(
        cls, id2label: dict[int, str], num_class_embeds: int | None, num_classifier_classes: int
    ) -> "ClassVocabulary":
        """
        Return the classes of a checkpoint: those with names, else all that its `unet` embeds, else those of its `classifier`.

        Args:
            id2label: the names, or empty.
            num_class_embeds: that of the `unet`, one more than there are names where it knows "no class"; `None` without.
            num_classifier_classes: 0 without a `classifier`.
        """
        if not id2label:
            return cls({}, num_classifier_classes if num_class_embeds is None else num_class_embeds, None)
        return cls(id2label, len(id2label), len(id2label) if num_class_embeds == len(id2label) + 1 else None)

    def index_of(self, label: int | str, argument: str = "class_labels") -> int:
        """
        Return the index of a class given by name (case-insensitive) or index.

        Raises:
            ValueError: if there is no such class; names the argument and close classes.
        """
        if isinstance(label, str):
            names = {name.lower(): index for index, name in self.id2label.items()}
            wanted = normalize_name(label).lower()
            if wanted in names:
                return names[wanted]
            close = difflib.get_close_matches(wanted[:100], names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            known = ", ".join(self.id2label.values()) or "integers only: this checkpoint has no `id2label`"
            raise ValueError(
                f"`{argument}` has the unknown class '{brief(label)}': {hint}The classes are: {brief(known)}."
            )
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise ValueError(f"`{argument}` has to hold names, integers or None but has {label!r}.")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"`{argument}` has to be between 0 and {self.num_classes - 1} but has {int(label)}.")
        return int(label)

    def shares_of(self, label: Any) -> dict[int, float]:
        """
        Return class indices and their shares, which sum to 1, of a class or of a mixture such as `{"shirt": 2, "dress": 1}`.

        Raises:
            ValueError: if there is no such class, or the weights of a mixture are not numbers of at least 0 with a
                positive sum.
        """
        if not isinstance(label, Mapping):
            return {self.index_of(label): 1.0}
        weights = list(label.values())
        if not all(is_number(weight) and math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"`class_labels` has a mixture whose weights are not all numbers of at least 0: {label!r}."
            )
        if not sum(weights) > 0:
            raise ValueError(
                f"`class_labels` has a mixture whose weights do not sum to something positive: {label!r}."
            )
        shares: dict[int, float] = {}
        for name, weight in label.items():
            index = self.index_of(name)
            if weight > 0:
                shares[index] = shares.get(index, 0.0) + weight / sum(weights)
        return shares

    def shares_of_each(self, class_labels: Any, num_rows: int) -> list[dict[int, float] | None]:
        """
        Return the shares of the class of each result; `None` for one that is not named.

        Args:
            class_labels: one for all results, or a list of one per result.

        Raises:
            ValueError: if there are not as many labels as results, and as [`~ClassVocabulary.shares_of`].
        """
        labels = _one_per_result("class_labels", class_labels, num_rows, "sketch (or photo)")
        return [None if label is None else self.shares_of(label) for label in labels]

    def names_of(self, shares: dict[int, float] | None) -> Any:
        """Return what was used in a form that `class_labels` takes: a name or index, a mixture of them, or `None`."""
        if shares is None:
            return None
        names = {self.id2label.get(index, index): share for index, share in shares.items()}
        return next(iter(names)) if len(names) == 1 else names

    def null_indices(self, negative_class_labels: Any, num_rows: int) -> list[int | None]:
        """
        Return the class that takes the place of each result's own where guidance withholds its drawing.

        Raises:
            ValueError: if there is no such class, or not one per result.
        """
        negative = _one_per_result("negative_class_labels", negative_class_labels, num_rows, "sketch")
        return [
            self.null_class if label is None else self.index_of(label, "negative_class_labels") for label in negative
        ]


def as_list(class_labels: Any) -> Any:
    """Return a list of labels from any kind of sequence; one label as it is."""
    if torch.is_tensor(class_labels) or isinstance(class_labels, np.ndarray):
        return class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, (list, tuple)) else class_labels


def _one_per_result(argument: str, given: Any, num_rows: int, per: str) -> list[Any]:
    """Return a list of one label per result, from one for all of them or a sequence of as many."""
    labels = as_list(given)
    if not isinstance(labels, list):
        return [labels] * num_rows
    if len(labels) != num_rows:
        raise ValueError(f"`{argument}` has to have one entry per {per}, {num_rows}, but has {len(labels)}.")
    return labels


def classify_sketch(encoder: Any, sketch: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    Return p(y | s) `[num_classes]`, the mean over the drawings `[K, 1, height, width]` of one result. An encoder whose config
    names the `image_size` it was trained at is shown them at that size.

    Raises:
        ValueError: if the encoder knows another number of classes.
    """
    size = getattr(encoder.config, "image_size", None)
    if size is not None and sketch.shape[-1] != size:
        # By area no thin line is lost.
        sketch = F.interpolate(sketch, size=(size, size), mode="area")
    logits = encoder(sketch.to(encoder.dtype)).logits
    if logits.shape[1] != num_classes:
        raise ValueError(f"`sketch_encoder` knows {logits.shape[1]} classes but the checkpoint has {num_classes}.")
    return logits.float().softmax(dim=-1).mean(dim=0).cpu()


def find_class_shares(
    classes: ClassVocabulary,
    class_labels: Any,
    num_rows: int,
    predict: Sequence[Callable[[], torch.Tensor]] | None = None,
    ratio: float | None = None,
    needs_class: bool = False,
    max_entropy: float | None = None,
) -> tuple[list[dict[int, float] | None], torch.Tensor | None]:
    """
    Return the shares of the classes of each result, `None` for no class, and their probabilities `[num_rows, num_classes]`;
    `None` for a checkpoint without classes.

    Args:
        class_labels: as for the call.
        predict: of each result, what returns p(y | s) `[num_classes]` where no class is named.
        ratio: see [`guess_class`].
        needs_class: whether the network has no "no class".
        max_entropy: [`class_entropy`] above which a warning says that the drawing may be of none of the classes.

    Raises:
        ValueError: for an unknown class, a wrong number of labels, or no label where the network needs one.
    """
    shares = classes.shares_of_each(class_labels, num_rows)
    if classes.num_classes == 0:
        return shares, None
    probabilities = torch.zeros(num_rows, classes.num_classes)
    for row, mixture in enumerate(shares):
        if mixture is None and predict is not None:
            probabilities[row] = predict[row]()
            shares[row] = guess_class(probabilities[row], ratio)
            if max_entropy is not None and float(class_entropy(probabilities[row])) > max_entropy:
                best = f"{classes.names_of({int(probabilities[row].argmax()): 1.0})!r} ({float(probabilities[row].max()):.0%})"
                logger.warning(
                    f"Sketch {row} may be none of the {classes.num_classes} classes; the nearest is {best}. If it is one,"
                    " say which."
                )
        elif mixture is not None:
            probabilities[row, list(mixture)] = torch.tensor(list(mixture.values()))
        elif needs_class:
            raise ValueError(
                "`class_labels` is needed: this checkpoint's `unet` has no 'no class', and without a `sketch` and a"
                " `sketch_encoder` the class cannot be predicted."
            )
    return shares, probabilities


def class_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """
    Return the entropy of p(y | s) `[..., num_classes]` as a share of the largest possible one, `[...]` in [0, 1]: 0 where one
    class is certain, 1 where all are equally probable.
    """
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(max(2, probabilities.shape[-1]))


def guess_class(probabilities: torch.Tensor, ratio: float | None) -> dict[int, float]:
    """
    Return the best class of `[num_classes]` and its share, 1; or the two best in proportion, where the second has at least
    `ratio` of the best one's probability.
    """
    best, *others = probabilities.argsort(descending=True, stable=True).tolist()
    if ratio is None or not others or probabilities[others[0]] < ratio * probabilities[best]:
        return {int(probabilities.argmax()): 1.0}
    pair = [best, others[0]]
    return dict(zip(pair, (probabilities[pair] / probabilities[pair].sum()).tolist(), strict=True))


def read_sketch_masks(
    masks: Any, groups: Sequence[torch.Tensor] | None, size: tuple[int, int], scale_factor: int
) -> list[torch.Tensor] | None:
    """
    Read where each of several drawings of a result rules.

    Args:
        masks: one list per result with a mask for each of its drawings, see [`~images.reading.preprocess_mask`].
        groups: the drawings of each result, `[K_i, 1, height, width]`.
        size: height and width of the drawings.
        scale_factor: pixels per element of x_t along a side.

    Returns:
        `list[torch.Tensor]`: the share of each drawing at each place of x_t, `[K_i, 1, height, width]`, summing to 1; that
        of a latent is the mean over its pixels. `None` for equal shares, without masks or drawings.

    Raises:
        ValueError: if there is not one mask per drawing, or one cannot be read.
    """
    if masks is None or groups is None:
        return None
    shape = [len(group) for group in groups]
    if not isinstance(masks, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in masks):
        raise ValueError("`sketch_masks` has to be a list with, for each sketch, a list of a mask per drawing.")
    if [len(group) for group in masks] != shape:
        raise ValueError(
            f"`sketch_masks` has to have one mask per drawing, {shape} of them, but has"
            f" {[len(group) for group in masks]}."
        )
    shares = []
    for row, group in enumerate(masks):
        images = [preprocess_mask(mask, f"mask {k} of sketch {row}") for k, mask in enumerate(group)]
        fitted = [ImageOps.pad(image, size[::-1], Image.Resampling.BOX) for image in images]
        weights = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))[:, None] / 255
        total = weights.sum(dim=0)
        pixels = torch.where(total > 0, weights / total.clamp_min(1e-6), 1 / len(weights))
        shares.append(pixels if scale_factor == 1 else F.avg_pool2d(pixels, scale_factor))
    return shares


def make_conditions(
    classes: ClassVocabulary,
    labels: Sequence[dict[int, float] | None],
    groups: Sequence[torch.Tensor] | None = None,
    negative_class_labels: Any = None,
    sketch_masks: Sequence[torch.Tensor] | None = None,
    sketch_abstraction: float = 0.0,
    device: torch.device | str | None = None,
) -> list[Condition]:
    """
    Return what each result follows.

    Args:
        classes: those that may be named.
        labels: of each result the class indices and their shares; `None` for no class.
        groups: the drawings of each result, `[K_i, 1, height, width]`; `None` for no drawing.
        negative_class_labels: see [`ClassVocabulary.null_indices`].
        sketch_masks: share of each drawing of a result at each place of x_t, see [`read_sketch_masks`]; equal if left out.
        sketch_abstraction: that of all drawings, in [0, 1].
        device: of the tensors that are made.
    """
    known: list[dict] = [{classes.null_class: 1.0} if shares is None else shares for shares in labels]
    has_class = not any(None in shares for shares in known)
    null = classes.null_indices(negative_class_labels, len(labels)) if has_class else [None] * len(labels)
    conditions = []
    for row, shares in enumerate(known):
        drawings = None if groups is None else groups[row]
        count = 1 if drawings is None else len(drawings)
        class_shares = torch.tensor(list(shares.values()), device=device)
        equal = class_shares.new_full((count, 1, 1, 1), 1 / count)
        weights = equal if sketch_masks is None else sketch_masks[row].to(equal)
        conditions.append(
            Condition(
                torch.tensor(list(shares), device=weights.device).repeat(count) if has_class else None,
                None if drawings is None else drawings.repeat_interleave(len(shares), dim=0),
                weights.repeat_interleave(len(shares), dim=0) * class_shares.repeat(count).reshape(-1, 1, 1, 1),
                null[row],
                0.0 if drawings is None else sketch_abstraction,
            )
        )
    return conditions
