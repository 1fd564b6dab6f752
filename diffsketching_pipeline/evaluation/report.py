# SPDX-License-Identifier: Apache-2.0
"""The reports that `evaluate.py` writes: tables, JSON and sheets of pictures."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from diffsketching_pipeline.evaluation.image_sets import Drawing, ImageSet, save_png
from diffsketching_pipeline.evaluation.measurements import METRICS, Measurement, Scores, base_metric
from diffsketching_pipeline.evaluation.metrics import nearest


class Tile(NamedTuple):
    """A picture with a caption under it."""

    image: Image.Image
    caption: str = ""
    color: str = "black"


TILE, CAPTION = 96, 14


def draw_sheet(rows: Sequence[Sequence[Tile]], num_columns: int = 1) -> Image.Image:
    """Rows of tiles as one picture, the rows in `num_columns` columns, filled from the top."""
    length, font = max(len(row) for row in rows), ImageFont.load_default(size=11)
    per_column = -(-len(rows) // num_columns)
    cell, gap = (TILE + 4, TILE + CAPTION + 4), 12
    size = (num_columns * (length * cell[0] + gap), per_column * cell[1])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        left, top = (i // per_column) * (length * cell[0] + gap), (i % per_column) * cell[1]
        for k, tile in enumerate(row):
            smaller = max(tile.image.size) > TILE
            filtering = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
            picture = ImageOps.contain(tile.image.convert("RGB"), (TILE, TILE), filtering)
            sheet.paste(picture, (left + k * cell[0], top))
            caption = tile.caption
            while caption and draw.textlength(caption, font) > TILE:
                caption = caption[:-1]
            draw.text((left + k * cell[0], top + TILE), caption, fill=tile.color, font=font)
    return sheet


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def drawing_rows(
    images: ImageSet, drawings: list[Drawing], sketches: Tensor, labels: Sequence[str]
) -> dict[int, list[Tile]]:
    """By drawing: the drawing as the model sees it, then its images with what the evaluation network takes them for."""
    rows: dict[int, list[Tile]] = {}
    predicted = [labels[i] for i in images.probabilities.argmax(-1).tolist()] if labels else [""] * len(images)
    for i, group in enumerate(images.groups.tolist()):
        if group not in rows:
            drawing = drawings[group]
            page = ((sketches[group, 0] + 1) * 127.5).round().byte().numpy()
            rows[group] = [Tile(Image.fromarray(page), f"{drawing.label} {drawing.name}")]
        color = "darkgreen" if predicted[i] == images.labels[i] else "crimson"
        rows[group].append(Tile(images.image(i), predicted[i], color))
    return rows


def write_contact_sheets(
    images: ImageSet, drawings: list[Drawing], sketches: Tensor, labels: Sequence[str], folder: Path
) -> None:
    """One sheet for each class and one of all (at most 120 drawings of them), rows of `drawing | images`."""
    rows = drawing_rows(images, drawings, sketches, labels)
    for label in sorted({drawings[group].label for group in rows}):
        members = [row for group, row in rows.items() if drawings[group].label == label]
        save_png(draw_sheet(members), folder / f"{label}.png")
    chosen = [list(rows.values())[i] for i in evenly_spaced(len(rows), 120)]
    length = max(len(row) for row in chosen)
    save_png(draw_sheet(chosen, max(1, round(math.sqrt(len(chosen) / length)))), folder / "all.png")


def write_nearest_sheet(images: ImageSet, train: ImageSet, path: Path) -> None:
    """Images beside the three training photos nearest to them: the 16 nearest of all, then a fair sample by distance."""
    count = min(3, len(train))
    keys = F.normalize(train.features, dim=1)
    distances, indices = nearest(F.normalize(images.features, dim=1), keys, count)
    mirrored, mirrored_indices = nearest(F.normalize(images.mirrored_features, dim=1), keys, count)
    closer = (mirrored[:, :1] < distances[:, :1]).expand_as(distances)
    distances, indices = torch.where(closer, mirrored, distances), torch.where(closer, mirrored_indices, indices)
    order = distances[:, 0].argsort().tolist()
    ranks = sorted({*range(min(16, len(order))), *evenly_spaced(len(order), 32)})
    rows = []
    for i in (order[rank] for rank in ranks):
        row = [Tile(images.image(i), images.labels[i])]
        for distance, k in zip(distances[i].tolist(), indices[i].tolist(), strict=True):
            photo = Image.fromarray(train.pixels[k].permute(1, 2, 0).numpy())
            row.append(Tile(photo, f"{distance:.3f} {train.labels[k]}"))
        rows.append(row)
    save_png(draw_sheet(rows, 3), path)


def format_measurement(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    if measurement.value is None:
        return "–"
    text = f"{measurement.value:.3g}"
    if measurement.interval is not None:
        text += " [{:.3g}, {:.3g}]".format(*measurement.interval)
    return f"{text} (N={measurement.n})"


def table_lines(scores: dict[str, Scores]) -> tuple[list[str], list[str]]:
    """A Markdown table of metrics by systems, and the full name of every number with the reason for a missing one."""
    lines = [f"| | {' | '.join(scores)} |", "| --- |" + " --- |" * len(scores)]
    names = []
    keys = dict.fromkeys(key for system in scores.values() for key in system)
    # Those of one metric by several judges stand together.
    for key in (key for metric in METRICS for key in keys if base_metric(key) == metric):
        title, better = METRICS[base_metric(key)]
        cells = [system.get(key) for system in scores.values()]
        judge = next((cell.judge for cell in cells if cell is not None), None)
        title += f" ({judge})" if judge is not None else ""
        arrow = "↑" if better == "higher" else "↓"
        lines.append(f"| {title} {arrow} | {' | '.join(format_measurement(cell) for cell in cells)} |")
        for name, cell in zip(scores, cells, strict=True):
            if cell is not None:
                names.append(f"- {name}: {cell.name}" + (f": none, {cell.reason}" if cell.value is None else ""))
    return lines, names


def make_table(scores: dict[str, Scores], gaps: dict[str, Scores] | None = None) -> str:
    """The report in Markdown: the table, the free-hand gap if it is known, then what each number is."""
    lines, names = table_lines(scores)
    note = (
        "Values with 95% bootstrap intervals over drawings (over photos for real ones). A share of exactly 0 or 1 leaves"
        " nothing to resample: its interval has no width. Fréchet distances and recall depend on N: compare them at one"
        " N, and with the training photos, which are as many as the first system's images and of the same classes."
    )
    parts = ["# Evaluation", "", note, "", *lines, ""]
    if gaps:
        gap_lines, gap_names = table_lines(gaps)
        about = "Each metric on human drawings minus the same on contours of photos."
        parts += ["## Free-hand gap", "", about, "", *gap_lines, ""]
        names += gap_names
    return "\n".join([*parts, "## What each number is", "", *names, ""])


def scores_to_json(scores: dict[str, Scores]) -> dict[str, Any]:
    return {
        system: {
            key: {"name": measurement.name, "better": METRICS[base_metric(key)][1], **asdict(measurement)}
            for key, measurement in measurements.items()
        }
        for system, measurements in scores.items()
    }
