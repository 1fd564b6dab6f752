# SPDX-License-Identifier: Apache-2.0
"""Starts of a training, and how they come to the classes of the data.

A start is a bundled model by its name, a pipeline folder, a folder of a single model, or a Hub id; of pipelines those of
this package, also converted ones, and plain ones of diffusers: an unconditional `UNet2DModel` of 3 channels. What it lacks
(channels for the drawing, embeddings of classes) is added as zeros, so that before training it computes what it did.

What belongs to a class that the start knows by name is kept; a new class begins from the mean of all that it knows.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from diffsketching_pipeline import DiffSketchingPipeline, NoisyImageClassifier
from diffsketching_pipeline.registry import find_checkpoint
from diffsketching_pipeline.training.modules import load_pretrained
from diffsketching_pipeline.unet_surgery import expand_unet_for_sketch


logger = logging.getLogger(__name__)

SCHEDULERS_OF_STARTS = ("DDIMScheduler", "DDPMScheduler")


@dataclass(frozen=True)
class ClassMatch:
    """
    The match of the classes of the data to those of a start, which they continue.

    Args:
        known: the start's classes by index; none, or empty names, where it does not say.
        wanted: the classes of the data by index.
    """

    known: Mapping[int, str]
    wanted: Mapping[int, str]

    @property
    def sources(self) -> list[int | None]:
        """The start's index of each class of the data, `None` for a new one."""
        if not self.known:
            return [None] * len(self.wanted)
        indices = {label: index for index, label in self.known.items()}
        return [indices.get(self.wanted[index]) for index in sorted(self.wanted)]

    @property
    def is_same(self) -> bool:
        """Return whether the classes stay as they are."""
        return dict(self.known) == dict(self.wanted)

    def rows(self, weight: Tensor) -> Tensor:
        """`[wanted, ...]` of a weight `[known, ...]`: the rows that are kept, and their mean for new classes."""
        mean = weight.float().mean(dim=0).to(weight.dtype)
        return torch.stack([mean if source is None else weight[source] for source in self.sources])

    def __str__(self) -> str:
        names = [self.wanted[index] for index in sorted(self.wanted)]
        kept = [name for name, source in zip(names, self.sources, strict=True) if source is not None]
        new = [name for name, source in zip(names, self.sources, strict=True) if source is None]
        left = [name for name in self.known.values() if name not in names]
        begin = "begin from the mean of the known ones" if self.known else "begin from nothing"
        parts = [f"kept: {_listed(kept)}", f"new, {begin}: {_listed(new)}", f"left out: {_listed(left)}"]
        return "; ".join(parts)


def _listed(names: Sequence[str], shown: int = 20) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) + more) or "none"


