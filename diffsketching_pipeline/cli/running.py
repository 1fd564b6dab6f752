# SPDX-License-Identifier: Apache-2.0
"""What commands share at work: models, batches, progress, and files that are written whole or not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline.cli.options import DtypeName, UserError, user_errors
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.results import metadata, png


if TYPE_CHECKING:
    from PIL import Image

    from diffsketching_pipeline import DiffSketchingEditPipeline, DiffSketchingPipeline


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
    pipe: "DiffSketchingPipeline | DiffSketchingEditPipeline",
    seeds: range,
    batch_size: int,
    advance: Callable[[float], None],
    **arguments: Any,
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


def write_photos(
    images: Sequence["Image.Image"], paths: Sequence[Path], seeds: range, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write photo k, made from `seeds[k]`, to `paths[k]`; returns the record of each, `record` being what they share."""
    for image, path in zip(images, paths, strict=True):
        write_atomically(path, png(image))
    return [{"file": path.name, "seed": seed, **record} for path, seed in zip(paths, seeds, strict=True)]


def seed_tiles(images: Sequence["Image.Image"], seeds: range) -> list[tuple["Image.Image", str]]:
    """The photos as tiles of a contact sheet, each with its seed below."""
    return [(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]


def write_metadata(
    path: Path, earlier: dict[str, dict[str, Any]], records: list[dict[str, Any]], model: dict[str, Any]
) -> None:
    """The records of this run beside those of earlier ones into the same folder; `model` is the [`model_record`]."""
    merged = {**earlier, **{record["file"]: record for record in records}}
    write_atomically(path, metadata(model, list(merged.values())))


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
