# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all: a reader never sees half of one, whenever the writer is killed."""

import ctypes
import functools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Data workers of a run that was killed notice it within five seconds.
_LOCK_SECONDS = 15.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_ROOM = 2**20  # a disk that has less left is full


@contextmanager
def staged_file(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """
    Yield a path beside `path` to write one file to. It takes the name `path`, over an older file, when the block ends, and is
    removed when the block raises, or by the next writer of `path` when the process is killed.

    Args:
        path: below a folder that exists.
        durable: wait until the disk has it, for what must outlive a crash of the machine and not of the process alone.
    """
    path = Path(path)
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    if durable:
        _sync(path.parent)


def write_file(path: str | os.PathLike, content: str | bytes, durable: bool = False) -> None:
    """Write a file as [`staged_file`] does; text as UTF-8 with the line ends it has."""
    with staged_file(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def keep_file(cache_dir: Path, path: Path, content: bytes) -> bool:
    """
    Write a file of a cache, making its folder, and return whether that worked: a cache is optional, so that it did not is said
    once in a process and raises nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        _warn_unwritable(cache_dir, error.strerror or str(error))
        return False
    return True


@functools.cache
def _warn_unwritable(cache_dir: Path, reason: str) -> None:
    logger.warning("the cache %s cannot be written to (%s): what it lacks is kept in memory.", cache_dir, reason)


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
    has all of it, and is removed when the block raises, or by the next writer of `output_dir` when the process is killed.

    Args:
        output_dir: a folder that is free, see [`check_output_dir`].
        replace: put it in the place of a folder that is not free.

    Raises:
        ValueError: `output_dir` is in use and not to be replaced.
    """
    output_dir = Path(output_dir)
    if not replace:
        check_output_dir(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    _put_back(output_dir)
    with _temporary(output_dir, Path.mkdir) as temporary:
        yield temporary
        commit_folder(temporary, output_dir)


def commit_folder(written: Path, path: Path) -> None:
    """
    Wait until the disk has all of the folder `written`, then give it the name `path`, in the place of an older one. On Linux
    the name is never missing; elsewhere a kill may leave the older one as `.{name}.old`, which the next call puts back.
    """
    for entry in (*written.rglob("*"), written):
        _sync(entry)
    replaced = _put_back(path)
    if not path.exists():
        written.rename(path)
    elif _exchange(written, path):
        replaced = written
    else:
        path.rename(replaced)
        written.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _put_back(path: Path) -> Path:
    """Undo half a replacement of a folder, and return what an older one is called in between."""
    replaced = path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    return replaced


def lock_folder(path: Path) -> FileLock:
    """
    Take a folder for this process alone, for as long as it keeps what is returned: a lock that ends with the process, however
    that ends.

    Raises:
        ValueError: another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", timeout=_LOCK_SECONDS, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"`output_dir` {path} is in use by another run: wait for it, or give another one.") from None
    except NotImplementedError:  # a file system without locks
        pass
    return lock


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """
    Yield what `make` makes, under a name of its own beside `path`, because two processes may write one file at the same
    time, and remove it in the end. What another process left when it was killed is removed first: nobody holds it any more.
    """
    prefix, suffix = f".{path.name}-", ".tmp"
    temporary = path.with_name(prefix + secrets.token_hex(4) + suffix)
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(suffix) and len(name) == len(temporary.name):
            with _held(path.with_name(name)) as is_left:
                if is_left:
                    _remove(path.with_name(name))
    make(temporary)
    with _held(temporary):
        try:
            yield temporary
        finally:
            _remove(temporary)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a file or folder within the block, or for as long as the process lives; yields whether nobody else does."""
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return renameat2(*names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # which syncs only what is open for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
