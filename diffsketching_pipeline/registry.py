# SPDX-License-Identifier: Apache-2.0
"""This package's place in the registries of diffusers, and the folders of the checkpoints that are installed with it.

Nothing of this package is imported here, so that every module of it may import this one.
"""

import importlib
import os
import sys
from pathlib import Path


COMPONENT_METHODS = {
    "FoldedPixels": ["save_pretrained", "from_pretrained"],
    "NoisyImageClassifier": ["save_pretrained", "from_pretrained"],
    "PhotoSketcher": ["save_pretrained", "from_pretrained"],
}


def register() -> None:
    """
    Make diffusers save and load this package's components by name, from a folder or a hub, without remote code.

    Called when the first public class is imported; calling it again changes nothing. The names it touches are not
    public in diffusers: if a release moves them, a warning says so and only loading by `DiffusionPipeline` is lost.
    """
    package = sys.modules[__package__]
    try:
        loading_utils = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        loading_utils.LOADABLE_CLASSES[__package__] = dict(COMPONENT_METHODS)
        # The saver is looked up in the first of these, the loader in the second.
        loading_utils.ALL_IMPORTABLE_CLASSES.update(COMPONENT_METHODS)
        setattr(importlib.import_module("diffusers.pipelines"), __package__, package)
    except (ImportError, AttributeError, TypeError) as error:
        import warnings

        warnings.warn(
            f"This diffusers keeps its registries elsewhere ({error}): checkpoints with a classifier or a sketcher may not"
            " load. Use a diffusers version that diffsketching_pipeline was tested with.",
            stacklevel=2,
        )


def find_checkpoint(name_or_path: str | os.PathLike | None) -> str:
    """
    Return what `from_pretrained` takes for the model that a command or script was given: the folder of a bundled checkpoint
    for its name, unless there is a folder of that name here, or for `None`; a path or hub id as it is.
    """
    if name_or_path is None:
        return bundled_checkpoint()
    name = str(name_or_path)
    bundled = Path(__file__).parent / "checkpoints" / name
    is_bundled = Path(name).name == name and (bundled / "model_index.json").is_file() and not os.path.exists(name)
    return str(bundled) if is_bundled else name


def bundled_checkpoint(name: str = "garments-64") -> str:
    """
    Return the folder of a checkpoint that is installed with this package, for `from_pretrained`.

    Raises:
        ValueError: if there is none of that name; lists those that there are.
    """
    folder = Path(__file__).parent / "checkpoints"
    if not (folder / name / "model_index.json").is_file():
        available = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
        raise ValueError(f"`name` has to be one of the bundled checkpoints {available} but is {name!r}.")
    return str(folder / name)
