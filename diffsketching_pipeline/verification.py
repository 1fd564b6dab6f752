# SPDX-License-Identifier: Apache-2.0
"""The checks of a checkpoint before anything of it is loaded: whole, unaltered, without pickles, of sane sizes."""

import json
import math
import os
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, ResNetForImageClassification

from diffsketching_pipeline.conditioning import read_id2label
from diffsketching_pipeline.manifest import MANIFEST_NAME, check_manifest
from diffsketching_pipeline.messages import CONTROL_CHARACTERS, brief
from diffsketching_pipeline.modeling_folded_pixels import FoldedPixels
from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher
from diffsketching_pipeline.pipeline_options import check_recommended
from diffsketching_pipeline.schedulers import SUPPORTED_SCHEDULERS, check_scheduler_values


# The components of a checkpoint, and all classes that each may have.
COMPONENT_CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (UNet2DModel,),
    "scheduler": SUPPORTED_SCHEDULERS,
    "vae": (AutoencoderKL, AutoencoderTiny, FoldedPixels),
    "classifier": (NoisyImageClassifier,),
    "sketcher": (PhotoSketcher,),
    "sketch_encoder": (ResNetForImageClassification,),
    "image_encoder": (ResNetForImageClassification,),
}
CUSTOM_LIBRARY = "diffsketching_pipeline"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

