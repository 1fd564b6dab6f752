# SPDX-License-Identifier: Apache-2.0
"""The networks that judge in `evaluate.py`, and what they make of photos."""

import hashlib
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForImageClassification

from diffsketching_pipeline.evaluation.image_sets import ImageSet, read_photos
from diffsketching_pipeline.files import keep_file
from diffsketching_pipeline.manifest import weights_sha256


INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity publishes: Inception-v3 as TensorFlow released it and as FID is defined by."""

_LOADING_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What loading weights that are missing, damaged, or of something else may raise."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class Preprocessor:
    """Side, mean and standard deviation of a network's input, after a `preprocessor_config.json` beside its weights."""

    size: int | None
    mean: Tensor
    std: Tensor

    @classmethod
    def read(cls, folder: str, device: torch.device | str) -> "Preprocessor":
        """Read the preprocessor of a folder; without such a file, any size and [-1, 1]."""
        path = Path(folder) / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        size = settings.get("crop_size") or settings.get("size")
        mean, std = (settings.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std"))
        if not settings.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        return cls(
            int(max(size.values()) if isinstance(size, dict) else size) if size else None,
            *(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std)),
        )

    @property
    def settings(self) -> str:
        """All of it, for telling one from another."""
        return f"{self.size} {self.mean.flatten().tolist()} {self.std.flatten().tolist()}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 255] as the network takes them."""
        return (pixels.float() / 255 - self.mean) / self.std


# ---- features -------------------------------------------------------------------------------------------------------


class FeatureExtractor(Protocol):
    """
    A network that describes each photo by a vector.

    Attributes:
        fingerprint: SHA-256 of its weights.
        name: what the names of numbers say of it.
        size: side of its input in pixels, to which it resizes; `None` takes any.
        resize: how.
    """

    fingerprint: str
    name: str
    size: int | None
    resize: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `[N, 3, R, R]` on the extractor's device -> float32 `[N, D]`."""


class InceptionExtractor:
    """
    The 2048 features of FID (Heusel et al., 2017): Inception-v3 as TensorFlow released it, with TensorFlow 1's resizing.

    Args:
        device (`torch.device`): where it computes.

    Raises:
        ValueError: its weights are not in the torch hub folder, whence they are never downloaded, or are others.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
        if not path.is_file():
            raise ValueError(
                f"`extractor` 'inception' needs {path}: get it from the releases of toshas/torch-fidelity, or take the"
                " `evaluator`, or a folder with an image model of transformers."
            )
        try:
            # torch-fidelity would unpickle anything: what this refuses never gets there.
            torch.load(path, map_location="cpu", weights_only=True)
            model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except _LOADING_ERRORS as error:
            raise ValueError(
                f"`extractor` 'inception' cannot use {path} ({_first_line(error)}): get it anew from the releases"
                " of toshas/torch-fidelity."
            ) from error
        self.model = model.to(device)
        self.fingerprint = weights_sha256(model)
        self.name = f"inception-v3-compat-{self.fingerprint[:8]}"
        self.size: int | None = model.INPUT_IMAGE_SIZE
        self.resize = f"bilinear-{self.size}px of TensorFlow 1"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)[0]


class TransformersExtractor:
    """
    The pooled features of an image model of transformers, whose `preprocessor_config.json` says what it takes.

    Args:
        folder (`str`): a folder written by `save_pretrained`.
        device (`torch.device`): where it computes.

    Raises:
        ValueError: the folder holds no such model, or not all of its weights.
    """

    def __init__(self, folder: str, device: torch.device | str = "cpu"):
        try:
            model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except _LOADING_ERRORS as error:
            raise ValueError(
                f"`extractor` must be `evaluator`, `inception` or a folder with an image model of transformers, but"
                f" {folder!r} cannot be loaded ({_first_line(error)})."
            ) from error
        if report["missing_keys"]:
            raise ValueError(
                f"`extractor` {folder!r} lacks weights, which would be random: {sorted(report['missing_keys'])[0]} is one"
                f" of {len(report['missing_keys'])}. Take a folder with the whole model."
            )
        self.model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.preprocessor = Preprocessor.read(folder, device)
        self.fingerprint = weights_sha256(model)
        # The same weights on other input are another judge.
        digest = hashlib.sha256(f"{self.fingerprint} {self.preprocessor.settings}".encode()).hexdigest()
        self.name = f"{model.config.model_type}-{digest[:8]}"
        self.size = self.preprocessor.size
        self.resize = "" if self.size is None else f"bicubic-{self.size}px"
        side = self.size or 64
        try:
            self(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"`extractor` must make one vector of a photo, but the {model.config.model_type} in {folder!r} does not"
                f" ({_first_line(error)})."
            ) from error

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        if self.size is not None and pixels.shape[-1] != self.size:
            side = (self.size, self.size)
            pixels = F.interpolate(pixels.float(), side, mode="bicubic", antialias=True).clamp(0, 255)
        features = self.model(self.preprocessor(pixels)).pooler_output
        return features.flatten(1)


def load_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor | None:
    """Load the extractor of this name; None for the evaluation network's own features."""
    if name == "evaluator":
        return None
    return InceptionExtractor(device) if name == "inception" else TransformersExtractor(name, device)


