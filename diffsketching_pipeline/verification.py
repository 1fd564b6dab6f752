# SPDX-License-Identifier: Apache-2.0
"""The checks of a checkpoint before anything of it is loaded: whole, unaltered, without pickles, of sane sizes."""

import importlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from diffsketching_pipeline.manifest import MANIFEST_NAME, check_manifest
from diffsketching_pipeline.modeling_folded_pixels import FoldedPixels
from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher


CUSTOM_COMPONENTS: dict[str, type] = {
    "FoldedPixels": FoldedPixels,
    "NoisyImageClassifier": NoisyImageClassifier,
    "PhotoSketcher": PhotoSketcher,
}
CUSTOM_LIBRARY = "diffsketching_pipeline"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

_MAX_JSON_SIZE = 2**24
_MAX_HEADER_SIZE = 10**8  # safetensors' own limit
_MAX_SAMPLE_SIZE = 4096
_MAX_SCHEDULER_NUMBER = 10**6
_MAX_LIST_LENGTH = 1024
_COUNTS_OF_LAYERS = re.compile(r"layers|blocks|depth")


def fetch_manifest(repo_id: str, folder: str | os.PathLike, **options: Any) -> None:
    """
    Downloads the manifest of a repository to the snapshot `folder` that its other files were downloaded to, if it has
    one. Offline, one that was never downloaded counts as none.
    """
    try:
        # The name of a snapshot's folder is its commit: the manifest has to be of the same one.
        hf_hub_download(repo_id, MANIFEST_NAME, revision=Path(folder).name, **options)
    except LocalEntryNotFoundError:
        commit, cache_dir = Path(folder).name, options.get("cache_dir")
        known = try_to_load_from_cache(repo_id, MANIFEST_NAME, cache_dir=cache_dir, revision=commit)
        # When the hub is down: that it has none may be known from before.
        offline = options.get("local_files_only") or constants.HF_HUB_OFFLINE
        if not offline and known is not _CACHED_NO_EXIST:
            raise
    except EntryNotFoundError:
        pass


def check_checkpoint(
    folder: str | os.PathLike,
    where: str | None = None,
    passed: Collection[str] = (),
    variant: str | None = None,
) -> None:
    """
    Refuses a pipeline folder that is damaged or hostile, before a component is built or a file of it is loaded.

    Args:
        folder: holds `model_index.json` and a folder per component.
        where: what the folder is called in errors; its path when left out.
        passed: components that the caller has, so that theirs are not loaded from the folder.
        variant: as in `from_pretrained`.

    Raises:
        ValueError: for an index that names a folder outside or a class that is no model or scheduler of diffusers,
            transformers or this package; a pickle in the place of weights; a missing or truncated file; a file that
            `SHA256SUMS`, if present, does not list or lists with another content; or a config that does not describe
            the weights beside it. Names the file.
    """
    folder, where = Path(folder), str(where or folder)
    if not (folder / "model_index.json").is_file():
        return  # `from_pretrained` says what it misses
    index = _read_json(folder / "model_index.json", where)
    components = {name: value for name, value in index.items() if isinstance(value, list) and name[:1] != "_"}
    classes = {name: _component_class(name, value, where) for name, value in components.items() if value[:1] != [None]}
    wanted = {name: component for name, component in classes.items() if name not in passed}

    configs = {name: _config_file(folder / name, component, where) for name, component in wanted.items()}
    weights = {n: _weight_files(folder / n, variant, where) for n, c in wanted.items() if not _is_scheduler(c)}
    used = [folder / "model_index.json", *configs.values(), *(file for files in weights.values() for file in files)]
    check_manifest(folder, [file.relative_to(folder).as_posix() for file in used], where)

    for name, component in wanted.items():
        config = _read_json(configs[name], where)
        at = f"{where}: `{name}/{configs[name].name}`"
        if _is_scheduler(component):
            _check_numbers(config, at, _MAX_SCHEDULER_NUMBER, _MAX_SCHEDULER_NUMBER)
        else:
            _check_architecture(component, config, _tensor_shapes(weights[name], where), at)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_SIZE:
        raise ValueError(f"{where}: `{path.name}` has more than {_MAX_JSON_SIZE} bytes.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: `{path.name}` is not JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: `{path.name}` has to hold an object but holds a {type(content).__name__}.")
    return content


