# SPDX-License-Identifier: Apache-2.0
"""The command `interpolate`."""

import importlib.util
import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from diffsketching_pipeline.cli.options import (
    BUNDLED_SIZE,
    ClassifierScale,
    Device,
    Dtype,
    DtypeName,
    Eta,
    Model,
    OutputDir,
    Overwrite,
    PerceptualScale,
    SketchAbstraction,
    SketchScale,
    Steps,
    Threshold,
    UserError,
    check_labels,
    check_output,
    parse_label,
    unique_names,
    user_errors,
)
from diffsketching_pipeline.cli.running import load_pipeline, progress, step_reporter
from diffsketching_pipeline.cli.writing import where_written, write_atomically, write_metadata
from diffsketching_pipeline.results import contact_sheet, file_record, model_record, png, sampling_record


if TYPE_CHECKING:
    from PIL import Image


# Small frames are enlarged in films, which players show at their own size.
_FILM_SIDE = 256


def interpolate(
    keys: Annotated[list[Path], typer.Argument(help="Drawings in order (with --photos, photos); one with classes.")],
    photos: Annotated[bool, typer.Option("--photos", help="The files are photos, to be inverted.")] = False,
    class_label: Annotated[
        Optional[list[str]], typer.Option(help="Once for all, or once per key. Guessed if not given.")
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Frames in all.")] = 16,
    steps: Steps = None,
    seed: Annotated[
        Optional[list[int]], typer.Option(help="Noise: one seed for all keys, or once per key. [default: 0]")
    ] = None,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    film: Annotated[str, typer.Option(help="gif, or mp4 (needs `pip install imageio-ffmpeg`).")] = "gif",
    fps: Annotated[int, typer.Option(help="Frames per second of the film.")] = 8,
    sketch_guidance_scale: SketchScale = None,
    classifier_guidance_scale: ClassifierScale = None,
    perceptual_guidance_scale: PerceptualScale = None,
    sketch_abstraction: SketchAbstraction = None,
    eta: Eta = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    threshold: Threshold = None,
    overwrite: Overwrite = False,
) -> None:
    """The frames between drawings, photos or classes: PNGs, a film, a contact sheet and metadata.json."""
    if fps < 1:
        raise UserError(f"`--fps` has to be at least 1 but is {fps}.")
    if film not in ("gif", "mp4"):
        raise UserError(f"`--film` has to be gif or mp4 but is {film!r}.")
    if film == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError("`--film mp4` needs an encoder: `pip install imageio-ffmpeg`, or choose gif.")
    if photos and seed:
        raise UserError("`--seed` makes noise, and that of `--photos` comes from their inversion: give one of them.")
    if any(k < 0 for k in seed or []):
        raise UserError(f"`--seed` has to be a non-negative integer but is {min(seed or [])}.")
    name = "-".join(unique_names(keys, "keys"))
    files = [output_dir / f"{name}_{k:03d}.png" for k in range(max(0, num_frames))]
    sheet_path, film_path = output_dir / f"{name}_sheet.png", output_dir / f"{name}.{film}"
    metadata_path = output_dir / "metadata.json"
    check_output(output_dir, [*files, sheet_path, film_path], overwrite)

    import torch

    from diffsketching_pipeline.images.reading import preprocess_photos
    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    with user_errors():
        if photos:
            preprocess_photos(list(keys), BUNDLED_SIZE, BUNDLED_SIZE)
        else:
            SketchProcessor(BUNDLED_SIZE).preprocess(list(keys), threshold=threshold)
    labels = [parse_label(text) for text in class_label or []]
    pipe = load_pipeline(model, device, "DiffSketchingInterpolationPipeline", dtype, threshold)
    check_labels(pipe, labels)
    generators = [torch.Generator("cpu").manual_seed(k) for k in seed or [0]]
    settings = {
        "num_inference_steps": steps,
        "num_frames": num_frames,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "sketch_abstraction": sketch_abstraction,
        "eta": eta,
    }
    with user_errors(), progress(num_frames, "frames") as advance:
        out = pipe(
            **{"images" if photos else "sketches": keys},
            class_labels=labels[0] if len(labels) == 1 else labels or None,
            generator=None if photos else generators if len(generators) > 1 else generators[0],
            callback_on_step_end=step_reporter(advance, num_frames),
            **settings,
        )
    for image, path in zip(out.images, files, strict=True):
        write_atomically(path, png(image))
    write_atomically(film_path, _film(out.images, film, fps))
    tiles = [(image, f"frame {k}") for k, image in enumerate(out.images)]
    write_atomically(sheet_path, png(contact_sheet(tiles, f"{name}: {' - '.join(map(str, out.class_labels))}", 8)))
    record = {
        "keys": [file_record("file", path) for path in keys],
        "photos": photos,
        "threshold": threshold,
        "class_labels": out.class_labels,
        "seeds": None if photos else seed or [0],
        **sampling_record(pipe, settings),
    }
    records = [{"file": path.name, "frame": k, **record} for k, path in enumerate(files)]
    write_metadata(metadata_path, records, model_record(pipe, model))
    print(where_written(film_path))
    print(where_written(sheet_path))


def _film(frames: list["Image.Image"], kind: str, fps: int) -> bytes:
    """The content of a GIF or MP4 file that plays the frames."""
    from PIL import Image

    factor = max(1, round(_FILM_SIDE / max(frames[0].size)))
    size = (frames[0].width * factor, frames[0].height * factor)
    large = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    if kind == "gif":
        file = io.BytesIO()
        large[0].save(file, "GIF", save_all=True, append_images=large[1:], duration=round(1000 / fps), loop=0)
        return file.getvalue()
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory() as folder:
        return Path(export_to_video(large, os.path.join(folder, "film.mp4"), fps)).read_bytes()
