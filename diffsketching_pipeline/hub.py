# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Where this package meets diffusers' registries and hubs, and where the bundled checkpoint lies."""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline.files import (
    MANIFEST_NAME,
    check_manifest,
    check_output_dir,
    forget_origins,
    listed_files,
    parse_manifest,
    staged_folder,
    write_manifest,
)


if TYPE_CHECKING:
    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline

_CUSTOM_COMPONENTS = {
    "NoisyImageClassifier": ["save_pretrained", "from_pretrained"],
    "PhotoSketcher": ["save_pretrained", "from_pretrained"],
}
_MODEL_MODULES = ("modeling_noisy_classifier", "modeling_photo_sketcher")
# What a checkpoint consists of; anything else in a folder is not for publication.
_PUBLISHED_SUFFIXES = (".json", ".md", ".png", ".py", ".safetensors", ".txt")
_PUBLISHED_NAMES = (MANIFEST_NAME, "LICENSE", "NOTICE")


def register() -> None:
    """
    Make diffusers save and load this package's components by name, from a folder or a hub, without remote code.

    Called when the first public class is imported; calling it again changes nothing. The names it touches are not
    public in diffusers: if a release moves them, a warning says so and only loading by `DiffusionPipeline` is lost.
    """
    package = sys.modules[__package__]
    try:
        loading_utils = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        loading_utils.LOADABLE_CLASSES[__package__] = dict(_CUSTOM_COMPONENTS)
        # The saver is looked up in the first of these, the loader in the second.
        loading_utils.ALL_IMPORTABLE_CLASSES.update(_CUSTOM_COMPONENTS)
        setattr(importlib.import_module("diffusers.pipelines"), __package__, package)
    except (ImportError, AttributeError, TypeError) as error:
        import warnings

        warnings.warn(
            f"This diffusers keeps its registries elsewhere ({error}): checkpoints with a classifier or a sketcher may not"
            " load. Use a diffusers version that diffsketching_pipeline was tested with.",
            stacklevel=2,
        )


def bundled_checkpoint(name: str = "garments-64") -> str:
    """
    Folder of a checkpoint that is installed with this package, for `from_pretrained`.

    Raises:
        ValueError: if there is none of that name; lists those that there are.
    """
    folder = Path(__file__).parent / "checkpoints"
    if not (folder / name / "model_index.json").is_file():
        available = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
        raise ValueError(f"`name` has to be one of the bundled checkpoints {available} but is {name!r}.")
    return str(folder / name)


def export_pipeline(
    pipe: "DiffSketchingPipeline",
    output_dir: str | os.PathLike,
    *,
    max_shard_size: int | str = "10GB",
    fp16_variant: bool = False,
    model_card: str | os.PathLike | None = None,
    metrics: str | os.PathLike | None = None,
    license: str | None = None,
    notices: Sequence[str] = (),
    repo_id: str | None = None,
) -> Path:
    """
    Writes a folder that loads anywhere: from a disk or a hub, with this package installed or without it.

    Beside what `save_pretrained` writes it holds `pipeline.py`, the pipeline in one file, and
    `<component>/diffsketching_pipeline.py`, this package's models in one file, which
    `DiffusionPipeline.from_pretrained(id, custom_pipeline=id, trust_remote_code=True)` runs where this package is not
    installed; `README.md`, `NOTICE` and `SHA256SUMS`. It appears complete or not at all.

    Args:
        pipe: of classes of diffusers, transformers and this package; saved in the dtype it has.
        output_dir: the folder to write; it must not exist or be empty.
        max_shard_size: size of the largest weight file, in bytes or like `"15MB"`.
        fp16_variant: write the weights a second time, in float16, for `from_pretrained(..., variant="fp16")`.
        model_card:
            Markdown file to use as README.md. Left out, it is that of the checkpoint `pipe` was loaded from or, if it has
            none, one written from the components.
        metrics: `metrics.json` of `training/evaluate.py` for this checkpoint, to be added to the card as a table.
        license: for a card that is written from the components, the licence of the weights, e.g. `"apache-2.0"`.
        notices: lines for `NOTICE` on works that the weights are derived from, and their licences.
        repo_id: the repository the folder is meant for, to be named in the card.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: a component is of another class or carries an adapter, `output_dir` is in use, or `model_card` or
            `metrics` cannot be read; nothing is written then.
    """
    from diffsketching_pipeline.flatten import flatten_modules

    check_output_dir(output_dir)
    _check_exportable(pipe)
    title = (repo_id or Path(output_dir).name).split("/")[-1]
    card = _card(pipe, title, model_card, metrics, license, repo_id)
    version = importlib.import_module(__package__).__version__
    origin = f"generated by diffsketching_pipeline {version} for people without it. Do not edit."
    with staged_folder(output_dir) as folder:
        pipe.save_pretrained(folder, max_shard_size=max_shard_size)
        if fp16_variant:
            _save_fp16(pipe, folder, max_shard_size)
        module = type(pipe).__module__.removeprefix(f"{__package__}.")
        pipeline = flatten_modules([module], f"The pipeline of this checkpoint, {origin}")
        (folder / "pipeline.py").write_text(pipeline, encoding="utf-8")
        # diffusers copies local files of components into one folder, so two of one name have to be equal.
        models = flatten_modules(_MODEL_MODULES, f"Models of this checkpoint, {origin}")
        for name, component in pipe.components.items():
            if type(component).__name__ in _CUSTOM_COMPONENTS:
                (folder / name / f"{__package__}.py").write_text(models, encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "NOTICE").write_text(_notice(version, notices), encoding="utf-8")
        write_manifest(folder)
    return Path(output_dir)