@dataclass(frozen=True)
class Start:
    """
    A pipeline or the folder of a single model that training starts from.

    Attributes:
        name: as the user gave it.
        path: the folder.
        index: content of `model_index.json`, empty for a single model.
    """

    name: str
    path: str
    index: Mapping[str, Any]

    @classmethod
    def read(cls, name_or_path: str) -> "Start":
        """
        Find a start, downloading a pipeline of the Hub.

        Raises:
            ValueError: nothing of that name can be found.
        """
        path = find_start(name_or_path)
        if not os.path.isfile(os.path.join(path, "model_index.json")):
            return cls(name_or_path, path, {})
        config: Any = DiffusionPipeline.load_config(path)
        return cls(name_or_path, path, config)

    def has(self, component: str) -> bool:
        """Return whether the pipeline has a component."""
        return (self.index.get(component) or [None, None])[1] is not None

    @property
    def id2label(self) -> dict[int, str]:
        """The pipeline's classes, empty where it has no names for them."""
        return {int(index): str(label) for index, label in (self.index.get("id2label") or {}).items()}

    def load(self, model_class: Any, component: str) -> Any:
        """
        Load a component in float32.

        Raises:
            ValueError: it has no safetensors weights.
        """
        try:
            return load_pretrained(model_class, self.folder_of(component), component, use_safetensors=True)
        except OSError as error:
            raise ValueError(
                f"`pretrained_model_name_or_path`: {self.name!r} has no {component} that can be loaded. Weights have to be "
                "safetensors: where theirs are others, load them with diffusers and save them with `save_pretrained`, where "
                f"that can do no harm. ({str(error).splitlines()[0]})"
            ) from error

    def folder_of(self, component: str) -> str:
        """Return the folder of a component: old pipelines of diffusers have it beside `model_index.json`."""
        folder = os.path.join(self.path, component)
        return folder if os.path.isdir(folder) else self.path

    def scheduler(self) -> DDIMScheduler | None:
        """
        The noise schedule, sampled by DDIM; `None` for a single model.

        Raises:
            ValueError: the pipeline has a schedule of another kind.
        """
        if not self.index:
            return None
        config: Any = DDIMScheduler.load_config(self.folder_of("scheduler"))
        if config["_class_name"] not in SCHEDULERS_OF_STARTS:
            raise ValueError(
                f"`pretrained_model_name_or_path` must have a scheduler of {' or '.join(SCHEDULERS_OF_STARTS)}, but "
                f"{self.name!r} has a {config['_class_name']}."
            )
        return DDIMScheduler.from_config(config)

    def unet(
        self, id2label: Mapping[int, str], sample_channels: int, factor: int, abstraction_plane: bool
    ) -> UNet2DModel:
        """
        The UNet in float32, told drawings and these classes; computes what it did where they are new to it.

        Args:
            id2label: the classes of the data; one index more is "no class".
            sample_channels: of x_t: 3, or those of the latents.
            factor: pixels per latent along a side, 1 without an autoencoder.
            abstraction_plane: whether it is told `sketch_abstraction`.

        Raises:
            ValueError: it denoises something else, or takes something else beside it.
        """
        unet = self.load(UNet2DModel, "unet")
        found, predicted = unet.config.in_channels, unet.config.out_channels
        told = sample_channels + factor**2
        if predicted not in (sample_channels, 2 * sample_channels):
            raise ValueError(
                f"`pretrained_model_name_or_path` must denoise {sample_channels} channels, but {self.name!r} predicts "
                f"{predicted}."
            )
        if found == sample_channels:
            unet = expand_unet_for_sketch(unet, factor, abstraction_plane)
            logger.info(f"{self.name}: {unet.config.in_channels - found} input channels for the drawing are new")
        elif found not in (told, told + 1) or (abstraction_plane and found == told):
            raise ValueError(
                f"`pretrained_model_name_or_path` must have {sample_channels} input channels, or {told + abstraction_plane} "
                f"with those of the drawing{' and `abstraction_plane`' * abstraction_plane}, but {self.name!r} has {found}."
            )
        return with_unet_classes(unet, self.match(id2label, unet.config.num_class_embeds))

    def match(
        self, id2label: Mapping[int, str], num_known: int | None, known: Mapping[int, str] | None = None
    ) -> ClassMatch:
        """
        Match these classes to those of a network with `num_known`, which are `known` or else the pipeline's; log a difference.
        """
        known = self.id2label if known is None else known
        if not known and num_known in (len(id2label), len(id2label) + 1):
            known = dict(id2label)  # as many as the data has, and nothing says that they are others
        match = ClassMatch(known, id2label)
        if not match.is_same:
            logger.info(f"{self.name}: classes {match}")
        return match


def find_start(name_or_path: str) -> str:
    """
    The folder of a start: a bundled model by its name, a folder, or what is downloaded of a pipeline of the Hub.

    Raises:
        ValueError: a path of this machine where there is nothing.
    """
    path = find_checkpoint(name_or_path)
    if os.path.isdir(path):
        return path
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ValueError(
            f"`pretrained_model_name_or_path` must be the name of a bundled model, a folder, or user/name on the Hub, but got "
            f"{name_or_path!r}."
        )
    return DiffSketchingPipeline.download(name_or_path)


