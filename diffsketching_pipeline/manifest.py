# SPDX-License-Identifier: Apache-2.0
"""The list of sha256 sums that travels with a checkpoint and says what is in its files."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diffsketching_pipeline.files import write_file


# In the format of coreutils, so that `sha256sum --check SHA256SUMS` does it without this package.
MANIFEST_NAME = "SHA256SUMS"
# People edit these two on a hub, and nothing is loaded from them.
_NOT_LISTED = (MANIFEST_NAME, "README.md", ".gitattributes")
_MANIFEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MAX_MANIFEST_SIZE = 2**20
_TEXT_SUFFIXES = ("", ".json", ".md", ".py", ".txt")
_MAX_TEXT_SIZE = 2**24


def is_inside(name: str) -> bool:
    """Return whether a file name that came with a checkpoint stays within its folder: relative, forward, no `..`."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\\" not in name and ":" not in name and parts[0] != "/" and ".." not in parts


def sha256_of(path: str | os.PathLike) -> str:
    """Return the sha256 sum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_listed(path: Path, expected: str) -> bool:
    """Return whether a file has this sha256 sum; a text also has it where git for Windows has given it other line ends."""
    if sha256_of(path) == expected:
        return True
    if path.suffix not in _TEXT_SUFFIXES or path.stat().st_size > _MAX_TEXT_SIZE:
        return False
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == expected


def weights_sha256(model: Any) -> str:
    """Return the sha256 sum of a `torch.nn.Module`'s weights as float32, whatever file they came from, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def listed_files(folder: str | os.PathLike) -> list[str]:
    """
    List what belongs into the manifest of a folder: all its files but the hidden, the README and the manifest itself.

    Raises:
        ValueError: for a link to what is not in the folder, see [`check_links`].
    """
    check_links(folder)
    return sorted(name for name in _visible_files(Path(folder)) if name not in _NOT_LISTED)


def check_links(folder: str | os.PathLike, pattern: str = "**/*") -> None:
    """
    Raises:
        ValueError: for a link in a folder to what is not in it: to publish the folder would publish that.
    """
    root = Path(folder).resolve()
    for path in Path(folder).glob(pattern):
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            name = path.relative_to(folder).as_posix()
            raise ValueError(
                f"{folder}: `{name}` is a link to what is no file of this folder: put a copy in its place."
            )


def _visible_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            yield name


def write_manifest(folder: str | os.PathLike) -> Path:
    """Write `SHA256SUMS` into a folder, over an older one, and return its path."""
    lines = [f"{sha256_of(Path(folder, name))}  {name}\n" for name in listed_files(folder)]
    path = Path(folder, MANIFEST_NAME)
    write_file(path, "".join(lines))
    return path


def forget_origins(folder: str | os.PathLike) -> None:
    """
    Remove from all configs in a folder the path that each was loaded from, which means nothing elsewhere and may tell
    whose it was.
    """
    for path in Path(folder).rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_manifest(text: str, where: str) -> dict[str, str]:
    """
    Return the sha256 sum of each file that a manifest lists.

    Raises:
        ValueError: for a line of another form, a file listed twice, or a name that leads out of the folder.
    """
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{where}: line {number} of {MANIFEST_NAME} is not a sum and the name of another file.")
        if not is_inside(match[2]):
            raise ValueError(f"{where}: {MANIFEST_NAME} lists {match[2]!r}, which leads out of the folder.")
        sums[match[2]] = match[1]
    return sums


def read_manifest(folder: str | os.PathLike, where: str) -> dict[str, str] | None:
    """Return the manifest of a folder, or `None` if it has none; raises as [`parse_manifest`]."""
    path = Path(folder, MANIFEST_NAME)
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ValueError(
            f"{where}: {MANIFEST_NAME} is no file but a folder, a pipe or a link that leads nowhere: remove it."
        )
    if path.stat().st_size > _MAX_MANIFEST_SIZE:
        raise ValueError(f"{where}: {MANIFEST_NAME} has more than {_MAX_MANIFEST_SIZE} bytes, which no list needs.")
    try:
        return parse_manifest(path.read_text(encoding="utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {MANIFEST_NAME} is not text.") from error


def check_manifest(folder: str | os.PathLike, names: Iterable[str], where: str, complete: Iterable[str] = ()) -> None:
    """
    Compare files with the manifest of their folder, if it has one.

    Args:
        folder: what the names are relative to.
        names: the files that are about to be used.
        where: what the folder is called in errors.
        complete: subfolders of which all files must be listed, as those who load them look for more than `names`.

    Raises:
        ValueError: for a file that the manifest does not list, or whose content is not the one listed.
    """
    sums = read_manifest(folder, where)
    if sums is None:
        return
    names = list(names)
    beside = [f"{sub}/{name}" for sub in complete for name in _visible_files(Path(folder, sub))]
    for name in [*names, *beside, *(path.name for path in Path(folder).glob("*.py"))]:
        if name not in sums:
            raise ValueError(
                f"{where}: `{name}` is not in {MANIFEST_NAME}, so it was added later: remove it, or write the list again"
                " if you added it yourself (`diffsketching_pipeline.manifest.write_manifest`)."
            )
    for name in names:
        if not _is_listed(Path(folder, name), sums[name]):
            raise ValueError(
                f"{where}: `{name}` is not the file that {MANIFEST_NAME} lists, so it was damaged or changed: fetch it"
                " again, or write the list again if you changed it yourself"
                " (`diffsketching_pipeline.manifest.write_manifest`)."
            )
