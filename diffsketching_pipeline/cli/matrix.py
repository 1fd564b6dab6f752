# SPDX-License-Identifier: Apache-2.0
"""The command `matrix`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline.cli.options import (
    BUNDLED_SIZE,
    BatchSize,
    ClassifierScale,
    ColorHint,
    Device,
    Dtype,
    DtypeName,
    Eta,
    Model,
    NegativeClass,
    OutputDir,
    Overwrite,
    PerceptualScale,
    SketchAbstraction,
    SketchScale,
    Steps,
    Threshold,
    UserError,
    check_counts,
    check_labels,
    check_output,
    parse_label,
    parse_negative_label,
    read_color_hint,
    sketch_fit,
    user_errors,
)
from diffsketching_pipeline.cli.running import generate_images, load_pipeline, progress, seed_tiles
from diffsketching_pipeline.cli.writing import where_written, write_atomically, write_metadata, write_photos
from diffsketching_pipeline.results import (
    class_record,
    contact_sheet,
    file_record,
    model_record,
    png,
    sampling_record,
    sketch_image,
)


if TYPE_CHECKING:
    from PIL import Image


def matrix(
    drawing: Annotated[Path, typer.Argument(help="Drawing: PNG, JPEG, ... dark strokes on light paper.")],
    class_label: Annotated[
        Optional[list[str]], typer.Option(help="A row: class or mixture; any number of times. [default: all classes]")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Columns.")] = 4,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Column k uses seed + k.")] = 0,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    sketch_guidance_scale: SketchScale = None,
    classifier_guidance_scale: ClassifierScale = None,
    perceptual_guidance_scale: PerceptualScale = None,
    sketch_abstraction: SketchAbstraction = None,
    eta: Eta = None,
    negative_class_label: NegativeClass = None,
    color_hint: ColorHint = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    threshold: Threshold = None,
    overwrite: Overwrite = False,
) -> None:
    """One drawing in several classes (rows) from the same noise (columns): PNGs, one sheet and metadata.json."""
    check_counts(num_images, batch_size, seed)
    negative = parse_negative_label(negative_class_label)
    rows = [parse_label(text) for text in class_label or []]
    check_output(output_dir, [], overwrite)
    metadata_path, sheet_path = output_dir / "metadata.json", output_dir / f"{drawing.stem}_matrix.png"

    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    with user_errors():
        SketchProcessor(BUNDLED_SIZE).preprocess(drawing, threshold=threshold)
    hint = read_color_hint(color_hint)
    pipe = load_pipeline(model, device, dtype=dtype, threshold=threshold)
    labels = rows or list(pipe.id2label.values()) or list(range(pipe.num_classes))
    if not labels:
        raise UserError("this model has no classes: use `diffsketching generate`.")
    check_labels(pipe, labels, negative)
    seeds = range(seed, seed + num_images)
    files = [{k: output_dir / f"{drawing.stem}_{_slug(label)}_{k}.png" for k in seeds} for label in labels]
    check_output(output_dir, [*(path for row in files for path in row.values()), sheet_path], overwrite)
    with user_errors():
        sketch = pipe.sketch_processor.preprocess(drawing, pipe.height, pipe.width, fit=sketch_fit(hint))
    settings = {
        "num_inference_steps": steps,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "sketch_abstraction": sketch_abstraction,
        "eta": eta,
        "negative_class_labels": negative,
        "color_hint": hint,
    }
    weights, source = model_record(pipe, model), file_record("drawing", drawing) | {"threshold": threshold}
    records: list[dict[str, Any]] = []
    tiles: list[tuple[Image.Image, str]] = []
    with progress(len(labels) * num_images) as advance:
        for label, row in zip(labels, files, strict=True):
            tiles.append((sketch_image(sketch), str(label)))
            arguments = {"sketch": sketch, "class_labels": label, **settings}
            for batch, out in generate_images(pipe, seeds, batch_size, advance, **arguments):
                record = {
                    **source,
                    **class_record(label, out),
                    **sampling_record(pipe, settings),
                }
                records += write_photos(out.images, row, batch, record)
                write_metadata(metadata_path, records, weights)
                tiles += seed_tiles(out.images, batch)
    write_atomically(sheet_path, png(contact_sheet(tiles, drawing.name, num_images + 1)))
    print(where_written(sheet_path))


def _slug(label: Any) -> str:
    """A class or mixture as a part of a file's name."""
    if isinstance(label, dict):
        return "-".join(f"{name}{weight:g}" for name, weight in label.items())
    return str(label)
