# SPDX-License-Identifier: Apache-2.0
"""The command `generate`."""

from pathlib import Path
from typing import Annotated, Any, Optional

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
    Invert,
    Model,
    NegativeClass,
    OutputDir,
    Overwrite,
    PerceptualScale,
    SketchAbstraction,
    SketchScale,
    Steps,
    Threshold,
    check_counts,
    check_labels,
    check_output,
    count_drawings,
    find_drawings,
    labels_for_each,
    numbered_names,
    parse_negative_label,
    read_color_hint,
    sketch_fit,
    unique_names,
    user_errors,
)
from diffsketching_pipeline.cli.running import generate_images, load_pipeline, progress, seed_tiles
from diffsketching_pipeline.cli.writing import where_written, write_atomically, write_metadata, write_photos
from diffsketching_pipeline.messages import brief
from diffsketching_pipeline.results import (
    caption,
    class_record,
    contact_sheet,
    file_record,
    model_record,
    png,
    sampling_record,
    sketch_image,
)


def generate(
    drawings: Annotated[
        list[Path],
        typer.Argument(
            help="Drawings: PNG, JPEG, ... dark strokes on light paper; SVG; ndjson of Quick, Draw! Of a folder, all in it."
        ),
    ],
    class_label: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Class by name or number, or a mixture like shirt=0.7,dress=0.3: once for all drawings, or once per"
            " drawing. Guessed if not given."
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Photos per drawing.")] = 4,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Photo k of each drawing uses seed + k.")] = 0,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    sketch_guidance_scale: SketchScale = None,
    classifier_guidance_scale: ClassifierScale = None,
    perceptual_guidance_scale: PerceptualScale = None,
    sketch_abstraction: SketchAbstraction = None,
    eta: Eta = None,
    strength: Annotated[float, typer.Option(help="1.0 starts from noise, less from the noised drawing.")] = 1.0,
    negative_class_label: NegativeClass = None,
    color_hint: ColorHint = None,
    invert: Invert = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Go on after a stop: leave drawings whose pictures are all there.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Name drawings that cannot be read, and go on with the others.")
    ] = False,
) -> None:
    """Photos of each drawing: PNGs, a contact sheet per drawing, and metadata.json to reproduce each of them."""
    check_counts(num_images, batch_size, seed)
    negative = parse_negative_label(negative_class_label)

    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    reader = SketchProcessor(BUNDLED_SIZE)
    # Every drawing is read before the model is loaded: bad ones are an error at once.
    counted = count_drawings(
        find_drawings(drawings), lambda path: reader.preprocess(path, invert=invert, threshold=threshold), skip_bad
    )
    drawings, counts = list(counted), list(counted.values())
    names = numbered_names(unique_names(drawings), counts)
    labels = labels_for_each(class_label, len(names), "drawings")
    seeds = range(seed, seed + num_images)
    files = {name: {k: output_dir / f"{name}_{k}.png" for k in seeds} for name in names}
    sheets = {name: output_dir / f"{name}_sheet.png" for name in names}
    pictures = {name: [*files[name].values(), sheets[name]] for name in names}
    made = {name for name in names if skip_existing and all(path.exists() for path in pictures[name])}
    check_output(output_dir, [path for name in names for path in pictures[name]], overwrite or skip_existing)
    metadata_path = output_dir / "metadata.json"

    hint = read_color_hint(color_hint)
    pipe = load_pipeline(model, device, dtype=dtype, threshold=threshold)
    check_labels(pipe, labels, negative)
    options = {"invert": invert, "fit": sketch_fit(hint)}
    with user_errors():
        sketches = [
            (path, index, sketch)
            for path in drawings
            for index, sketch in enumerate(
                pipe.sketch_processor.preprocess(path, pipe.height, pipe.width, **options).split(1)
            )
        ]

    settings = {
        "num_inference_steps": steps,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "sketch_abstraction": sketch_abstraction,
        "eta": eta,
        "strength": strength,
        "negative_class_labels": negative,
        "color_hint": hint,
    }
    weights = model_record(pipe, model)
    records: list[dict[str, Any]] = []
    captions = []
    with progress((len(names) - len(made)) * num_images) as advance:
        for (drawing, index, sketch), name, label in zip(sketches, names, labels, strict=True):
            if name in made:
                continue
            tiles = [(sketch_image(sketch), "drawing")]
            arguments = {"sketch": sketch, "class_labels": label, **settings}
            for batch, out in generate_images(pipe, seeds, batch_size, advance, **arguments):
                record = {
                    **file_record("drawing", drawing),
                    "drawing_index": index,
                    "invert": invert,
                    "threshold": threshold,
                    **class_record(label, out),
                    **sampling_record(pipe, settings),
                }
                records += write_photos(out.images, files[name], batch, record)
                write_metadata(metadata_path, records, weights)
                tiles += seed_tiles(out.images, batch)
            captions.append(caption(drawing.name, record))
            write_atomically(sheets[name], png(contact_sheet(tiles, captions[-1])))
    if made:
        typer.echo(f"{len(made)} of {len(names)} drawings have their pictures already.", err=True)
    for line in captions:
        typer.echo(brief(line), err=True)
    for sheet_path in sheets.values():
        print(where_written(sheet_path))
