# SPDX-License-Identifier: Apache-2.0
"""The way of a run's weights to the Hub."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffsketching_pipeline import DiffSketchingPipeline, push_pipeline
from diffsketching_pipeline.hub.push import create_repo, push_component


logger = logging.getLogger(__name__)


class HubRepository:
    """
    The repository that a run publishes in.

    Args:
        repo_id: user/name.
        token: of a user who may write; the one that `hf auth login` or `HF_TOKEN` set when left out.
        private: whether a new repository is private.
        dtype: type of the published weights.
    """

    def __init__(
        self, repo_id: str, token: str | None = None, private: bool = False, dtype: torch.dtype = torch.float32
    ):
        self.repo_id, self.dtype = repo_id, dtype
        self._options: dict[str, Any] = {"token": token, "private": private or None}

    def create(self) -> None:
        """Make the repository if there is none; a wrong name or token is an error now rather than after days of training."""
        create_repo(self.repo_id, **self._options)

    def push(self, folder: Path) -> str | None:
        """
        Upload the pipeline or the model in a folder.

        Raises:
            OSError: the hub refuses or cannot be reached; the folder stays, to be pushed by `diffsketching push`.
        """
        if (folder / "model_index.json").is_file():
            pipeline = DiffSketchingPipeline.from_pretrained(folder, torch_dtype=self.dtype)
            return push_pipeline(pipeline, self.repo_id, **self._options)
        return push_component(folder, self.repo_id, **self._options)

    def push_step(self, model: Any, name: str, step: int) -> None:
        """Upload a model as branch `step-<n>`. Where that fails it is logged: training goes on, the weights are on the disk."""
        revision = f"step-{step}"
        options = {"revision": revision, "commit_message": f"Step {step}", **self._options}
        with tempfile.TemporaryDirectory() as temporary:
            model.save_pretrained(Path(temporary) / name)
            try:
                push_component(Path(temporary) / name, self.repo_id, **options)
            except OSError as error:
                logger.warning(f"{revision} is not on the Hub: {error}")
