# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is written there appears complete or not at all."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from diffsketching_pipeline.files import staged_folder


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill on the way never leaves half of it under its name."""
    removed = path.with_name(f".{path.name}.old")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def write_folder(path: Path) -> AbstractContextManager[Path]:
    """Yield a temporary folder that becomes `path`, in the place of an older one, and vanishes when the block raises."""
    return staged_folder(path, replace=True)
