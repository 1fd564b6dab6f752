# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported checkpoint: a card that says what is in it, how to load it, and what was measured."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from diffsketching_pipeline.pipeline_base import DiffSketchingMixin


REQUIREMENTS = "pip install diffusers numpy pillow scikit-image scipy torch torchvision transformers"
"""What installs all that the code of an export imports."""


@dataclass
class Evaluation:
    """
    The contents of a `metrics.json` of `training/evaluate.py`.

    Attributes:
        systems: measurements by system and metric, those of real photos and noise among them.
        own: the system that is the model as it is recommended: the first one.
        drawings: name of the folder of drawings.
    """

    systems: dict[str, dict[str, Any]]
    own: str
    drawings: str


def read_metrics(path: str | os.PathLike) -> Evaluation:
    """
    Reads a `metrics.json` of `training/evaluate.py`.

    Raises:
        ValueError: if it is no such file, or one without `--model`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = {name: system for name, system in content["systems"].items() if system}
        own = next(iter(content["settings"]["systems"]))
        for measurement in measured[own].values():
            measurement["title"], measurement["value"], measurement["reason"]
        return Evaluation(measured, own, Path(content["settings"]["arguments"]["sketches"]).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"`metrics` has to be a metrics.json of training/evaluate.py --model but is {path}."
        ) from error


def metrics_section(evaluation: Evaluation) -> str:
    """A table of what was measured, beside real photos and noise, with the conditions of the measurement."""
    own = evaluation.systems[evaluation.own]
    names = [evaluation.own, *sorted(name for name in evaluation.systems if name != evaluation.own)]
    lines = ["## Evaluation", ""]
    conditions = next(iter(own.values())).get("conditions", {})
    shown = [f"{key}: {conditions[key]}" for key in ("model", "drawings", "sampling", "seeds") if key in conditions]
    if shown:
        lines += [f"By `training/evaluate.py` ({'; '.join(shown)}).", ""]
    lines += [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for key, measurement in own.items():
        cells = [_cell(evaluation.systems[name].get(key)) for name in names]
        lines.append(f"| {_metric_name(measurement)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_model_index(card: str, evaluation: Evaluation, title: str) -> str:
    """The card with the model's own measurements in its metadata, as the Hub shows and compares them."""
    from huggingface_hub import EvalResult, ModelCard

    model_card = ModelCard(card)
    data = cast("ModelCardData", model_card.data)
    data.model_name = title
    data.eval_results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=evaluation.drawings,
            dataset_name=f"{evaluation.drawings}, {measurement['conditions']['drawings']} drawings",
            metric_type=key,
            metric_name=_metric_name(measurement),
            metric_value=float(f"{measurement['value']:.4g}"),
        )
        for key, measurement in evaluation.systems[evaluation.own].items()
        if measurement["value"] is not None
    ]
    return str(model_card)


def _metric_name(measurement: dict[str, Any]) -> str:
    """The title, with the network whose judgement it is: by another one the number would be another."""
    extractor = measurement["conditions"].get("extractor")
    return measurement["title"] if extractor is None else f"{measurement['title']} ({extractor})"


def _cell(measurement: dict[str, Any] | None) -> str:
    if measurement is None:
        return ""
    if measurement["value"] is None:
        return f"not measured: {measurement['reason']}"
    interval = measurement.get("interval")
    return f"{measurement['value']:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def loading_section(repo_id: str | None) -> str:
    """Explain how to load the checkpoint, with this package and without it."""
    name = repo_id or "path-or-hub-id"
    return f"""## Load

With [diffsketching_pipeline](https://arxiv.org/abs/2305.18812) installed no code of this repository runs, and its files
are compared with `SHA256SUMS`:

```python
from diffsketching_pipeline import DiffSketchingPipeline

pipe = DiffSketchingPipeline.from_pretrained("{name}")
images = pipe("my-drawing.png").images
```

Without it, diffusers runs `pipeline.py` of this repository; read it first, and pin `revision` and `custom_revision` to
the commit that you read. It needs `{REQUIREMENTS}`:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)
```
"""


def input_names(pipe: "DiffSketchingMixin") -> list[str]:
    """Name the inputs of a pipeline's UNet, in words."""
    names = {"photo" if pipe.vae is None else "latents": True, "sketch": pipe.takes_sketch}
    names["abstraction"] = pipe.takes_abstraction
    return [name for name, is_taken in names.items() if is_taken]


def make_card(pipe: "DiffSketchingMixin", title: str, license: str | None) -> str:
    """A card with what can be read off the pipeline itself: components, sizes, classes, recommended settings."""
    from diffsketching_pipeline.verification import COMPONENT_CLASSES

    matter = ["---", *([f"license: {license}"] if license else []), "library_name: diffusers"]
    matter += ["pipeline_tag: image-to-image", "tags:", "- sketch-to-image", "- diffusion", "- diffsketching", "---"]
    rows = ["| component | class | parameters |", "| --- | --- | --- |"]
    for name in COMPONENT_CLASSES:
        if (component := getattr(pipe, name)) is not None:
            parameters = getattr(component, "parameters", None)
            count = f"{sum(p.numel() for p in parameters()):,}" if parameters is not None else ""
            rows.append(f"| `{name}` | `{type(component).__name__}` | {count} |")
    classes = ", ".join(pipe.id2label.values()) if pipe.id2label else f"{pipe.num_classes}, by number"
    recommended = ", ".join(f"`{key}` {value}" for key, value in pipe.recommended.items()) or "none"
    inputs = input_names(pipe)
    what = " and ".join(inputs) if len(inputs) > 1 else f"{inputs[0]} only"
    return "\n".join(
        [
            *matter,
            "",
            f"# {title}",
            "",
            "A [DiffSketching](https://arxiv.org/abs/2305.18812) checkpoint: photos of the shape of a drawing.",
            "",
            *rows,
            "",
            f"- Images: {pipe.height}x{pipe.width} pixels; input of the UNet: {what}; it predicts"
            f" `{pipe.scheduler.config.get('prediction_type', 'epsilon')}`.",
            f"- Classes: {classes}.",
            f"- Recommended settings: {recommended}.",
            "",
            "This card was written from the files alone. What the checkpoint was trained on, and what it may be used for,"
            " is for its author to add.",
            "",
        ]
    )


def component_card(folder: str | os.PathLike, repo_id: str) -> str:
    """A card for the folder of one model, from its config."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name") or (config.get("architectures") or ["model"])[0]
    library = "diffusers" if "_class_name" in config else "transformers"
    source = "diffsketching_pipeline" if name in ("NoisyImageClassifier", "PhotoSketcher") else library
    return f"""---
library_name: {library}
tags:
- diffsketching
---

# {repo_id.split("/")[-1]}

A component for a [DiffSketching](https://arxiv.org/abs/2305.18812) pipeline.

```python
from {source} import {name}

model = {name}.from_pretrained("{repo_id}")
```
"""