def with_unet_classes(unet: UNet2DModel, match: ClassMatch) -> UNet2DModel:
    """
    A UNet of other classes, and of "no class" after them.

    One without classes gets embeddings of zeros and computes what it did, whatever it is told. "No class" is kept where it
    was the last; where there was none it begins from the mean, too.
    """
    number = unet.config.num_class_embeds
    if number is None and unet.config.class_embed_type is not None:
        raise ValueError(f"`unet` must embed classes by number, but has {unet.config.class_embed_type!r}.")
    if match.is_same and number == len(match.wanted) + 1:
        return unet
    state = {name: tensor.detach() for name, tensor in unet.state_dict().items()}
    name = "class_embedding.weight"
    if number is None:
        state[name] = torch.zeros(len(match.wanted) + 1, unet.time_embedding.linear_2.out_features)
    else:
        has_null = number == len(match.known) + 1
        classes = state[name][:-1] if has_null else state[name]
        null = state[name][-1:] if has_null else classes.mean(dim=0, keepdim=True)
        state[name] = torch.cat([match.rows(classes), null])
    with torch.device("meta"):
        changed = UNet2DModel.from_config(unet.config, num_class_embeds=len(match.wanted) + 1)
    changed.load_state_dict(state, assign=True)
    return changed.train(unet.training)


def with_classifier_classes(classifier: NoisyImageClassifier, match: ClassMatch) -> NoisyImageClassifier:
    """A classifier of noisy images whose head tells other classes."""
    if match.is_same:
        return classifier
    changed = NoisyImageClassifier.from_config(classifier.config, num_classes=len(match.wanted))
    changed.load_state_dict(_with_rows(classifier, "pool.to_out", match))
    return changed.train(classifier.training)


def with_encoder_classes(encoder: Any, match: ClassMatch) -> Any:
    """An image classification model of transformers whose head tells other classes; `id2label` follows."""
    if match.is_same:
        return encoder
    config: Any = type(encoder.config).from_dict(encoder.config.to_dict())
    config.num_labels = len(match.wanted)
    config.id2label = dict(match.wanted)
    config.label2id = {label: index for index, label in match.wanted.items()}
    changed = type(encoder)(config)
    heads = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    changed.load_state_dict(_with_rows(encoder, heads[-1], match))
    return changed.train(encoder.training)


def _with_rows(module: nn.Module, head: str, match: ClassMatch) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return state | {f"{head}.{name}": match.rows(state[f"{head}.{name}"]) for name in ("weight", "bias")}


def class_names_of(pipeline: DiffSketchingPipeline) -> list[str]:
    """Return what the data may call the pipeline's classes: their names or, if it has none, their indices as text."""
    return [pipeline.id2label.get(index, str(index)) for index in range(pipeline.num_classes)]


def with_classes(pipeline: DiffSketchingPipeline, id2label: Mapping[int, str]) -> DiffSketchingPipeline:
    """
    A pipeline of other classes: its UNet, classifier and encoders continue those that they know by name.

    Args:
        pipeline: unchanged, but shares what does not depend on classes.
        id2label: index to name, from 0 on.
    """
    match = ClassMatch(dict(enumerate(class_names_of(pipeline))), id2label)
    if match.is_same:
        return pipeline
    logger.info(f"classes {match}")
    changed = {"unet": with_unet_classes(pipeline.unet, match)}
    if pipeline.classifier is not None:
        changed["classifier"] = with_classifier_classes(pipeline.classifier, match)
    for name in ("sketch_encoder", "image_encoder"):
        encoder = getattr(pipeline, name)
        if encoder is not None and encoder.config.num_labels == len(match.known):
            changed[name] = with_encoder_classes(encoder, match)
    return DiffSketchingPipeline.from_pipe(pipeline, **changed, id2label=dict(id2label))


def add_classes(pipeline: DiffSketchingPipeline, names: Iterable[str]) -> DiffSketchingPipeline:
    """A pipeline of its own classes and, after them, of those of `names` that it does not know."""
    known = class_names_of(pipeline)
    new = sorted(set(names) - set(known))
    return with_classes(pipeline, dict(enumerate([*known, *new]))) if new else pipeline
