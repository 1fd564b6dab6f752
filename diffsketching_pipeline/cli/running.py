# SPDX-License-Identifier: Apache-2.0
"""The parts that commands share at work: models, batches and progress."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline.cli.options import DtypeName, user_errors
from diffsketching_pipeline.registry import find_checkpoint


if TYPE_CHECKING:
    from PIL import Image

    from diffsketching_pipeline import DiffSketchingEditPipeline, DiffSketchingPipeline


def load_pipeline(
    model: str | None,
    device: str,
    class_name: str = "DiffSketchingPipeline",
    dtype: DtypeName = DtypeName.float32,
    threshold: float | None = None,
) -> Any:
    """The pipeline of that class, on the device and in that type, reading drawings with that threshold, without bars."""
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
        pipe = cls.from_pretrained(find_checkpoint(model))
    # By the modules' own methods: diffusers warns of `to(dtype)`, and renames the argument of `from_pretrained`.
    casts = {DtypeName.float16: torch.nn.Module.half, DtypeName.bfloat16: torch.nn.Module.bfloat16}
    if dtype in casts:
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                casts[dtype](component)
    with user_errors((RuntimeError, AssertionError)):
        pipe.to(target, silence_dtype_warnings=True)
    pipe.set_progress_bar_config(disable=True)
    if threshold is not None:
        pipe.sketch_processor.register_to_config(threshold=threshold)
    return pipe


def generate_images(
    pipe: "DiffSketchingPipeline | DiffSketchingEditPipeline",
    seeds: range,
    batch_size: int,
    advance: Callable[[float], None],
    **arguments: Any,
) -> Iterator[tuple[range, Any]]:
    """Batch after batch, its seeds and the output of the call: photo k from `seeds[k]`. What is written at once stays."""
    import torch

    scale = arguments.get("perceptual_guidance_scale")
    if scale or (scale is None and pipe.recommended.get("perceptual_guidance_scale")):
        # It amplifies what a batch rounds differently, and a record is to make its photo again.
        batch_size = 1
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        with user_errors():
            out = pipe(
                num_images_per_sketch=len(batch),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
                callback_on_step_end=step_reporter(advance, len(batch)),
                **arguments,
            )
        yield batch, out


def step_reporter(advance: Callable[[float], None], amount: float) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that advances a progress bar by `amount` in the course of one call."""

    def on_step_end(pipe, step_index, timestep, callback_kwargs):
        advance(amount / pipe.num_timesteps)
        return callback_kwargs

    return on_step_end


def seed_tiles(images: Sequence["Image.Image"], seeds: range) -> list[tuple["Image.Image", str]]:
    """The photos as tiles of a contact sheet, each with its seed below."""
    return [(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]


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