_REQUIRED = ("unet", "scheduler")
# Files that diffusers or transformers read, where there are any, instead of the weights that are checked here: an adapter, the
# parts of a distributed run, shards of a variant by an old name.
_OTHER_WEIGHTS = re.compile(r"adapter_config\.json|shard-\d{5}-model-.*|.*\.safetensors\.[^.]+\.index\.json")
_DTYPES = (None, "float32", "float16", "bfloat16")
_MAX_JSON_SIZE = 2**21  # ImageNet-21k has its names twice in 1.5 MB
_MAX_HEADER_SIZE = 2**20
_MAX_TENSORS = 4096  # a UNet of ADM at 512 pixels has 900
_MAX_TEXT_LENGTH = 1000
_MAX_DEPTH = 16
_MAX_SAMPLE_SIZE = 4096
_MAX_SCHEDULER_NUMBER = 10**5
_MAX_LIST_LENGTH = 1024
_MAX_SIZE = 2**14
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
        ValueError: for an index that names another component or class than the pipelines take; settings of another type; a
            pickle in the place of weights; a missing or truncated file; a file that `SHA256SUMS`, if present, does not list or
            lists with another content; or a config that does not describe the weights beside it. Names the file.
    """
    folder, where = Path(folder), str(where or folder)
    if not (folder / "model_index.json").is_file():
        return  # `from_pretrained` says what it misses
    classes = _component_classes(_read_json(folder / "model_index.json", where), passed, where)
    wanted = {name: component for name, component in classes.items() if name not in passed}
    for name in wanted:
        _check_no_other_weights(folder / name, where)

    configs = {name: _config_file(folder / name, component, where) for name, component in wanted.items()}
    weights = {n: _weight_files(folder / n, c, variant, where) for n, c in wanted.items() if not _is_scheduler(c)}
    used = [folder / "model_index.json", *configs.values(), *(file for files in weights.values() for file in files)]
    check_manifest(folder, [file.relative_to(folder).as_posix() for file in used], where, complete=wanted)

    for name, component in wanted.items():
        config = _read_json(configs[name], where)
        at = f"{where}: `{name}/{configs[name].name}`"
        if config.get("quantization_config") is not None:
            raise ValueError(f"{at} has a `quantization_config`, which is not supported: save the model without it.")
        if _is_scheduler(component):
            _check_numbers(config, at, _MAX_SCHEDULER_NUMBER, _MAX_SCHEDULER_NUMBER)
            _check_scheduler(component, config, at)
        else:
            _check_architecture(component, config, _tensor_shapes(weights[name], where), at)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{brief(text, 40)} is no number")
    return number


def _read_json(path: Path, where: str) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_SIZE:
        raise ValueError(f"{where}: `{path.name}` has more than {_MAX_JSON_SIZE} bytes.")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: `{path.name}` is not JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: `{path.name}` has to hold an object but holds a {type(content).__name__}.")
    _check_texts(content, f"{where}: `{path.name}`")
    return content


def _check_texts(content: Any, at: str, depth: int = 0) -> None:
    """Refuse what nobody writes into a config, and what libraries repeat when they warn of it."""
    if isinstance(content, str) and (len(content) > _MAX_TEXT_LENGTH or CONTROL_CHARACTERS.search(content)):
        raise ValueError(f"{at} holds a text that is too long or has control characters: '{brief(content, 60)}'.")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{at} is nested more than {_MAX_DEPTH} deep.")
    if isinstance(content, dict):
        for key in content:
            _check_texts(key, at)
    if isinstance(content, (dict, list)):
        for item in content.values() if isinstance(content, dict) else content:
            _check_texts(item, at, depth + 1)


def _component_classes(index: dict[str, Any], passed: Collection[str], where: str) -> dict[str, type]:
    """The class of each component that an index has, by `COMPONENT_CLASSES`; nothing is imported for it."""
    at = f"{where}: `model_index.json`"
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{at} has to have the `_class_name` of a pipeline but has {index.get('_class_name')!r}.")
    if "id2label" not in passed:
        read_id2label(index.get("id2label"), at)
    if "recommended" not in passed:
        check_recommended(index.get("recommended"), at)
    classes = {}
    entries = {name: value for name, value in index.items() if name[:1] != "_" and isinstance(value, list)}
    for name in {**dict.fromkeys(COMPONENT_CLASSES), **entries}:
        entry = index.get(name)
        if entry in (None, [None, None]) and (name not in _REQUIRED or name in passed):
            continue
        if name not in COMPONENT_CLASSES:
            raise ValueError(
                f"{at} has the component '{brief(name, 60)}', but there are only {', '.join(COMPONENT_CLASSES)}."
            )
        allowed = {(_library(cls), cls.__name__): cls for cls in COMPONENT_CLASSES[name]}
        key = tuple(entry) if isinstance(entry, list) and all(isinstance(part, str) for part in entry) else None
        if key not in allowed:
            known = " or ".join(str(list(names)) for names in allowed)
            raise ValueError(
                f"{at}: `{name}` has to be {known}, but is {brief(repr(entry), 120)}, and nothing is imported for it. If you"
                " trust it, load it yourself, and build a pipeline of the components."
            )
        classes[name] = allowed[key]
    return classes


def _library(component: type) -> str:
    library = component.__module__.split(".")[0]
    return library if library in ("diffusers", "transformers") else CUSTOM_LIBRARY


def _is_scheduler(component: type) -> bool:
    return component in SUPPORTED_SCHEDULERS


def _config_file(folder: Path, component: type, where: str) -> Path:
    path = folder / ("scheduler_config.json" if _is_scheduler(component) else "config.json")
    if not path.is_file():
        raise ValueError(f"{where}: `{folder.name}/{path.name}` is missing: fetch the checkpoint again.")
    return path


def _check_no_other_weights(folder: Path, where: str) -> None:
    found = sorted(path.name for path in folder.glob("*") if _OTHER_WEIGHTS.fullmatch(path.name))
    if found:
        raise ValueError(
            f"{where}: `{folder.name}/{found[0]}` would make other weights be loaded than those of the checkpoint: remove it. An"
            " adapter is loaded with `load_lora`."
        )


def _weight_files(folder: Path, component: type, variant: str | None, where: str) -> list[Path]:
    """The safetensors files of a component, and the index that lists them if they are shards."""
    stem = "model" if issubclass(component, PreTrainedModel) else "diffusion_pytorch_model"
    for infix in ([f".{variant}"] if variant else []) + [""]:
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
    if header_size > _MAX_HEADER_SIZE:
        raise ValueError(f"{at} has a header of more than {_MAX_HEADER_SIZE} bytes, which no checkpoint needs.")
    if not 2 <= header_size <= size - 8:
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


def _check_scheduler(component: Any, config: dict[str, Any], at: str) -> None:
    try:
        scheduler = component.from_config(config)
    except Exception as error:
        # Whatever a hostile config makes a constructor raise, it is the config that is at fault.
        raise ValueError(f"{at} describes no {component.__name__} ({error}).") from error
    check_scheduler_values(scheduler, at)


@contextmanager
def at_most_parameters(count: float) -> Iterator[None]:
    """Stop the building of a network, in this thread, that has more parameters than `count`."""
    builder, made = threading.get_ident(), 0

    def on_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        nonlocal made
        made += threading.get_ident() == builder
        if made > count:
            raise ValueError(f"it has more than {count} parameters, where the weights have far fewer tensors")

    handle = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        handle.remove()


def _check_architecture(component: Any, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], at: str) -> None:
    """Builds the network without memory for its weights, and compares its tensors with those of the files."""
    if len(shapes) > _MAX_TENSORS:
        raise ValueError(f"{at} stands beside weights of {len(shapes)} tensors; {_MAX_TENSORS} are the most.")
    # First roughly: a network with more layers than the files have tensors would take its time even without memory.
    filled = [shape for shape in shapes.values() if math.prod(shape)]
    _check_numbers(config, at, max([_MAX_SIZE, *(side for shape in filled for side in shape)]), max(1, len(filled)))
    try:
        with torch.device("meta"), at_most_parameters(2 * len(filled) + 64):
            if issubclass(component, PreTrainedModel):
                _check_transformers_config(component, config)
                network = component(component.config_class.from_dict(config))
            else:
                network = component.from_config(config)
    except Exception as error:
        # As above.
        raise ValueError(f"{at} describes no {component.__name__} ({error}).") from error
    for name, tensor in network.state_dict().items():
        if name not in shapes:
            raise ValueError(f"{at} describes a network with a `{name}`, which the weights lack.")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{at} describes a network whose `{name}` is {list(tensor.shape)}, but the weights have"
                f" {list(shapes[name])}."
            )


def _check_transformers_config(component: Any, config: dict[str, Any]) -> None:
    """Refuse settings that no such network has: some make transformers read other files, or fetch code from the hub."""
    known = {*component.config_class().to_dict(), "image_size", "num_labels", "torch_dtype", "use_cache"}
    unknown = {key for key, value in config.items() if key not in known and isinstance(value, (str, list, dict))}
    if unknown:
        raise ValueError(f"it has no {sorted(unknown)}")
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in _DTYPES:
            raise ValueError(f"its {name} has to be one of {_DTYPES} but is {config[name]!r}")