# ---- classes and features -------------------------------------------------------------------------------------------


class PhotoClassifier:
    """
    An image classifier of transformers. Its features are what its last linear layer takes.

    Args:
        folder (`str`): a folder written by `save_pretrained`; a `preprocessor_config.json` in it says what the network
            takes.
        device (`torch.device`): where it computes.

    Raises:
        ValueError: the folder holds no such classifier, or one that does not take photos.
    """

    def __init__(self, folder: str, device: torch.device | str = "cpu"):
        try:
            self.model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except _LOADING_ERRORS as error:
            raise ValueError(
                f"`evaluator` must be a folder with the weights of an image classifier, but {folder!r} cannot be loaded"
                f" ({_first_line(error)}): `train_encoders.py --task evaluation` trains one."
            ) from error
        config = self.model.config
        if getattr(config, "num_channels", 3) != 3:
            raise ValueError(f"`evaluator` must take photos, but {folder!r} takes {config.num_channels} channel(s).")
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]
        if not heads:
            raise ValueError(
                f"`evaluator` must end in a linear layer, but the {config.model_type} in {folder!r} does not."
            )
        self.model.to(device, torch.float32).eval().requires_grad_(False)
        self._features: Tensor | None = None
        heads[-1].register_forward_pre_hook(self._keep_features)
        self.labels: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self.preprocessor = Preprocessor.read(folder, device)
        self.fingerprint = weights_sha256(self.model)
        self.name = f"{config.model_type}-{self.fingerprint[:8]}"

    def _keep_features(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].flatten(1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[N, 3, R, R]` on its device -> probabilities `[N, num_classes]` and features `[N, D]`, float32."""
        probabilities = self.model(self.preprocessor(pixels)).logits.softmax(-1)
        assert self._features is not None
        return probabilities, self._features


class Evaluator:
    """
    A judge of photos: a classifier that names classes, and its features or those of another network.

    Args:
        folder (`str`, *optional*): that of a [`PhotoClassifier`]; without it nothing is said of classes.
        resolution (`int`, *optional*): side in pixels that all photos are resized to, which is the input of a classifier
            whose preprocessor names no side of its own; 64 by default. Without a classifier, the extractor's.
        device (`torch.device`): where it computes.
        extractor (`str`, defaults to `"evaluator"`): whose features: those of the classifier, of `"inception"`, or of the
            model in a folder.

    Raises:
        ValueError: one of the networks cannot be used, or there is none that describes photos.
    """

    def __init__(
        self,
        folder: str | None,
        resolution: int | None = None,
        device: torch.device | str = "cpu",
        extractor: str = "evaluator",
    ):
        if folder is None and extractor == "evaluator":
            raise ValueError("give an `evaluator`, or an `extractor` of features if nothing is to be said of classes.")
        self.device = device
        self.classifier = None if folder is None else PhotoClassifier(folder, device)
        self.labels = [] if self.classifier is None else self.classifier.labels
        self.extractor = load_extractor(extractor, device)
        own = None if self.classifier is None else self.classifier.preprocessor.size
        others = None if self.extractor is None or self.classifier is not None else self.extractor.size
        self.resolution = own or resolution or others or 64
        self.resize = f"squash4:3-bicubic-{self.resolution}px"
        self.conditions = {}
        if self.classifier is not None:
            self.conditions = {"extractor": self.classifier.name, "resize": self.resize}
        self.feature_conditions = self.conditions
        if self.extractor is not None:
            resize = ", ".join(filter(None, (self.resize, self.extractor.resize)))
            self.feature_conditions = {"extractor": self.extractor.name, "resize": resize}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of the networks that judge, by the argument that names them."""
        networks = {"evaluator": self.classifier, "extractor": self.extractor}
        return {name: network.fingerprint for name, network in networks.items() if network is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that tell one judge from another."""
        settings: dict[str, Any] = dict(self.conditions)
        if self.classifier is not None:
            settings = {"fingerprint": self.classifier.fingerprint, **settings}
        if self.extractor is not None:
            settings["features"] = {"fingerprint": self.extractor.fingerprint, **self.feature_conditions}
        return settings

    def __call__(self, pixels: Tensor, batch_size: int, desc: str | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[N, 3, R, R]` -> probabilities `[N, num_classes]` and features `[N, D]`, float32 on the CPU."""
        probabilities, features = [], []
        for batch in tqdm(pixels.split(batch_size), desc=desc, leave=False, disable=desc is None):
            batch = batch.to(self.device)
            likely = described = torch.empty(len(batch), 0)
            if self.classifier is not None:
                likely, described = self.classifier(batch)
            if self.extractor is not None:
                described = self.extractor(batch)
            probabilities.append(likely.cpu())
            features.append(described.cpu())
        return torch.cat(probabilities), torch.cat(features)

    def extract_features(self, images: ImageSet, batch_size: int, mirror: bool = True) -> ImageSet:
        """Fills in probabilities and features, with `mirror` also those of the mirrored images."""
        images.probabilities, images.features = self(images.pixels, batch_size, f"Features of {images.name}")
        if mirror:
            images.mirrored_features = self(images.pixels.flip(-1), batch_size)[1]
        return images


def read_training_photos(
    files: list[tuple[str, Path]], evaluator: Evaluator, batch_size: int, cache_dir: str | None
) -> ImageSet:
    """The training photos with their features, from `cache_dir` where they lie there already."""
    if cache_dir is None:
        return evaluator.extract_features(
            read_photos(files, "training photos", evaluator.resolution), batch_size, mirror=False
        )
    described = [*evaluator.fingerprints.values(), *evaluator.feature_conditions.values()]
    if evaluator.classifier is not None:
        described.append(evaluator.classifier.preprocessor.settings)
    digest = hashlib.sha256(":".join(described).encode())
    for label, path in files:
        status = path.stat()
        digest.update(f"{label}/{path.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    cached = Path(cache_dir) / f"evaluation-{digest.hexdigest()[:32]}.safetensors"
    if cached.is_file():
        stored = load_file(cached)
        labels, paths = [label for label, _ in files], [path for _, path in files]
        photos = ImageSet("training photos", stored["pixels"], labels, np.arange(len(files)), paths)
        return replace(photos, probabilities=stored["probabilities"], features=stored["features"])
    photos = read_training_photos(files, evaluator, batch_size, None)
    content = save({name: getattr(photos, name) for name in ("pixels", "probabilities", "features")})
    keep_file(Path(cache_dir), cached, content)
    return photos
