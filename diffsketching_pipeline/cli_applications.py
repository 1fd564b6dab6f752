# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The commands `edit`, `interpolate`, `matrix` and `invert`."""

import importlib.util
import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline.cli_utils import (
    BUNDLED_SIZE,
    BatchSize,
    ClassifierScale,
    ColourHint,
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
    UserError,
    caption,
    check_counts,
    check_labels,
    check_output,
    class_record,
    contact_sheet,
    file_record,
    generate_images,
    labels_for_each,
    load_pipeline,
    model_record,
    parse_label,
    parse_negative_label,
    png,
    progress,
    read_colour_hint,
    read_metadata,
    sampling_record,
    sketch_fit,
    sketch_image,
    step_reporter,
    unique_names,
    user_errors,
    write_atomically,
    write_metadata,
)


if TYPE_CHECKING:
    from PIL import Image

# Small frames are enlarged in films, which players show at their own size.
_FILM_SIDE = 256


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
    colour_hint: ColourHint = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    overwrite: Overwrite = False,
) -> None:
    """Change a part of a photo into the shape of a drawing; outside the mask it stays as it is, bit for bit."""
    check_counts(num_images, batch_size, seed)
    if mask is not None and box is not None:
        raise UserError("`--mask` and `--box` say the same: give one of them.")
    seeds = range(seed, seed + num_images)
    files = [output_dir / f"{photo.stem}_{k}.png" for k in seeds]
    sheet_path, metadata_path = output_dir / f"{photo.stem}_sheet.png", output_dir / "metadata.json"
    check_output(output_dir, [*files, sheet_path], overwrite)
    earlier = read_metadata(metadata_path)

    label = None if class_label is None else parse_label(class_label)
    negative = parse_negative_label(negative_class_label)
    mask_image = mask if box is None else _parse_box(box)

    from diffsketching_pipeline.images.reading import preprocess_mask, read_photo

    with user_errors():
        # Every file is read before the model is loaded: a bad one is an error at once.
        opened = {name: read_photo(path, name) for name, path in (("photo", photo), ("drawing", sketch)) if path}
        if mask is not None:
            preprocess_mask(mask, "mask")
    hint = read_colour_hint(colour_hint)
    pipe = load_pipeline(model, device, "DiffSketchingEditPipeline", dtype)
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
        "colour_hint": hint,
    }
    inputs = {"image": photo, "mask_image": mask_image, "sketch": sketch}
    with user_errors():
        shown = pipe.prepare_mask_image(**inputs, mask_padding=mask_padding)
        with progress(num_images) as advance:
            images, out = generate_images(pipe, seeds, batch_size, advance, class_labels=label, **inputs, **settings)
    record = {
        **file_record("photo", photo),
        **file_record("drawing", sketch),
        **file_record("mask", mask),
        "box": None if box is None else mask_image,
        **class_record(label, out),
        **sampling_record(pipe, settings),
    }
    for image, path in zip(images, files, strict=True):
        write_atomically(path, png(image))
    tiles = [(image, name) for name, image in opened.items()] + [(shown, "may change")]
    tiles += [(image, f"seed {k}") for image, k in zip(images, seeds, strict=True)]
    write_atomically(sheet_path, png(contact_sheet(tiles, caption(photo.name, record))))
    records = [{"file": path.name, "seed": k, **record} for path, k in zip(files, seeds, strict=True)]
    write_metadata(metadata_path, earlier, records, model_record(pipe, model))
    print(sheet_path)


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
    earlier = read_metadata(metadata_path)

    import torch

    from diffsketching_pipeline.images.reading import preprocess_photos
    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    with user_errors():
        if photos:
            preprocess_photos(list(keys), BUNDLED_SIZE, BUNDLED_SIZE)
        else:
            SketchProcessor(BUNDLED_SIZE).preprocess(list(keys))
    labels = [parse_label(text) for text in class_label or []]
    pipe = load_pipeline(model, device, "DiffSketchingInterpolationPipeline", dtype)
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
        "class_labels": out.class_labels,
        "seeds": None if photos else seed or [0],
        **sampling_record(pipe, settings),
    }
    records = [{"file": path.name, "frame": k, **record} for k, path in enumerate(files)]
    write_metadata(metadata_path, earlier, records, model_record(pipe, model))
    print(film_path)
    print(sheet_path)


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
    colour_hint: ColourHint = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
    overwrite: Overwrite = False,
) -> None:
    """One drawing in several classes (rows) from the same noise (columns): PNGs, one sheet and metadata.json."""
    check_counts(num_images, batch_size, seed)
    negative = parse_negative_label(negative_class_label)
    rows = [parse_label(text) for text in class_label or []]
    check_output(output_dir, [], overwrite)
    metadata_path, sheet_path = output_dir / "metadata.json", output_dir / f"{drawing.stem}_matrix.png"
    earlier = read_metadata(metadata_path)

    from diffsketching_pipeline.images.sketch_processor import SketchProcessor

    with user_errors():
        SketchProcessor(BUNDLED_SIZE).preprocess(drawing)
    hint = read_colour_hint(colour_hint)
    pipe = load_pipeline(model, device, dtype=dtype)
    labels = rows or list(pipe.id2label.values()) or list(range(pipe.num_classes))
    if not labels:
        raise UserError("this model has no classes: use `diffsketching generate`.")
    check_labels(pipe, labels, negative)
    seeds = range(seed, seed + num_images)
    files = [[output_dir / f"{drawing.stem}_{_slug(label)}_{k}.png" for k in seeds] for label in labels]
    check_output(output_dir, [*(path for row in files for path in row), sheet_path], overwrite)
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
        "colour_hint": hint,
    }
    weights, source = model_record(pipe, model), file_record("drawing", drawing)
    records: list[dict[str, Any]] = []
    tiles: list[tuple[Image.Image, str]] = []
    with progress(len(labels) * num_images) as advance:
        for label, row in zip(labels, files, strict=True):
            with user_errors():
                images, out = generate_images(
                    pipe, seeds, batch_size, advance, sketch=sketch, class_labels=label, **settings
                )
            record = {
                **source,
                **class_record(label, out),
                **sampling_record(pipe, settings),
            }
            for image, path, used_seed in zip(images, row, seeds, strict=True):
                write_atomically(path, png(image))
                records.append({"file": path.name, "seed": used_seed, **record})
            tiles += [
                (sketch_image(sketch), str(label)),
                *((image, f"seed {k}") for image, k in zip(images, seeds, strict=True)),
            ]
            write_metadata(metadata_path, earlier, records, weights)
    write_atomically(sheet_path, png(contact_sheet(tiles, drawing.name, num_images + 1)))
    print(sheet_path)


