# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all: a reader never sees half of one, whenever the writer is killed."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_ROOM = 2**20  # a disk that has less left is full


@contextmanager
def staged_file(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """
    Yield a path beside `path` to write one file to. It takes the name `path`, over an older file, when the block ends, and is
    removed when the block raises.

    Args:
        path: below a folder that exists.
        durable: wait until the disk has it, for what must outlive a crash of the machine and not of the process alone.
    """
    path = Path(path)
    # A name of its own, because two processes may write one file at the same time.
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


def write_file(path: str | os.PathLike, content: str | bytes, durable: bool = False) -> None:
    """Write a file as [`staged_file`] does; text as UTF-8 with the line ends it has."""
    with staged_file(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(folder: str | os.PathLike, argument: str = "output_dir") -> None:
    """
    Raises:
        ValueError: if no file can be written to `folder`, or to the folder that it is to be made in; `argument` named it.
    """
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".diffsketching-") as file:
            file.write(bytes(_ROOM))
            file.flush()
    except OSError as error:
        raise ValueError(
            f"`{argument}` must be a folder that can be written to, but {existing} is not: {error.strerror}."
        ) from error


def check_output_dir(output_dir: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: unless `output_dir` is free, missing below an existing folder or an empty folder, and can be written to.
    """
    output_dir = Path(output_dir)
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or (existing == output_dir and any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must not exist or be an empty folder, and {existing} is in the way.")
    check_writable(output_dir)


@contextmanager
def staged_folder(output_dir: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """
    Yield an empty folder beside `output_dir` to write into. It takes the name `output_dir` when the block ends and the disk
    has all of it, and is removed when the block raises.

    Args:
        output_dir: a folder that is free, see [`check_output_dir`].
        replace: put it in the place of a folder that is not free.

    Raises:
        ValueError: `output_dir` is in use and not to be replaced.
    """
    output_dir = Path(output_dir)
    if not replace:
        check_output_dir(output_dir)
    # What is replaced has one writer, and what it left behind when it was killed is removed by the next run.
    name = f".{output_dir.name}" if replace else f".{output_dir.name}-{secrets.token_hex(4)}"
    temporary = output_dir.with_name(f"{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        commit_folder(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(written: Path, path: Path) -> None:
    """Wait until the disk has all of the folder `written`, then give it the name `path`, in the place of an older one."""
    for entry in (*written.rglob("*"), written):
        _sync(entry)
    replaced = path.with_name(f".{path.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    written.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # which syncs only what is open for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
