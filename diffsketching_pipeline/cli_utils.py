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
"""What the commands share: options, checks before any work, models, batches, and files that are written whole or not."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline import __version__
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.manifest import weights_sha256


if TYPE_CHECKING:
    from PIL import Image

BUNDLED_SIZE = 64
_SHEET_TILE = 192
_SHEET_COLUMNS = 5
_CAPTION_HEIGHT = 22


class DtypeName(str, Enum):
    """A type of weights that a command takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Steps = Annotated[Optional[int], typer.Option("--steps", help="Denoising steps. [default: the model's]")]
Model = Annotated[Optional[str], typer.Option("--model", help="Folder or hub id. [default: the bundled garments-64]")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="Folder for pictures, sheets and metadata.json.")]
SketchScale = Annotated[
    Optional[float], typer.Option("--sketch-guidance-scale", help="1.0 = off. [default: the model's]")
]
ClassifierScale = Annotated[
    Optional[float], typer.Option("--classifier-guidance-scale", help="0.0 = off. [default: the model's]")
]
PerceptualScale = Annotated[
    Optional[float], typer.Option("--perceptual-guidance-scale", help="0.0 = off. [default: the model's]")
]
SketchAbstraction = Annotated[
    Optional[float],
    typer.Option("--sketch-abstraction", help="0.0 = trace the drawing, 1.0 = what it means. [default: the model's]"),
]
Eta = Annotated[
    Optional[float], typer.Option("--eta", help="Fresh noise per step, 0 to 1; 0.0 = off. [default: the model's]")
]
ColourHint = Annotated[
    Optional[list[str]],
    typer.Option("--colour-hint", help="A colour, several (a palette), or one picture with coarse strokes of colour."),
]
NegativeClass = Annotated[Optional[str], typer.Option("--negative-class-label", help="Class to move away from.")]
Invert = Annotated[
    Optional[bool],
    typer.Option("--invert/--no-invert", help="Light strokes on dark? [default: detected]", show_default=False),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Photos computed at a time; does not change them.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[
    DtypeName, typer.Option("--dtype", help="Type of the weights; bfloat16 is faster where the processor knows it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace pictures of an earlier run.")]


class UserError(Exception):
    """Bad input: reported as one line."""


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """What the library refuses is the user's to mend; anything else stays a traceback."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    """Refuses what `--num-images`, `--batch-size` and `--seed` cannot be."""
    if num_images < 1:
        raise UserError(f"`--num-images` has to be at least 1 but is {num_images}.")
    if batch_size < 1:
        raise UserError(f"`--batch-size` has to be at least 1 but is {batch_size}.")
    if not 0 <= seed < 2**63 - num_images:
        raise UserError(f"`--seed` has to be a non-negative integer below 2**63 - num_images but is {seed}.")


def parse_label(text: str) -> Any:
    """A class by name or number, or a mixture `name=weight,name=weight`, of `--class-label`."""
    if "=" not in text:
        return int(text) if text.lstrip("-").isdigit() else text
    mixture = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        try:
            mixture[parse_label(name.strip())] = float(weight)
        except ValueError as error:
            raise UserError(f"`--class-label` has {part!r}: a mixture is like shirt=0.7,dress=0.3.") from error
    return mixture


def parse_negative_label(text: str | None) -> Any:
    """The class by name or number of `--negative-class-label`, which takes no mixture."""
    if text is None:
        return None
    if "=" in text:
        raise UserError(f"`--negative-class-label` has to be one class but is {text!r}, a mixture.")
    return parse_label(text)


def labels_for_each(class_label: list[str] | None, count: int, what: str) -> list[Any]:
    """One label per input, from options that were given never, once or once per input."""
    given = [parse_label(text) for text in class_label or []]
    if not given:
        return [None] * count
    if len(given) == 1:
        return given * count
    if len(given) != count:
        raise UserError(
            f"`--class-label` was given {len(given)} times for {count} {what}: give it once, or once per"
            f" {what.removesuffix('s')}."
        )
    return given


def read_colour_hint(values: list[str] | None) -> Any:
    """A picture's path, or a palette, of `--colour-hint`; refuses what is neither before a model is loaded."""
    if not values:
        return None
    from diffsketching_pipeline.images.colours import are_colour_strokes, preprocess_colour_strokes

    # Colours have no suffix: a name that has one and is no file is misspelt.
    is_picture = len(values) == 1 and (Path(values[0]).is_file() or Path(values[0]).suffix[1:].isalnum())
    colour_hint = values[0] if is_picture else list(values)
    with user_errors():
        if are_colour_strokes(colour_hint):
            preprocess_colour_strokes(colour_hint, BUNDLED_SIZE, BUNDLED_SIZE)
    return colour_hint


def sketch_fit(colour_hint: Any) -> str | None:
    """The `fit` of [`SketchProcessor`]: beside strokes of colour a drawing keeps its place, as the pipeline has it."""
    from diffsketching_pipeline.images.colours import are_colour_strokes

    return "page" if are_colour_strokes(colour_hint) else None


def check_labels(pipe: Any, labels: Sequence[Any], negative: Any = None) -> None:
    """Refuses classes and mixtures that the model does not know."""
    with user_errors():
        for label in labels:
            if label is not None:
                pipe.get_class_shares(label)
        if negative is not None:
            pipe.get_label_id(negative, "negative_class_labels")


def unique_names(files: list[Path], what: str = "drawings") -> list[str]:
    """File stems; with the folder's name in front where two share a stem."""
    stems = [path.stem for path in files]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}-{stem}"
        for path, stem in zip(files, stems, strict=True)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two {what} are named {twice[0]!r}: their results would overwrite each other; rename one.")
    return names


