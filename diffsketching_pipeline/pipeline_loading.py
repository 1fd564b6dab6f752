# SPDX-License-Identifier: Apache-2.0
"""Loading and saving of pipelines as diffusers does it, with checks before, and one dtype and a list of sums after."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffsketching_pipeline.manifest import forget_origins, write_manifest
from diffsketching_pipeline.messages import brief_errors
from diffsketching_pipeline.verification import check_checkpoint, fetch_manifest


@brief_errors()
def load_checked(load: Callable[..., Any], source: Any, kwargs: Mapping[str, Any]) -> Any:
    """
    Return the pipeline that `load(source, **kwargs)` loads, in float32 unless a dtype is given.

    Args:
        load: diffusers' `from_pretrained`.
        source: a folder, which is checked first, or a hub id, which is checked when it was downloaded.

    Raises:
        ValueError: for other files than safetensors, and as [`~verification.check_checkpoint`].
    """
    if kwargs.get("use_safetensors", True) not in (None, True):
        raise ValueError(
            f"`use_safetensors` has to be True or left out but is {kwargs['use_safetensors']!r}: other files may be"
            " pickles, which can run any program when they are read."
        )
    if os.path.isdir(source):
        check_checkpoint(source, passed=kwargs, variant=kwargs.get("variant"))
    pipe = load(source, **{**kwargs, "use_safetensors": True})
    # Cast here because diffusers renames its argument for it, from `torch_dtype` to `dtype`.
    if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module) and name not in kwargs and component.dtype != torch.float32:
                component.float()
    return pipe


@brief_errors()
def download_checked(download: Callable[..., str], repo_id: str, kwargs: Mapping[str, Any]) -> str:
    """
    Return the folder that `download(repo_id, **kwargs)`, diffusers' own, has filled, with the checkpoint's list of sums.

    Raises:
        ValueError: for a component without safetensors weights, and as [`~verification.check_checkpoint`].
    """
    try:
        folder = download(repo_id, **{**kwargs, "use_safetensors": True})
    except OSError as error:
        if "the necessary `safetensors` weights" not in str(error):
            raise
        raise ValueError(
            f"{repo_id}: a component has no safetensors weights. Other files may be pickles, which can run"
            " any program when they are read, so they are never loaded. Ask for safetensors files, or convert them where"
            " that can do no harm."
        ) from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # diffusers reads the index before it can be checked.
        raise ValueError(f"{repo_id}: `model_index.json` is none of a pipeline ({error!r}).") from error
    options = {name: kwargs.get(name) for name in ("cache_dir", "token")}
    options |= {name: bool(kwargs.get(name)) for name in ("force_download", "local_files_only")}
    fetch_manifest(repo_id, folder, **options)
    check_checkpoint(folder, where=repo_id, passed=kwargs, variant=kwargs.get("variant"))
    return folder


def save_with_manifest(
    save: Callable[..., Any], folder: str | os.PathLike, safe_serialization: bool, kwargs: Mapping[str, Any]
) -> None:
    """
    Save with `save(folder, **kwargs)`, diffusers' own; then remove from the configs where they came from, and list the sums.

    Raises:
        ValueError: `safe_serialization` is off or `push_to_hub` is on.
    """
    if not safe_serialization:
        raise ValueError("`safe_serialization` has to be True: pickles are never loaded.")
    if kwargs.get("push_to_hub"):
        raise ValueError("`push_to_hub` is not supported here: use `diffsketching_pipeline.push_pipeline`.")
    save(folder, **kwargs)
    forget_origins(folder)
    write_manifest(folder)
