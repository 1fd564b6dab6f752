# SPDX-License-Identifier: Apache-2.0
"""The options that commands share, and checks of what they were given before any work is done."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diffsketching_pipeline.files import check_writable
from diffsketching_pipeline.messages import brief


if TYPE_CHECKING:
    from diffsketching_pipeline.pipeline_base import DiffSketchingMixin

BUNDLED_SIZE = 64
DRAWING_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".svg", ".ndjson")


class DtypeName(str, Enum):
    """A type of weights that a command takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Steps = Annotated[Optional[int], typer.Option("--steps", help="Denoising steps. [default: the model's]")]
Model = Annotated[
    Optional[str], typer.Option("--model", help="Folder, hub id or a bundled model. [default: garments-64]")
]
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

ColorHint = Annotated[
    Optional[list[str]],
    typer.Option("--color-hint", help="A color, several (a palette), or one picture with coarse strokes of color."),
]

NegativeClass = Annotated[Optional[str], typer.Option("--negative-class-label", help="Class to move away from.")]

Invert = Annotated[
    Optional[bool],
    typer.Option("--invert/--no-invert", help="Light strokes on dark? [default: detected]", show_default=False),
]

Threshold = Annotated[
    Optional[float],
    typer.Option("--threshold", help="Ink is darker than this share of its paper, 0 to 1. [default: found]"),
]

BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Photos computed at a time; changes them by rounding alone.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]

Dtype = Annotated[
    DtypeName, typer.Option("--dtype", help="Type of the weights; bfloat16 is faster where the processor knows it.")
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace pictures of an earlier run.")]


class UserError(Exception):
    """Bad input: reported as one line."""


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Raise what the library refuses as a `UserError`, for the user to mend; anything else stays a traceback."""
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


def read_color_hint(values: list[str] | None) -> Any:
    """A picture's path, or a palette, of `--color-hint`; refuses what is neither before a model is loaded."""
    if not values:
        return None
    from diffsketching_pipeline.images.colors import are_color_strokes, preprocess_color_strokes

    # Colors have no suffix: a name that has one and is no file is misspelt.
    is_picture = len(values) == 1 and (Path(values[0]).is_file() or Path(values[0]).suffix[1:].isalnum())
    color_hint = values[0] if is_picture else list(values)
    with user_errors():
        if are_color_strokes(color_hint):
            preprocess_color_strokes(color_hint, BUNDLED_SIZE, BUNDLED_SIZE)
    return color_hint


def sketch_fit(color_hint: Any) -> str | None:
    """The `fit` of [`SketchProcessor`]: beside strokes of color a drawing keeps its place, as the pipeline has it."""
    from diffsketching_pipeline.images.colors import are_color_strokes

    return "page" if are_color_strokes(color_hint) else None


def check_labels(pipe: "DiffSketchingMixin", labels: Sequence[Any], negative: Any = None) -> None:
    """Refuses classes and mixtures that the model does not know."""
    with user_errors():
        for label in labels:
            if label is not None:
                pipe.get_class_shares(label)
        if negative is not None:
            pipe.get_label_id(negative, "negative_class_labels")


def find_drawings(paths: Sequence[Path]) -> list[Path]:
    """
    Return the drawings given, with those in a folder, however deep, in its place and in the order of their names. Hidden files
    and other kinds are passed over.

    Raises:
        UserError: for a folder without drawings.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in DRAWING_SUFFIXES and p.is_file())
        inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not inside:
            raise UserError(f"the folder '{path}' holds no drawings ({', '.join(DRAWING_SUFFIXES)}).")
        found += inside
    return found


def count_drawings(files: Sequence[Path], read: Callable[[Path], Any], skip_bad: bool) -> dict[Path, int]:
    """
    Return how many drawings each file holds, by reading it.

    Raises:
        UserError: naming all files that cannot be read; with `skip_bad`, they are named on stderr and left out, and it is
            an error if no file is left.
    """
    counts: dict[Path, int] = {}
    bad: list[str] = []
    for path in files:
        try:
            counts[path] = len(read(path))
        except ValueError as error:
            bad.append(str(error))
    if bad and not (skip_bad and counts):
        raise UserError(bad[0] if len(bad) == 1 else f"{len(bad)} of {len(files)} drawings: " + " ".join(bad))
    for message in bad:
        typer.echo(brief(f"Skipped: {message}"), err=True)
    return counts


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
    """
    Refuses a folder that is a file or cannot be written to, files that are there and not to be replaced, and a `metadata.json`
    that the records of this run could not be added to.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"`--output-dir` has to be a folder but '{output_dir}' is a file.")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"'{existing[0]}' exists already: choose another `--output-dir` or `--seed`, or pass `--overwrite`."
        )
    with user_errors():
        check_writable(output_dir, "--output-dir")
    read_metadata(output_dir / "metadata.json")


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