def numbered_names(names: list[str], counts: list[int]) -> list[str]:
    """One name per drawing, from those of files that hold one (and keep theirs) or several."""
    return [
        name if count == 1 else f"{name}-{index}"
        for name, count in zip(names, counts, strict=True)
        for index in range(count)
    ]


def check_output(output_dir: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Refuses a folder that is a file, and files that are there and not to be replaced."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"`--output-dir` has to be a folder but '{output_dir}' is a file.")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"'{existing[0]}' exists already: choose another `--output-dir` or `--seed`, or pass `--overwrite`."
        )


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The records of earlier runs into the same folder, which are kept."""
    if not path.exists():
        return {}
    try:
        return {record["file"]: record for record in json.loads(path.read_text(encoding="utf-8"))["images"]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"'{path}' is not a metadata.json of this command: move it away, or choose another `--output-dir`."
        ) from error


def load_pipeline(
    model: str | None,
    device: str,
    class_name: str = "DiffSketchingPipeline",
    dtype: DtypeName = DtypeName.float32,
) -> Any:
    """The pipeline of that class, on the device and in that type, without progress bars of its own."""
    import torch
    from accelerate import PartialState
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    import diffsketching_pipeline

    with user_errors((RuntimeError, ValueError)):
        target = PartialState().device if device == "auto" else torch.device(device)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with user_errors((ValueError, OSError)):
        cls = getattr(diffsketching_pipeline, class_name)
        pipe = cls.from_pretrained(model or diffsketching_pipeline.bundled_checkpoint())
    # By the modules' own methods: diffusers warns of `to(dtype)`, and renames the argument of `from_pretrained`.
    casts = {DtypeName.float16: torch.nn.Module.half, DtypeName.bfloat16: torch.nn.Module.bfloat16}
    if dtype in casts:
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                casts[dtype](component)
    with user_errors((RuntimeError, AssertionError)):
        pipe.to(target, silence_dtype_warnings=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_images(
    pipe: Any, seeds: range, batch_size: int, advance: Callable[[float], None], **arguments: Any
) -> tuple[list["Image.Image"], Any]:
    """Photo k from `seeds[k]`, in batches, and the output of the last batch."""
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        out = pipe(
            num_images_per_sketch=len(batch),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
            callback_on_step_end=step_reporter(advance, len(batch)),
            **arguments,
        )
        images += out.images
    return images, out


def step_reporter(advance: Callable[[float], None], amount: float) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that advances a progress bar by `amount` in the course of one call."""

    def on_step_end(pipe, step_index, timestep, callback_kwargs):
        advance(amount / pipe.num_timesteps)
        return callback_kwargs

    return on_step_end


