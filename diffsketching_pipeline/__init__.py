# SPDX-License-Identifier: Apache-2.0
"""DiffSketching: sketch-conditioned image synthesis with diffusion models, as a diffusers pipeline extension.

Importing this package is cheap: torch and diffusers are imported when the first public name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_MODULES = {
    "ClassifierGuidanceCallback": "guidance",
    "ColorGuidanceCallback": "guidance",
    "DiffSketchingEditPipeline": "pipeline_diffsketching_edit",
    "DiffSketchingInterpolationPipeline": "pipeline_diffsketching_interpolation",
    "DiffSketchingLoss": "losses",
    "DiffSketchingPipeline": "pipeline_diffsketching",
    "DiffSketchingPipelineOutput": "pipeline_output",
    "FoldedPixels": "modeling_folded_pixels",
    "GuidanceCallback": "guidance",
    "ImageIdentityLoss": "losses",
    "NoisyImageClassifier": "modeling_noisy_classifier",
    "PhotoSketcher": "modeling_photo_sketcher",
    "SketchGuidanceCallback": "guidance",
    "SketchPerceptualLoss": "losses",
    "SketchProcessor": "images.sketch_processor",
    "VectorSketch": "images.vector_sketch",
    "add_lora": "lora",
    "bundled_checkpoint": "registry",
    "expand_unet_for_sketch": "unet_surgery",
    "export_pipeline": "hub.export",
    "fuse_lora": "lora",
    "interpolate_unets": "unet_surgery",
    "load_lora": "lora",
    "push_folder": "hub.push",
    "push_pipeline": "hub.push",
    "save_lora": "lora",
    "unload_lora": "lora",
}
# They import diffusers when it is needed, and what is saved or loaded with it registers itself.
_WITHOUT_DIFFUSERS = ("hub.export", "hub.push", "registry")
__all__ = ["__version__", *sorted(_MODULES)]

if TYPE_CHECKING:
    from diffsketching_pipeline.guidance import ClassifierGuidanceCallback as ClassifierGuidanceCallback
    from diffsketching_pipeline.guidance import ColorGuidanceCallback as ColorGuidanceCallback
    from diffsketching_pipeline.guidance import GuidanceCallback as GuidanceCallback
    from diffsketching_pipeline.guidance import SketchGuidanceCallback as SketchGuidanceCallback
    from diffsketching_pipeline.hub.export import export_pipeline as export_pipeline
    from diffsketching_pipeline.hub.push import push_folder as push_folder
    from diffsketching_pipeline.hub.push import push_pipeline as push_pipeline
    from diffsketching_pipeline.images.sketch_processor import SketchProcessor as SketchProcessor
    from diffsketching_pipeline.images.vector_sketch import VectorSketch as VectorSketch
    from diffsketching_pipeline.lora import add_lora as add_lora
    from diffsketching_pipeline.lora import fuse_lora as fuse_lora
    from diffsketching_pipeline.lora import load_lora as load_lora
    from diffsketching_pipeline.lora import save_lora as save_lora
    from diffsketching_pipeline.lora import unload_lora as unload_lora
    from diffsketching_pipeline.losses import DiffSketchingLoss as DiffSketchingLoss
    from diffsketching_pipeline.losses import ImageIdentityLoss as ImageIdentityLoss
    from diffsketching_pipeline.losses import SketchPerceptualLoss as SketchPerceptualLoss
    from diffsketching_pipeline.modeling_folded_pixels import FoldedPixels as FoldedPixels
    from diffsketching_pipeline.modeling_noisy_classifier import NoisyImageClassifier as NoisyImageClassifier
    from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher as PhotoSketcher
    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline as DiffSketchingPipeline
    from diffsketching_pipeline.pipeline_diffsketching_edit import (
        DiffSketchingEditPipeline as DiffSketchingEditPipeline,
    )
    from diffsketching_pipeline.pipeline_diffsketching_interpolation import (
        DiffSketchingInterpolationPipeline as DiffSketchingInterpolationPipeline,
    )
    from diffsketching_pipeline.pipeline_output import DiffSketchingPipelineOutput as DiffSketchingPipelineOutput
    from diffsketching_pipeline.registry import bundled_checkpoint as bundled_checkpoint
    from diffsketching_pipeline.unet_surgery import expand_unet_for_sketch as expand_unet_for_sketch
    from diffsketching_pipeline.unet_surgery import interpolate_unets as interpolate_unets


def __getattr__(name: str) -> Any:
    if name == "ColourGuidanceCallback":
        return getattr(importlib.import_module(f"{__name__}.guidance"), name)  # which warns
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] not in _WITHOUT_DIFFUSERS:
        importlib.import_module(f"{__name__}.registry").register()
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
