# SPDX-License-Identifier: Apache-2.0
"""Uploads checkpoints to a hub, whole or not at all."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline.hub.export import export_pipeline
from diffsketching_pipeline.manifest import (
    MANIFEST_NAME,
    check_links,
    check_manifest,
    forget_origins,
    listed_files,
    parse_manifest,
    write_manifest,
)


if TYPE_CHECKING:
    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline


# What a checkpoint consists of; anything else in a folder is not for publication.
_PUBLISHED_SUFFIXES = (".json", ".md", ".png", ".py", ".safetensors", ".txt")
_PUBLISHED_NAMES = (MANIFEST_NAME, "LICENSE", "NOTICE")


def push_pipeline(
    pipe: "DiffSketchingPipeline",
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    **export_options: Any,
) -> str | None:
    """
    Exports a pipeline and uploads it; see [`export_pipeline`] for `export_options`, and [`push_folder`] for the others.

    Returns:
        `str`: address of the commit or pull request; `None` on all processes but the main one, which do nothing.
    """
    if not _is_main_process():
        return None
    _check_push(repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_pipeline(pipe, Path(temporary) / "checkpoint", repo_id=repo_id, **export_options)
        return push_folder(
            folder,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str | None:
    """
    Uploads a checkpoint folder, or that of one component, as one commit: others see the old files or the new, never both.

    The repository is made if there is none. Files of the checkpoint that was pushed before and are no longer part of it
    are removed in the same commit; files that came otherwise stay. After an interruption, calling it again sends only
    what the hub does not have.

    Args:
        folder: e.g. what [`export_pipeline`] or a model's `save_pretrained` wrote.
        repo_id: `"user/name"`.
        token: of a user who may write; the one that `hf auth login` or `HF_TOKEN` set when left out.
        private: whether a new repository is private; the account's default when left out. An old one stays as it is.
        revision: branch to commit to, made if there is none; `"main"` when left out.
        create_pr: propose the commit as a pull request to `"main"` instead.
        commit_message: first line of the commit.

    Returns:
        `str`: address of the commit or pull request; `None` on all processes but the main one, which do nothing.

    Raises:
        ValueError: `repo_id` is no name, `folder` holds no checkpoint, was changed since its `SHA256SUMS` was written, or
            holds files that are not part of one; nothing is sent then.
        OSError: the hub refuses or cannot be reached.
    """
    if not _is_main_process():
        return None
    _check_push(repo_id, revision, create_pr)
    names = _names_to_push(Path(folder))
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        operations: list[Any] = [
            CommitOperationDelete(name) for name in sorted(_pushed_before(api, repo_id, head) - set(names))
        ]
        operations += [CommitOperationAdd(name, Path(folder, name)) for name in names]
        # Not `upload_folder`, which may make several commits of one folder.
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload a DiffSketching checkpoint",
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else head,
        )
    except ValueError:
        raise
    except Exception as error:
        # huggingface_hub passes on the errors of whichever HTTP library its version uses.
        raise OSError(
            f"`{repo_id}` was not pushed to, or its answer was lost ({type(error).__name__}: {error}). It holds the old"
            " files or the new ones; push again to go on."
        ) from error
    return str(commit.pr_url or commit.commit_url)


def push_component(folder: str | os.PathLike, repo_id: str, **push_options: Any) -> str | None:
    """
    Uploads the folder of one model, that a `save_pretrained` wrote, with a short README.md and `SHA256SUMS`; see
    [`push_folder`], also for `push_options`.
    """
    from diffsketching_pipeline.hub.model_card import component_card

    folder = Path(folder)
    check_links(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(shutil.copytree(folder, Path(temporary) / folder.name))
        forget_origins(copied)
        (copied / "README.md").write_text(component_card(copied, repo_id), encoding="utf-8")
        write_manifest(copied)
        return push_folder(copied, repo_id, **push_options)


def create_repo(repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> None:
    """
    Makes a repository if there is none, on the main process only.

    Raises:
        ValueError: `repo_id` is no name.
        OSError: the hub refuses or cannot be reached.
    """
    if not _is_main_process():
        return
    _check_push(repo_id, None, False)
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
    except Exception as error:
        raise OSError(f"`{repo_id}` cannot be pushed to ({type(error).__name__}: {error}).") from error


def _is_main_process() -> bool:
    if "torch" not in sys.modules:
        return True
    from accelerate import PartialState

    return PartialState().is_main_process


def _check_push(repo_id: str, revision: str | None, create_pr: bool) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` has to be like 'user/name' but is {repo_id!r}: {error}") from error
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"`revision` has to be left out for a pull request, which goes to 'main', but is {revision!r}."
        )


def _names_to_push(folder: Path) -> list[str]:
    """
    The files of a checkpoint folder, relative to it.

    Raises:
        ValueError: it has no config or weights, or something that does not belong to a checkpoint.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` has to be a checkpoint's folder but is {str(folder)!r}.")
    names = listed_files(folder)
    if not {"model_index.json", "config.json"} & set(names) or not any(n.endswith(".safetensors") for n in names):
        raise ValueError(f"`folder` has to hold a config and safetensors weights, but {str(folder)!r} does not.")
    for name in names:
        if Path(name).suffix not in _PUBLISHED_SUFFIXES and Path(name).name not in _PUBLISHED_NAMES:
            raise ValueError(
                f"`folder` holds {name!r}, which is not part of a checkpoint: push a folder that `export_pipeline` wrote."
            )
    check_manifest(folder, names, str(folder))
    return names + [name for name in (MANIFEST_NAME, "README.md") if (folder / name).is_file()]


def _pushed_before(api: Any, repo_id: str, revision: str | None) -> set[str]:
    """The files of the repository that its manifest lists: those that an earlier push put there."""
    from huggingface_hub.utils import EntryNotFoundError

    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=revision, cache_dir=temporary)
        except EntryNotFoundError:
            return set()
        try:
            listed = set(parse_manifest(Path(path).read_text(encoding="utf-8"), repo_id))
        except ValueError:
            return set()  # not one of ours
    return listed & set(api.list_repo_files(repo_id, revision=revision))
