# SPDX-License-Identifier: Apache-2.0
"""The command `invert`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from diffsketching_pipeline.cli.options import (
    BUNDLED_SIZE,
    Device,
    Model,
    OutputDir,
    Overwrite,
    check_labels,
    check_output,
    labels_for_each,
    unique_names,
    user_errors,
)
from diffsketching_pipeline.cli.running import load_pipeline, progress
from diffsketching_pipeline.cli.writing import where_written, write_atomically, write_metadata
from diffsketching_pipeline.results import class_record, contact_sheet, file_record, model_record, png


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
            write_metadata(metadata_path, records, weights)
            advance(1)
    for paths in files.values():
        print(where_written(paths[-1]))