def file_record(role: str, path: Path | None) -> dict[str, Any]:
    """A file that a result was made from, by name and content."""
    if path is None:
        return {}
    return {role: str(path), f"{role}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def sampling_record(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the last call, with what the checkpoint recommends filled in."""
    return {
        **settings,
        "num_inference_steps": pipe.resolve_num_inference_steps(settings.get("num_inference_steps")),
        **pipe.guidance_scales,
        "sketch_abstraction": pipe.sketch_abstraction,
        "eta": pipe.eta,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def class_record(label: Any, out: Any) -> dict[str, Any]:
    """Which class the (first) result was made with, and whether it was guessed."""
    used = out.class_labels[0]
    probability = None if out.class_probabilities is None else float(out.class_probabilities[0].max())
    return {
        "class_label": used,
        "class_predicted": label is None and used is not None,
        "class_probability": probability,
    }


def write_metadata(
    path: Path, earlier: dict[str, dict[str, Any]], records: list[dict[str, Any]], model: dict[str, Any]
) -> None:
    """The records of this run beside those of earlier ones into the same folder; `model` is the [`model_record`]."""
    merged = {**earlier, **{record["file"]: record for record in records}}
    write_atomically(path, metadata(model, list(merged.values())))


def metadata(model: dict[str, Any], records: list[dict[str, Any]]) -> bytes:
    """The content of a metadata.json."""
    return json.dumps({"model": model, "versions": _versions(), "images": records}, indent=2).encode()


def model_record(pipe: Any, model: str | None) -> dict[str, Any]:
    """Which weights results were made with."""
    return {"name": model or "garments-64", "unet_sha256": weights_sha256(pipe.unet)}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "scikit-image")
    return {"diffsketching_pipeline": __version__, **{name: version(name) for name in packages}}


def png(image: "Image.Image") -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that no reader ever sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        if error.errno is None:
            raise  # not by the operating system
        raise UserError(f"cannot write to '{path.parent}': {error.strerror}.") from error


@contextmanager
def progress(total: int, what: str = "photos") -> Iterator[Callable[[float], None]]:
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
        task = progress.add_task(f"{total} {what}", total=total)
        yield lambda amount: progress.advance(task, amount)


def caption(name: str, record: dict[str, Any]) -> str:
    """What a sheet is headed with: the input, and the class it was made with."""
    used, probability = record["class_label"], record["class_probability"]
    if used is None:
        return name
    if record["class_predicted"] and probability is not None:
        return f"{name}: {used} ({probability:.0%} sure)"
    return f"{name}: {used}"


def sketch_image(sketch: Any) -> "Image.Image":
    """A drawing `[1, 1, height, width]` as the model sees it."""
    from PIL import Image

    return Image.fromarray(((sketch[0, 0].numpy() + 1) * 127.5).astype("uint8")).convert("RGB")


def contact_sheet(
    tiles: Sequence[tuple["Image.Image", str]], heading: str, columns: int = _SHEET_COLUMNS
) -> "Image.Image":
    """Pictures with a line of text below each, enlarged to be looked at."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(len(tiles), columns)
    rows = -(-len(tiles) // columns)
    tallest = max(round(_SHEET_TILE * image.height / max(image.size)) for image, _ in tiles)
    cell = tallest + _CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * (_SHEET_TILE + 4), _CAPTION_HEIGHT + rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((4, 3), heading, fill="black", font=font)
    for index, (image, text) in enumerate(tiles):
        x, y = index % columns * (_SHEET_TILE + 4) + 2, _CAPTION_HEIGHT + index // columns * cell
        scale = _SHEET_TILE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        tile = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y), tile)
        draw.text((x + 2, y + tallest + 2), text, fill="black", font=font)
    return sheet