def invert(
    photos: Annotated[list[Path], typer.Argument(help="Photos; scaled and cropped to the model's size.")],
    class_label: Annotated[
        Optional[list[str]], typer.Option(help="Class: once for all photos, or once per photo. None if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps there and back; more lose less.")] = 50,
    iterations: Annotated[int, typer.Option(help="Fixed-point iterations per step; 0 is textbook DDIM.")] = 3,
    model: Model = None,
    output_dir: OutputDir = Path("outputs"),
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """The noise from which each photo comes back: a .safetensors (`noise`), the photo that comes back, and a sheet."""
    labels = labels_for_each(class_label, len(photos), "photos")
    names = unique_names(photos, "photos")
    files = {
        name: [output_dir / f"{name}{suffix}" for suffix in ("_noise.safetensors", "_back.png", "_sheet.png")]
        for name in names
    }
    check_output(output_dir, [path for paths in files.values() for path in paths], overwrite)
    metadata_path = output_dir / "metadata.json"
    earlier = read_metadata(metadata_path)

    import torch
    from safetensors.torch import save

    from diffsketching_pipeline.images.reading import preprocess_photos

    with user_errors():
        preprocess_photos(list(photos), BUNDLED_SIZE, BUNDLED_SIZE)
    pipe = load_pipeline(model, device)
    check_labels(pipe, labels)
    weights = model_record(pipe, model)
    records: list[dict[str, Any]] = []
    with progress(len(photos)) as advance:
        for photo, name, label in zip(photos, names, labels, strict=True):
            with user_errors():
                noise = pipe.invert(photo, label, num_inference_steps=steps, num_fixed_point_iterations=iterations)
                out = pipe(None, label, 1, steps, latents=noise, clip_sample=False, output_type="latent")
            # As the network is given it: what the way through a `vae` loses is no loss of the inversion.
            part = pipe.encode_photos(preprocess_photos(photo, pipe.height, pipe.width).to(noise.device))
            part, returned = pipe.decode_photos(part), pipe.decode_photos(out.images)
            psnr = float(10 * torch.log10(4 / (returned - part).square().mean()))
            content = save({"noise": noise.cpu().contiguous()})
            shown_pixels = torch.cat([part, returned]).clamp(-1, 1)
            given, back = pipe.image_processor.postprocess(shown_pixels, output_type="pil")
            shown = pipe.decode_latents(noise / 3, "pil")[0]
            tiles = [(given, "photo"), (shown, "noise"), (back, f"back, {psnr:.1f} dB")]
            record = {"psnr_db": round(psnr, 2), **file_record("photo", photo), **class_record(label, out)}
            record |= {"num_inference_steps": steps, "num_fixed_point_iterations": iterations}
            for path, data in zip(
                files[name], (content, png(back), png(contact_sheet(tiles, photo.name))), strict=True
            ):
                write_atomically(path, data)
            records.append({"file": files[name][0].name, **record})
            write_metadata(metadata_path, earlier, records, weights)
            advance(1)
    for paths in files.values():
        print(paths[-1])


def _parse_box(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise UserError(f"`--box` has to be left,top,right,bottom in pixels but is {text!r}.") from error


def _slug(label: Any) -> str:
    """A class or mixture as a part of a file's name."""
    if isinstance(label, dict):
        return "-".join(f"{name}{weight:g}" for name, weight in label.items())
    return str(label)


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