def _check_exportable(pipe: Any) -> None:
    from diffsketching_pipeline.lora import has_lora
    from diffsketching_pipeline.pipeline_utils import DiffSketchingMixin

    if not isinstance(pipe, DiffSketchingMixin) or type(pipe).__module__.split(".")[0] != __package__:
        raise ValueError(
            f"`pipe` has to be a pipeline of this package but is a {type(pipe).__module__}.{type(pipe).__name__}: load it"
            " with `diffsketching_pipeline.DiffSketchingPipeline.from_pretrained`."
        )
    for name, component in pipe.components.items():
        library = type(component).__module__.split(".")[0]
        if component is not None and library not in ("diffusers", "transformers", __package__):
            raise ValueError(
                f"`pipe.{name}` is a {type(component).__name__} of {library!r}, which others do not have: only components"
                f" of diffusers, transformers and {__package__} can be exported."
            )
    if has_lora(pipe.unet):
        raise ValueError("`pipe.unet` carries an adapter: call `fuse_lora` or `unload_lora` before exporting.")


def _card(
    pipe: "DiffSketchingPipeline",
    title: str,
    model_card: str | os.PathLike | None,
    metrics: str | os.PathLike | None,
    license: str | None,
    repo_id: str | None,
) -> str:
    from diffsketching_pipeline.model_card import loading_section, make_card, metrics_section, read_metrics

    path = _card_of_origin(pipe) if model_card is None else Path(model_card)
    if path is None:
        card = make_card(pipe, title, license)
    else:
        try:
            card = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`model_card` has to be a text file but is {path}.") from error
    sections = [card] if metrics is None else [card, metrics_section(read_metrics(metrics))]
    if "from_pretrained(" not in card:
        sections.append(loading_section(repo_id))
    return "\n".join(section.rstrip() + "\n" for section in sections)


def _card_of_origin(pipe: "DiffSketchingPipeline") -> Path | None:
    """The card of the folder that the pipeline was loaded from, if there is one."""
    origin = pipe.config.get("_name_or_path")
    if not origin or not os.path.isdir(origin):
        return None
    # The card of the bundled checkpoint lies at the top of the source tree.
    bundled = Path(__file__).parent / "checkpoints" / "garments-64"
    candidates = [Path(origin) / "README.md"]
    if Path(origin).resolve() == bundled.resolve():
        candidates.append(Path(__file__).parents[1] / "model_card.md")
    return next((path for path in candidates if path.is_file()), None)


def _notice(version: str, notices: Sequence[str]) -> str:
    lines = [
        f"pipeline.py and the other Python files are part of diffsketching_pipeline {version}.",
        "Copyright 2026 The DiffSketching Pipeline Authors. Apache License, Version 2.0:",
        "http://www.apache.org/licenses/LICENSE-2.0",
        "",
        "The licence of the weights is in README.md.",
        *([""] if notices else []),
        *notices,
    ]
    return "\n".join(lines) + "\n"


def _save_fp16(pipe: "DiffSketchingPipeline", folder: Path, max_shard_size: int | str) -> None:
    """Adds the weights of all models in float16; beside them, because a second save would remove the first's files."""
    import copy

    import torch

    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            with tempfile.TemporaryDirectory() as temporary:
                half: Any = copy.deepcopy(component).half()
                half.save_pretrained(temporary, variant="fp16", max_shard_size=max_shard_size)
                for path in Path(temporary).iterdir():
                    if path.name != "config.json":
                        shutil.move(path, folder / name / path.name)


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


def push_component(
    folder: str | os.PathLike, repo_id: str, *, token: str | bool | None = None, private: bool | None = None
) -> str | None:
    """
    Uploads the folder of one model, that a `save_pretrained` wrote, with a short README.md and `SHA256SUMS`; see
    [`push_folder`].
    """
    from diffsketching_pipeline.model_card import component_card

    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(shutil.copytree(folder, Path(temporary) / folder.name))
        forget_origins(copied)
        (copied / "README.md").write_text(component_card(copied, repo_id), encoding="utf-8")
        write_manifest(copied)
        return push_folder(copied, repo_id, token=token, private=private)


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
