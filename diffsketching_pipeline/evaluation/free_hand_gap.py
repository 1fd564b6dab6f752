# SPDX-License-Identifier: Apache-2.0
"""The free-hand gap: each metric on human drawings minus the same on contours of photos."""

import json
import math
from pathlib import Path
from typing import Any

from diffsketching_pipeline.evaluation.measurements import METRICS, Measurement, Scores, base_metric


COSTS = ("network_evaluations", "seconds_per_image", "peak_memory")


def read_contour_metrics(path: str, evaluator: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    The numbers by system and metric of an evaluation on contours.

    Args:
        path: its `metrics.json`.
        evaluator: what the judge must be, see `Evaluator.settings`.

    Raises:
        ValueError: it is no such file, or its numbers are by another evaluation network or at another size.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        systems, judge = dict(content["systems"]), dict(content["settings"]["evaluator"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`contour_metrics` must be a `metrics.json` of evaluate.py, but {path!r} is none."
        ) from error
    for name in {**evaluator, **judge}:
        if judge.get(name) != evaluator.get(name):
            raise ValueError(
                f"`contour_metrics` has numbers of another evaluation network ({name}: {judge.get(name)} in the place of"
                f" {evaluator.get(name)}): evaluate the contours again."
            )
    return systems


def difference_interval(
    first: float, first_interval: tuple[float, float], second: float, second_interval: tuple[float, float]
) -> tuple[float, float]:
    """
    95% interval of `first - second`, two independent estimates with intervals of their own, which need not be symmetric:
    the method of variance estimates recovery (Zou & Donner, 2008).
    """
    value = first - second
    below = math.hypot(first - first_interval[0], second_interval[1] - second)
    above = math.hypot(first_interval[1] - first, second - second_interval[0])
    return value - below, value + above


def free_hand_gap(human: Scores, contours: dict[str, dict[str, Any]]) -> Scores:
    """
    The gap of one system in every metric that both evaluations have; costs have none.

    Args:
        human: its measurements on human drawings.
        contours: its entry in the `metrics.json` of the contours.
    """
    gaps: Scores = {}
    for key, ours in human.items():
        theirs = contours.get(key)
        if key in COSTS or theirs is None:
            continue
        conditions = {**ours.conditions, "contours": f"{theirs['n']} images"}
        gap = Measurement(
            f"{METRICS[base_metric(key)][0]}, human drawings minus contours", None, ours.n, conditions=conditions
        )
        if ours.value is None or theirs["value"] is None:
            where = "human drawings" if ours.value is None else "contours"
            gap.reason = f"none on {where}: {ours.reason if ours.value is None else theirs['reason']}"
        else:
            gap.value = ours.value - theirs["value"]
            if ours.interval is not None and theirs["interval"] is not None:
                gap.interval = difference_interval(ours.value, ours.interval, theirs["value"], theirs["interval"])
        gaps[key] = gap
    return gaps
