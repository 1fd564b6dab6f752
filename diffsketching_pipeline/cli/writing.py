# SPDX-License-Identifier: Apache-2.0
"""Files that commands write: photos, and their records in `metadata.json`, whole or not at all."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline.cli.options import UserError, read_metadata
from diffsketching_pipeline.files import write_file
from diffsketching_pipeline.results import metadata, png


if TYPE_CHECKING:
    from PIL import Image


RESCUED: dict[Path, Path] = {}
"""Folders that could not be written to in the course of this command, and where their files are instead."""


def write_photos(
    images: Sequence["Image.Image"], paths: Mapping[int, Path], seeds: range, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write photo k, made from `seeds[k]`, to the path of that seed; returns the record of each, with what they share."""
    for image, seed in zip(images, seeds, strict=True):
        write_atomically(paths[seed], png(image))
    return [{"file": paths[seed].name, "seed": seed, **record} for seed in seeds]


def write_metadata(path: Path, records: list[dict[str, Any]], model: dict[str, Any]) -> None:
    """The records of this run beside those of other ones into the same folder; `model` is the [`model_record`]."""
    # Read now: another command may have written there since this one began.
    merged = {**read_metadata(path), **{record["file"]: record for record in records}}
    write_atomically(path, metadata(model, list(merged.values())))


def where_written(path: Path) -> Path:
    """The path of what [`write_atomically`] was given to write to `path`."""
    return RESCUED.get(path.parent, path.parent) / path.name


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write beside `path` and rename, so that no reader ever sees half a file. What was made is not lost
    where a folder cannot be written to any more: from then on its files go to a temporary one.
    """
    target = where_written(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)
    except OSError as error:
        if error.errno is None:
            raise  # not by the operating system
        if target != path:
            raise UserError(f"cannot write to '{path.parent}' or '{target.parent}': {error.strerror}.") from error
        RESCUED[path.parent] = Path(tempfile.mkdtemp(prefix="diffsketching-"))
        write_atomically(path, content)
