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
"""The `diffsketching` command. An error is one line on stderr and exit code 2, before any work is done."""

import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline import __version__


if TYPE_CHECKING:
    from PIL import Image

    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline

app = typer.Typer(
    name="diffsketching",
    help="Photos from drawings (DiffSketching, BMVC 2022).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_BUNDLED_SIZE = 64
_SHEET_TILE = 192
_SHEET_COLUMNS = 5
_CAPTION_HEIGHT = 22


class UserError(Exception):
    """Bad input: reported as one line."""


def main() -> None:
    """Entry point: turns what the user got wrong into one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        print("diffsketching: stopped; finished files are complete.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # typer ships its own click or uses the installed one, depending on its version; both have this method.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(error.format_message() or "see `diffsketching --help`"))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("diffsketching: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@contextmanager
def _user_errors(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """What the library refuses is the user's to mend; anything else stays a traceback."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def _version(value: bool) -> None:
    if value:
        print(f"diffsketching {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    drawings: Annotated[list[Path], typer.Argument(help="Drawings: PNG, JPEG, ... dark strokes on light paper.")],
    class_label: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Class by name or number: once for all drawings, or once per drawing. Guessed if not given."
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Photos per drawing.")] = 4,
    steps: Annotated[Optional[int], typer.Option(help="Denoising steps. [default: the model's]")] = None,
    seed: Annotated[int, typer.Option(help="Photo k of each drawing uses seed + k.")] = 0,
    model: Annotated[Optional[str], typer.Option(help="Folder or hub id. [default: the bundled garments-64]")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for photos, sheets and metadata.json.")] = Path("outputs"),
    sketch_guidance_scale: Annotated[Optional[float], typer.Option(help="1.0 = off. [default: the model's]")] = None,
    classifier_guidance_scale: Annotated[
        Optional[float], typer.Option(help="0.0 = off. [default: the model's]")
    ] = None,
    perceptual_guidance_scale: Annotated[
        Optional[float], typer.Option(help="0.0 = off. [default: the model's]")
    ] = None,
    eta: Annotated[
        Optional[float], typer.Option(help="Fresh noise per step, 0 to 1; 0.0 = off. [default: the model's]")
    ] = None,
    strength: Annotated[float, typer.Option(help="1.0 starts from noise, less from the noised drawing.")] = 1.0,
    invert: Annotated[
        Optional[bool],
        typer.Option("--invert/--no-invert", help="Light strokes on dark? [default: detected]", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Photos computed at a time; does not change them.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace photos of an earlier run.")] = False,
) -> None:
    """Photos of each drawing: PNGs, a contact sheet per drawing, and metadata.json to reproduce each of them."""
    if num_images < 1:
        raise UserError(f"`--num-images` has to be at least 1 but is {num_images}.")
    if batch_size < 1:
        raise UserError(f"`--batch-size` has to be at least 1 but is {batch_size}.")
    if not 0 <= seed < 2**63 - num_images:
        raise UserError(f"`--seed` has to be a non-negative integer below 2**63 - num_images but is {seed}.")
    labels = _labels_per_drawing(class_label, len(drawings))
    names = _unique_names(drawings)
    files = {name: [output_dir / f"{name}_{seed + k}.png" for k in range(num_images)] for name in names}
    sheets = {name: output_dir / f"{name}_sheet.png" for name in names}
    _check_output(output_dir, [*(path for paths in files.values() for path in paths), *sheets.values()], overwrite)
    metadata_path = output_dir / "metadata.json"
    earlier = _read_metadata(metadata_path)

    from diffsketching_pipeline.image_processor import SketchProcessor

    with _user_errors():
        # Every drawing is read before the model is loaded: a bad one is an error at once.
        sketches = [SketchProcessor(_BUNDLED_SIZE).preprocess(path, invert=invert) for path in drawings]
    pipe = _load_pipeline(model, device)
    with _user_errors():
        for label in labels:
            if label is not None:
                pipe.get_label_id(label)
        sketches = [
            pipe.sketch_processor.preprocess(path, pipe.height, pipe.width, invert=invert) for path in drawings
        ]

    settings = {
        "num_inference_steps": steps,
        "sketch_guidance_scale": sketch_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale,
        "perceptual_guidance_scale": perceptual_guidance_scale,
        "eta": eta,
        "strength": strength,
    }
    records: list[dict[str, Any]] = []
    with _progress(len(drawings) * num_images) as advance:
        for drawing, name, label, sketch in zip(drawings, names, labels, sketches, strict=True):
            with _user_errors():
                images, used, probability = _generate_one(
                    pipe, sketch, label, range(seed, seed + num_images), batch_size, settings, advance
                )
            for image, path in zip(images, files[name], strict=True):
                _write_atomically(path, _png(image))
            caption = _caption(drawing.name, used, probability, predicted=label is None)
            sheet = _contact_sheet(sketch, images, range(seed, seed + num_images), caption)
            _write_atomically(sheets[name], _png(sheet))
            records += _records(pipe, drawing, files[name], seed, label, used, probability, settings, invert)
            merged = {**earlier, **{record["file"]: record for record in records}}
            document = {"model": _model_record(pipe, model), "versions": _versions(), "images": list(merged.values())}
            _write_atomically(metadata_path, json.dumps(document, indent=2).encode())
    for sheet_path in sheets.values():
        print(sheet_path)


def _labels_per_drawing(class_label: list[str] | None, num_drawings: int) -> list[Any]:
    given: list[Any] = [int(label) if label.lstrip("-").isdigit() else label for label in class_label or []]
    if not given:
        return [None] * num_drawings
    if len(given) == 1:
        return given * num_drawings
    if len(given) != num_drawings:
        raise UserError(
            f"`--class-label` was given {len(given)} times for {num_drawings} drawings: give it once, or once per drawing."
        )
    return given


def _unique_names(drawings: list[Path]) -> list[str]:
    """File stems; with the folder's name in front where two drawings share a stem."""
    stems = [path.stem for path in drawings]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}-{stem}"
        for path, stem in zip(drawings, stems, strict=True)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two drawings are named {twice[0]!r}: their photos would overwrite each other; rename one.")
    return names


def _check_output(output_dir: Path, paths: list[Path], overwrite: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"`--output-dir` has to be a folder but '{output_dir}' is a file.")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"'{existing[0]}' exists already: choose another `--output-dir` or `--seed`, or pass `--overwrite`."
        )


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The records of earlier runs into the same folder, which are kept."""
    if not path.exists():
        return {}
    try:
        return {record["file"]: record for record in json.loads(path.read_text(encoding="utf-8"))["images"]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"'{path}' is not a metadata.json of this command: move it away, or choose another `--output-dir`."
        ) from error


def _load_pipeline(model: str | None, device: str) -> "DiffSketchingPipeline":
    import torch
    from accelerate import PartialState
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from diffsketching_pipeline import DiffSketchingPipeline, bundled_checkpoint

    with _user_errors((RuntimeError, ValueError)):
        target = PartialState().device if device == "auto" else torch.device(device)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _user_errors((ValueError, OSError)):
        pipe = DiffSketchingPipeline.from_pretrained(model or bundled_checkpoint())
    with _user_errors((RuntimeError, AssertionError)):
        pipe.to(target)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate_one(
    pipe: "DiffSketchingPipeline",
    sketch: Any,
    label: Any,
    seeds: range,
    batch_size: int,
    settings: dict[str, Any],
    advance: Callable[[float], None],
) -> tuple[list["Image.Image"], Any, float | None]:
    """All photos of one drawing, in batches; the class that was used, and its probability."""
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        size = len(batch)

        def on_step_end(pipe, step_index, timestep, callback_kwargs, size=size):
            advance(size / pipe.num_timesteps)
            return callback_kwargs

        out = pipe(
            sketch,
            class_labels=label,
            num_images_per_sketch=size,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
            callback_on_step_end=on_step_end,
            **settings,
        )
        images += out.images
    probability = None if out.class_probabilities is None else float(out.class_probabilities[0].max())
    return images, out.class_labels[0], probability


def _records(
    pipe: "DiffSketchingPipeline",
    drawing: Path,
    paths: list[Path],
    seed: int,
    label: Any,
    used: Any,
    probability: float | None,
    settings: dict[str, Any],
    invert: bool | None,
) -> list[dict[str, Any]]:
    digest = hashlib.sha256(drawing.read_bytes()).hexdigest()
    return [
        {
            "file": path.name,
            "drawing": str(drawing),
            "drawing_sha256": digest,
            "invert": invert,
            "seed": seed + k,
            "class_label": used,
            "class_predicted": label is None and used is not None,
            "class_probability": probability,
            "num_inference_steps": settings["num_inference_steps"] or pipe.recommended.get("num_inference_steps"),
            **pipe.guidance_scales,
            "eta": pipe.eta,
            "strength": settings["strength"],
            "scheduler": type(pipe.scheduler).__name__,
        }
        for k, path in enumerate(paths)
    ]


def _model_record(pipe: "DiffSketchingPipeline", model: str | None) -> dict[str, Any]:
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(pipe.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).numpy().tobytes())
    return {"name": model or "garments-64", "unet_sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "scikit-image")
    return {"diffsketching_pipeline": __version__, **{name: version(name) for name in packages}}


def _png(image: "Image.Image") -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that no reader ever sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write to '{path.parent}': {error.strerror}.") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes private files; a photo gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{total} photos", total=total)
        yield lambda amount: progress.advance(task, amount)


def _caption(drawing: str, used: Any, probability: float | None, predicted: bool) -> str:
    if used is None:
        return drawing
    return (
        f"{drawing}: {used} ({probability:.0%} sure)"
        if predicted and probability is not None
        else f"{drawing}: {used}"
    )


def _contact_sheet(sketch: Any, images: list["Image.Image"], seeds: range, caption: str) -> "Image.Image":
    """The drawing as the model saw it, then the photos with their seeds, enlarged to be looked at."""
    from PIL import Image, ImageDraw, ImageFont

    seen = Image.fromarray(((sketch[0, 0].numpy() + 1) * 127.5).astype("uint8")).convert("RGB")
    tiles = [(seen, "drawing"), *((image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True))]
    columns = min(len(tiles), _SHEET_COLUMNS)
    rows = -(-len(tiles) // columns)
    cell = _SHEET_TILE + _CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * (_SHEET_TILE + 4), _CAPTION_HEIGHT + rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((4, 3), caption, fill="black", font=font)
    for index, (image, text) in enumerate(tiles):
        x, y = index % columns * (_SHEET_TILE + 4) + 2, _CAPTION_HEIGHT + index // columns * cell
        scale = _SHEET_TILE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x, y))
        draw.text((x + 2, y + _SHEET_TILE + 2), text, fill="black", font=font)
    return sheet


@app.command()
def info(
    model: Annotated[
        Optional[str], typer.Argument(help="Folder or hub id. [default: the bundled garments-64]")
    ] = None,
) -> None:
    """A checkpoint's components, sizes, classes and recommended settings."""
    from rich.console import Console
    from rich.table import Table

    pipe = _load_pipeline(model, "cpu")
    console = Console()
    table = Table(title=model or "garments-64 (bundled)", title_justify="left")
    for column in ("component", "class", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=True)
    for name, component in pipe.components.items():
        parameters = getattr(component, "parameters", None)
        count = f"{sum(p.numel() for p in parameters()):,}" if parameters else ""
        table.add_row(name, "not in this checkpoint" if component is None else type(component).__name__, count)
    console.print(table)
    prediction_type, channels = pipe.scheduler.config.prediction_type, pipe.unet.config.in_channels
    kind = "photo + sketch" if channels == 4 else "photo only"
    console.print(f"size: {pipe.height}x{pipe.width}   input: {kind}   predicts: {prediction_type}", highlight=False)
    console.print(f"classes ({pipe.num_classes}): {', '.join(pipe.id2label.values()) or 'integers'}", highlight=False)
    recommended = "   ".join(f"{key}={value}" for key, value in pipe.recommended.items()) or "none"
    console.print(f"recommended: {recommended}", highlight=False)


@app.command()
def demo(
    model: Annotated[Optional[str], typer.Option(help="Folder or hub id. [default: the bundled garments-64]")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(help="[default: the first free one from 7860]")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, by Gradio's servers.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
) -> None:
    """A page to draw on, and to watch photos of the drawing appear; needs the extra `demo`."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("this needs Gradio: `pip install 'diffsketching_pipeline[demo]'`.")
    print(f"Loading {model or 'garments-64'} ...", flush=True)
    pipe = _load_pipeline(model, device)
    from diffsketching_pipeline.demo import Studio
    from diffsketching_pipeline.demo_page import launch

    with _user_errors((OSError,)):
        page = launch(Studio(pipe, model), host, port, share)
    print(f"Draw at {page.share_url or page.local_url}; Ctrl+C ends it.", flush=True)
    page.block_thread()


_MODEL_ARGUMENT = typer.Argument(help="Pipeline folder or hub id; `garments-64` is the bundled one.")
_CARD_OPTION = typer.Option(help="Markdown file for README.md. [default: the model's own]")
_METRICS_OPTION = typer.Option(help="metrics.json of training/evaluate.py, to be added to README.md.")
_LICENSE_OPTION = typer.Option(help="Licence of the weights for a new README.md, e.g. apache-2.0.")
_SHARD_OPTION = typer.Option(help="Largest weight file, e.g. 15MB.")
_DTYPE_OPTION = typer.Option(help="Type of the weights: float32, float16 or bfloat16.")
_FP16_OPTION = typer.Option("--fp16-variant", help='Also write float16 weights, for `variant="fp16"`.')


@app.command()
def export(
    model: Annotated[str, _MODEL_ARGUMENT],
    output_dir: Annotated[Path, typer.Argument(help="New folder.")],
    save_dtype: Annotated[str, _DTYPE_OPTION] = "float32",
    fp16_variant: Annotated[bool, _FP16_OPTION] = False,
    max_shard_size: Annotated[str, _SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], _CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], _METRICS_OPTION] = None,
    license: Annotated[Optional[str], _LICENSE_OPTION] = None,
) -> None:
    """Write a folder that loads anywhere: with this package, or with its own code where that is not installed."""
    from diffsketching_pipeline import export_pipeline
    from diffsketching_pipeline.files import check_output_dir

    with _user_errors((ValueError, OSError)):
        check_output_dir(output_dir)
        export_pipeline(
            _load_to_save(model, save_dtype),
            output_dir,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(output_dir)


@app.command()
def push(
    model: Annotated[str, _MODEL_ARGUMENT],
    repo_id: Annotated[str, typer.Argument(help="Repository, user/name; made if there is none.")],
    private: Annotated[
        Optional[bool], typer.Option("--private/--public", help="For a new repository. [default: the account's]")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch; made if there is none. [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose a pull request to main instead.")] = False,
    commit_message: Annotated[Optional[str], typer.Option(help="First line of the commit.")] = None,
    save_dtype: Annotated[str, _DTYPE_OPTION] = "float32",
    fp16_variant: Annotated[bool, _FP16_OPTION] = False,
    max_shard_size: Annotated[str, _SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], _CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], _METRICS_OPTION] = None,
    license: Annotated[Optional[str], _LICENSE_OPTION] = None,
) -> None:
    """Export a model and upload it as one commit, with the token of `hf auth login` or HF_TOKEN."""
    from diffsketching_pipeline import push_pipeline

    with _user_errors((ValueError, OSError)):
        address = push_pipeline(
            _load_to_save(model, save_dtype),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(address)


def _load_to_save(model: str, save_dtype: str) -> "DiffSketchingPipeline":
    """
    A pipeline on the CPU, in the type it is to be saved in.

    Raises:
        ValueError: for another type than the three.
    """
    if save_dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"`--save-dtype` has to be float32, float16 or bfloat16 but is {save_dtype!r}.")
    import torch

    bundled = model == "garments-64" and not Path(model).exists()
    pipe = _load_pipeline(None if bundled else model, "cpu")
    return pipe.to(getattr(torch, save_dtype))


@app.command("convert-guided-diffusion")
def convert_guided_diffusion_command(
    unet_checkpoint: Annotated[Path, typer.Option(help="Diffusion model: state dict, .pt or .safetensors.")],
    output_dir: Annotated[Path, typer.Option(help="New pipeline folder.")],
    classifier_checkpoint: Annotated[
        Optional[Path], typer.Option(help="Noisy classifier of the same project.")
    ] = None,
    flags: Annotated[Optional[Path], typer.Option(help="JSON file with the flags that built the checkpoints.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="64 | 128 | 256 | 512 | 256-uncond: published flags.")] = None,
    sketch_channel: Annotated[
        bool, typer.Option(help="Add an input channel for the drawing, to be fine-tuned.")
    ] = False,
) -> None:
    """Convert checkpoints of openai/guided-diffusion (ADM) to a pipeline folder."""
    if (flags is None) == (preset is None):
        raise UserError("give either `--flags` or `--preset`.")
    from diffsketching_pipeline.convert_guided_diffusion import convert_guided_diffusion

    with _user_errors((ValueError, OSError)):
        convert_guided_diffusion(
            unet_checkpoint,
            classifier_checkpoint,
            flags=flags,
            preset=preset,
            sketch_channel=sketch_channel,
            output_dir=output_dir,
        )
    print(output_dir)


@app.command("convert-photosketch")
def convert_photosketch_command(
    checkpoint: Annotated[Path, typer.Argument(help="Generator of mtli/PhotoSketch: latest_net_G.pth.")],
    output_dir: Annotated[Path, typer.Option(help="New folder for `PhotoSketcher.from_pretrained`.")],
    statistics: Annotated[
        str, typer.Option(help="per_sample (how the published tool runs) or running.")
    ] = "per_sample",
) -> None:
    """Convert a Photo-Sketching generator to a PhotoSketcher folder."""
    from diffsketching_pipeline.convert_photosketch import convert_photosketch

    with _user_errors((ValueError, OSError)):
        convert_photosketch(checkpoint, output_dir, statistics=statistics)
    print(output_dir)


if __name__ == "__main__":
    main()
