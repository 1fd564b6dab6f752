# SPDX-License-Identifier: Apache-2.0
"""The command `edit`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from diffsketching_pipeline.cli.options import (
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
    user_errors,
)
from diffsketching_pipeline.cli.running import generate_images, load_pipeline, progress, seed_tiles
from diffsketching_pipeline.cli.writing import where_written, write_atomically, write_metadata, write_photos
from diffsketching_pipeline.results import (
    caption,
    class_record,
    contact_sheet,
    file_record,
    model_record,
    png,
    sampling_record,
)


def edit(
    photo: Annotated[Path, typer.Argument(help="Photo of any size.")],
    sketch: Annotated[
        Optional[Path], typer.Option(help="New lines, drawn on a page of the photo's proportions.")
    ] = None,
    mask: Annotated[
        Optional[Path], typer.Option(help="Picture of the photo's size, white where it may change. [default: found]")
    ] = None,
    box: Annotated[
        Optional[str], typer.Option(help="left,top,right,bottom in pixels, in the place of a mask.")
    ] = None,
    class_label: Annotated[
        Optional[str], typer.Option(help="Class by name or number, or a mixture. Guessed if not given.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Results.")] = 4,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Result k uses seed + k.")] = 0,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    strength: Annotated[float, typer.Option(help="From 0, a small change, to 1.0, something new.")] = 0.9,
    mask_padding: Annotated[float, typer.Option(help="Growth of a mask that is found, share of the photo.")] = 0.05,
    crop_margin: Annotated[float, typer.Option(help="Surroundings the model sees, share of the mask.")] = 0.5,
    feather: Annotated[float, typer.Option(help="Width of the blended border, share of what it sees.")] = 0.05,
    resample_steps: Annotated[int, typer.Option(help="How often each step is taken; 1 is fastest.")] = 3,
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
    """Change a part of a photo into the shape of a drawing; outside the mask it stays as it is, bit for bit."""
    check_counts(num_images, batch_size, seed)
    if mask is not None and box is not None:
        raise UserError("`--mask` and `--box` say the same: give one of them.")
    seeds = range(seed, seed + num_images)
    files = {k: output_dir / f"{photo.stem}_{k}.png" for k in seeds}
    sheet_path, metadata_path = output_dir / f"{photo.stem}_sheet.png", output_dir / "metadata.json"
    check_output(output_dir, [*files.values(), sheet_path], overwrite)

    label = None if class_label is None else parse_label(class_label)
    negative = parse_negative_label(negative_class_label)
    mask_image = mask if box is None else _parse_box(box)

    from diffsketching_pipeline.images.reading import preprocess_mask, read_photo

    with user_errors():
        # Every file is read before the model is loaded: a bad one is an error at once.
        opened = {name: read_photo(path, name) for name, path in (("photo", photo), ("drawing", sketch)) if path}
        if mask is not None:
            preprocess_mask(mask, "mask")
    hint = read_color_hint(color_hint)
    pipe = load_pipeline(model, device, "DiffSketchingEditPipeline", dtype, threshold)
    check_labels(pipe, [label], negative)
    settings = {
        "num_inference_steps": steps,
        "strength": strength,
        "mask_padding": mask_padding,
        "crop_margin": crop_margin,
        "feather": feather,
        "num_resample_steps": resample_steps,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "sketch_abstraction": sketch_abstraction,
        "eta": eta,
        "negative_class_labels": negative,
        "color_hint": hint,
    }
    inputs = {"image": photo, "mask_image": mask_image, "sketch": sketch}
    with user_errors():
        shown = pipe.prepare_mask_image(**inputs, mask_padding=mask_padding)
    tiles = [(image, name) for name, image in opened.items()] + [(shown, "may change")]
    weights = model_record(pipe, model)
    records: list[dict[str, Any]] = []
    with progress(num_images) as advance:
        arguments = {"class_labels": label, **inputs, **settings}
        for batch, out in generate_images(pipe, seeds, batch_size, advance, **arguments):
            record = {
                **file_record("photo", photo),
                **file_record("drawing", sketch),
                "threshold": threshold,
                **file_record("mask", mask),
                "box": None if box is None else mask_image,
                **class_record(label, out),
                **sampling_record(pipe, settings),
            }
            records += write_photos(out.images, files, batch, record)
            write_metadata(metadata_path, records, weights)
            tiles += seed_tiles(out.images, batch)
    write_atomically(sheet_path, png(contact_sheet(tiles, caption(photo.name, record))))
    print(where_written(sheet_path))


def _parse_box(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise UserError(f"`--box` has to be left,top,right,bottom in pixels but is {text!r}.") from error
