# SPDX-License-Identifier: Apache-2.0
"""Plots what `evaluate.py` measured: faithfulness against realism over the guidance, and quality against steps.

    python training/plot_tradeoffs.py sweep/metrics.json --output_dir plots

Several `metrics.json` of the same drawings, number of images and evaluation network go into one plot. Systems that differ in
one setting only are joined by a line in its order; up and to the right is better. Bars are 95% intervals.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffsketching_pipeline.command_line import argument, parse_arguments, required, user_errors
from diffsketching_pipeline.evaluation.measurements import METRICS
from diffsketching_pipeline.files import staged_file
from diffsketching_pipeline.stopping import stoppable


GUIDANCE_SETTINGS = (
    "sketch_guidance_scale",
    "classifier_guidance_scale",
    "perceptual_guidance_scale",
    "sketch_abstraction",
    "strength",
    "eta",
)


@dataclass
class PlotArguments:
    """Arguments for what is plotted."""

    metrics: list[str] = required("one or more `metrics.json` of evaluate.py")
    output_dir: str = argument("plots", "where `faithfulness_realism.png` and `quality_steps.png` are written")
    faithfulness: str = argument("contour_distance", "the metric of faithfulness, as named in `metrics.json`")
    realism: str = argument("frechet_distance", "the metric of realism")


class Point(NamedTuple):
    """A system: its settings (none for images from elsewhere) and its measurements."""

    name: str
    settings: dict[str, Any]
    scores: dict[str, dict[str, Any]]


class Series(NamedTuple):
    """Points that differ in one setting, in its order; `setting` is None for a system that stands alone."""

    setting: str | None
    points: list[Point]

    @property
    def label(self) -> str:
        """The setting that is swept, and what the UNet is not told meanwhile; or the system's name."""
        if self.setting is None:
            return self.points[0].name
        withheld = self.points[0].settings.get("withhold")
        return self.setting + (f", without {' and '.join(reversed(withheld))}" if withheld else "")


def read_points(paths: Sequence[str], metrics: Sequence[str]) -> list[Point]:
    """
    The systems of all files that have a value of every one of `metrics`.

    Raises:
        ValueError: a file that `evaluate.py` did not write, files that cannot be compared, or nothing to plot.
    """
    points: list[Point] = []
    first: dict[str, Any] | None = None
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            settings, systems = content["settings"], content["systems"]
            compared = {name: settings[name] for name in ("evaluator", "drawings")}
            compared["images per drawing"] = settings["arguments"]["num_images_per_sketch"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"`metrics` must be files of evaluate.py, but {path!r} is none.") from error
        first = compared if first is None else first
        different = [name for name in compared if compared[name] != first[name]]
        if different:
            raise ValueError(
                f"`metrics` has {paths[0]!r} and {path!r}, which differ in {', '.join(different)}: numbers that cannot be"
                " compared do not belong into one plot."
            )
        for name, scores in systems.items():
            if all(scores.get(metric, {}).get("value") is not None for metric in metrics):
                points.append(Point(name, settings.get("systems", {}).get(name, {}), scores))
    if not points:
        raise ValueError(f"`metrics` has no system with a value of {' and '.join(metrics)}.")
    return points


def find_series(points: Sequence[Point], settings: Sequence[str]) -> list[Series]:
    """Every set of at least two points that agree in all but one of `settings`, then those that are in none."""
    series, joined = [], set()
    for setting in settings:
        groups: dict[str, dict[Any, Point]] = {}
        for point in points:
            if setting in point.settings:
                others = {name: value for name, value in point.settings.items() if name != setting}
                # A system that is there twice, in two files maybe, is one point.
                groups.setdefault(json.dumps(others, sort_keys=True), {}).setdefault(point.settings[setting], point)
        for group in groups.values():
            if len(group) > 1:
                series.append(Series(setting, [group[value] for value in sorted(group)]))
                joined |= {point.name for point in group.values()}
    return series + [Series(None, [point]) for point in points if point.name not in joined]


def bars(points: Sequence[Point], metric: str) -> tuple[list[float], list[list[float]]]:
    """Values of a metric and the lengths of their intervals below and above, as matplotlib takes them."""
    values, below, above = [], [], []
    for point in points:
        score = point.scores[metric]
        low, high = score["interval"] or (score["value"], score["value"])
        values.append(score["value"])
        below.append(max(0.0, score["value"] - low))
        above.append(max(0.0, high - score["value"]))
    return values, [below, above]


def label_axis(axes: Axes, which: str, metric: str) -> None:
    """Names an axis and turns it so that better is up or to the right."""
    title, better = METRICS[metric]
    getattr(axes, f"set_{which}label")(f"{title} ({better} is better)")
    if better == "lower":
        getattr(axes, f"invert_{which}axis")()


def plot_faithfulness_realism(points: Sequence[Point], faithfulness: str, realism: str) -> Figure:
    """One metric against the other, one line for each setting that was swept."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    # Noise would push everything else into a corner.
    for series in find_series([point for point in points if point.name != "noise"] or points, GUIDANCE_SETTINGS):
        (x, x_bars), (y, y_bars) = bars(series.points, realism), bars(series.points, faithfulness)
        style = "o-" if series.setting else "s"
        axes.errorbar(x, y, y_bars, x_bars, fmt=style, label=series.label, capsize=2, elinewidth=0.6)
        for point, left, bottom in zip(series.points, x, y, strict=True):
            text = f"{point.settings[series.setting]:g}" if series.setting else ""
            axes.annotate(text, (left, bottom), xytext=(4, 4), textcoords="offset points", fontsize=8)
    label_axis(axes, "x", realism)
    label_axis(axes, "y", faithfulness)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def plot_quality_steps(points: Sequence[Point], realism: str) -> Figure | None:
    """A metric against the number of steps, one line for each scheduler; None where steps were not swept."""
    swept = [series for series in find_series(points, ["num_inference_steps"]) if series.setting is not None]
    if not swept:
        return None
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for series in swept:
        steps = [point.settings["num_inference_steps"] for point in series.points]
        values, lengths = bars(series.points, realism)
        settings = series.points[0].settings
        label = f"{settings['scheduler']}, {settings['timestep_spacing']}"
        axes.errorbar(steps, values, lengths, label=label, marker="o", capsize=2, elinewidth=0.6)
    axes.set_xlabel("number of steps")
    label_axis(axes, "y", realism)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main(args: PlotArguments) -> list[Path]:
    """Writes the plots that the files allow; returns where."""
    for name in ("faithfulness", "realism"):
        if getattr(args, name) not in METRICS:
            raise ValueError(f"`{name}` must be one of {', '.join(METRICS)}, but is {getattr(args, name)!r}.")
    matplotlib.use("agg")
    points = read_points(args.metrics, [args.faithfulness, args.realism])
    figures = {
        "faithfulness_realism.png": plot_faithfulness_realism(points, args.faithfulness, args.realism),
        "quality_steps.png": plot_quality_steps(points, args.realism),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, Path(args.output_dir) / name)
            written.append(Path(args.output_dir) / name)
    return written


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    with user_errors(__file__):
        # The files come first and without a name.
        words = sys.argv[1:]
        if words and not words[0].startswith("-"):
            words = ["--metrics", *words]
        written = main(parse_arguments(PlotArguments, __doc__, words))
    print(*written, sep="\n")


if __name__ == "__main__":
    with stoppable(__file__):
        run()
