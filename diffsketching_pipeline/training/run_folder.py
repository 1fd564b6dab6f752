# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is written there appears complete or not at all."""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from diffsketching_pipeline.files import commit_folder, lock_folder, staged_folder, write_file


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill on the way never leaves half of it under its name."""
    removed = path.with_name(f".{path.name}.old")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def write_folder(path: Path) -> AbstractContextManager[Path]:
    """Yield a temporary folder that becomes `path`, in the place of an older one, and vanishes when the block raises."""
    return staged_folder(path, replace=True)


class RunFolder:
    """
    The folder of one run: its checkpoints `checkpoint-<step>`, its arguments and the pictures of its validations.

    Args:
        path: the folder, which need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def lock(self) -> None:
        """
        Make the folder and take it for this process, as long as it lives.

        Raises:
            ValueError: another run has it.
        """
        self._lock = lock_folder(self.path)

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        folders = [path for path in self.path.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(folders, key=lambda path: int(path.name[11:]))

    def find_checkpoint(self, wanted: str | None, overwrite: bool = False) -> Path | None:
        """
        Return the checkpoint to go on from, if the run is to go on.

        Args:
            wanted: a checkpoint folder or its name, or `latest`; `None` begins a run.
            overwrite: whether a run that begins may delete the checkpoints of another.

        Raises:
            ValueError: there is no such checkpoint, or going on from it would mix two runs in one folder.
        """
        existing = self.checkpoints()
        if wanted == "latest":
            return existing[-1] if existing else None
        if wanted is None:
            if existing and not overwrite:
                raise ValueError(
                    f"`output_dir` already holds {existing[-1].name} of another run: go on from it with "
                    "`--resume_from_checkpoint latest`, give another `--output_dir`, or `--overwrite_output_dir`."
                )
            return None
        folder = Path(wanted) if Path(wanted).is_dir() else self.path / wanted
        if not (folder / "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` must be `latest` or a checkpoint folder, but got {wanted!r}.")
        is_own = folder.resolve().parent == self.path.resolve()
        step = int(folder.name[11:]) if is_own else -1
        later = [path for path in existing if int(path.name[11:]) > step]
        if later:
            raise ValueError(
                f"`output_dir` holds {later[-1].name}, which is not part of the run resumed from {folder.name}: "
                "delete it or give another `--output_dir`."
            )
        return folder

    def prepare(self, arguments: Mapping[str, Any], keep_checkpoints: bool) -> None:
        """Delete what a killed run left behind, and record the arguments as a config for the next call."""
        for leftover in self.path.glob(".checkpoint-*"):
            shutil.rmtree(leftover)
        for old in [] if keep_checkpoints else self.checkpoints():
            remove_folder(old)
        write_file(self.path / "training_args.yaml", yaml.safe_dump(dict(arguments), sort_keys=False))

    def temporary(self, step: int) -> Path:
        """Return the folder in which the checkpoint of a step is written, until [`RunFolder.commit`]."""
        return self.path / f".checkpoint-{step}.tmp"

    def commit(self, step: int, limit: int | None = None) -> None:
        """Give the checkpoint of a step its name when all of it is on the disk; then delete the oldest beyond `limit`."""
        commit_folder(self.temporary(step), self.path / f"checkpoint-{step}")
        for old in self.checkpoints()[:-limit] if limit else []:
            remove_folder(old)