def _component_class(name: str, entry: list, where: str) -> type:
    """The class that an entry `[library, class]` of the index names, imported only if it may be."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(f"{where}: `model_index.json` has a component {name!r}, which is no name of a folder in it.")
    library, class_name = entry if len(entry) == 2 else (None, None)
    if not isinstance(library, str) or not isinstance(class_name, str):
        raise ValueError(f"{where}: `{name}` in `model_index.json` has to be [library, class] but is {entry!r}.")
    component = None
    if library == CUSTOM_LIBRARY:
        component = CUSTOM_COMPONENTS.get(class_name)
    elif library in ("diffusers", "transformers"):
        component = getattr(importlib.import_module(library), class_name, None)
    kinds = (ModelMixin, SchedulerMixin, PreTrainedModel)
    if not isinstance(component, type) or not issubclass(component, kinds):
        raise ValueError(
            f"{where}: `{name}` in `model_index.json` is {entry!r}, which is no model or scheduler of diffusers,"
            f" transformers or {CUSTOM_LIBRARY}, so nothing is imported for it. If you trust it, load it yourself, and"
            f" build the pipeline of its components."
        )
    return component


def _is_scheduler(component: type) -> bool:
    return issubclass(component, SchedulerMixin)


def _config_file(folder: Path, component: type, where: str) -> Path:
    path = folder / ("scheduler_config.json" if _is_scheduler(component) else "config.json")
    if not path.is_file():
        raise ValueError(f"{where}: `{folder.name}/{path.name}` is missing: fetch the checkpoint again.")
    return path


def _weight_files(folder: Path, variant: str | None, where: str) -> list[Path]:
    """The safetensors files of a component, and the index that lists them if they are shards."""
    for infix in ([f".{variant}"] if variant else []) + [""]:
        for stem in ("diffusion_pytorch_model", "model"):
            found = [folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"]
            found = [path for path in found if path.is_file()]
            if len(found) == 2:
                raise ValueError(
                    f"{where}: `{folder.name}` has both `{found[0].name}` and `{found[1].name}`: remove the older one."
                )
            if found:
                return found if found[0].suffix == ".safetensors" else [found[0], *_shards(found[0], where)]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{where}: `{folder.name}/{pickles[0]}` may be a pickle, which can run any program when it is read, so it is"
            " never loaded. Ask for safetensors files, or convert it where that can do no harm."
        )
    raise ValueError(f"{where}: `{folder.name}` has no safetensors weights: fetch the checkpoint again.")


def _shards(index: Path, where: str) -> list[Path]:
    weight_map = _read_json(index, where).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else {"no list"}
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(
                f"{where}: `{index.parent.name}/{index.name}` lists {name!r}, which is no file beside it."
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{where}: `{index.parent.name}/{name}` is missing: fetch the checkpoint again.")
    return [index.parent / name for name in sorted(names)]


def _tensor_shapes(files: list[Path], where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            shapes.update(_read_header(path, f"{where}: `{path.parent.name}/{path.name}`"))
    return shapes


def _read_header(path: Path, at: str) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    # Before it is opened, which reads all of the header.
    if not 2 <= header_size <= min(_MAX_HEADER_SIZE, size - 8):
        raise ValueError(f"{at} is no safetensors file, or its beginning is lost: fetch it again.")
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    except SafetensorError as error:
        raise ValueError(f"{at} is truncated, too long or damaged in its header ({error}): fetch it again.") from error


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a config, and the length of every list, with the setting it belongs to."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield f"length of {key}", len(value)
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _check_numbers(config: dict[str, Any], at: str, limit: int, layers: int) -> None:
    for key, number in _numbers(config):
        if key.startswith("length of "):
            most = max(_MAX_LIST_LENGTH, layers)
        elif key.rsplit(".")[-1] == "sample_size":
            most = _MAX_SAMPLE_SIZE
        else:
            most = layers if _COUNTS_OF_LAYERS.search(key) else limit
        if abs(number) > most:
            raise ValueError(f"{at} has the {key} {number}; with these weights it can be {most} at most.")


def _check_architecture(component: Any, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], at: str) -> None:
    """Builds the network without memory for its weights, and compares its tensors with those of the files."""
    # First roughly: a network with more layers than the files have tensors would take its time even without memory.
    _check_numbers(config, at, max(1024, sum(map(math.prod, shapes.values()))), max(1, len(shapes)))
    try:
        with torch.device("meta"):
            if issubclass(component, PreTrainedModel):
                network = component(component.config_class.from_dict(config))
            else:
                network = component.from_config(config)
    except Exception as error:
        # Whatever a hostile config makes a constructor raise, it is the config that is at fault.
        raise ValueError(f"{at} describes no {component.__name__} ({error}).") from error
    for name, tensor in network.state_dict().items():
        if name not in shapes:
            raise ValueError(f"{at} describes a network with a `{name}`, which the weights lack.")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{at} describes a network whose `{name}` is {list(tensor.shape)}, but the weights have"
                f" {list(shapes[name])}."
            )
