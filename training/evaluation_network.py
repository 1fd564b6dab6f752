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
"""The network that judges in `evaluate.py`, and what it makes of photos."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from image_sets import ImageSet, read_photos
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a network's weights in float32, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Evaluator:
    """
    Class probabilities and pooled features of an image classifier of transformers.

    The features are what its last linear layer takes. Input range and size are those of a `preprocessor_config.json`
    beside the weights; without one, [-1, 1] and `resolution` or 64.

    Args:
        folder (`str`): a folder written by `save_pretrained`.
        resolution (`int`, *optional*): side of the input in pixels.
        device (`torch.device`): where it computes.

    Raises:
        ValueError: the folder holds no such classifier, or one that does not take photos.
    """

    def __init__(self, folder: str, resolution: int | None = None, device: torch.device | str = "cpu"):
        try:
            self.model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`evaluator` must be a folder with the weights of an image classifier, but {folder!r} cannot be loaded"
                f" ({str(error).splitlines()[0]}): `train_encoders.py --task evaluation` trains one."
            ) from error
        config = self.model.config
        if getattr(config, "num_channels", 3) != 3:
            raise ValueError(f"`evaluator` must take photos, but {folder!r} takes {config.num_channels} channel(s).")
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]
        if not heads:
            raise ValueError(
                f"`evaluator` must end in a linear layer, but the {config.model_type} in {folder!r} does not."
            )
        self.head = heads[-1]
        self.model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = device
        self.labels: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self._read_preprocessor(Path(folder) / "preprocessor_config.json", resolution)
        self.fingerprint = fingerprint(self.model)
        self.conditions = {
            "extractor": f"{config.model_type}-{self.fingerprint[:8]}",
            "resize": f"squash4:3-bicubic-{self.resolution}px",
        }

    @property
    def settings(self) -> dict[str, str]:
        """What tells one judge from another."""
        return {"fingerprint": self.fingerprint, **self.conditions}

    def _read_preprocessor(self, path: Path, resolution: int | None) -> None:
        settings = json.loads(path.read_text()) if path.is_file() else {}
        size = settings.get("crop_size") or settings.get("size") or 64
        self.resolution = int(resolution or (max(size.values()) if isinstance(size, dict) else size))
        mean, std = (settings.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std"))
        self.mean, self.std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch_size: int, desc: str | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[N, 3, R, R]` -> probabilities `[N, num_classes]` and features `[N, D]`, float32 on the CPU."""
        logits, features = [], []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features.append(inputs[0].flatten(1).cpu())

        handle = self.head.register_forward_pre_hook(keep)
        try:
            for batch in tqdm(pixels.split(batch_size), desc=desc, leave=False, disable=desc is None):
                images = (batch.to(self.device).float() / 255 - self.mean) / self.std
                logits.append(self.model(images).logits.cpu())
        finally:
            handle.remove()
        return torch.cat(logits).softmax(-1), torch.cat(features)

    def look_at(self, images: ImageSet, batch_size: int, mirror: bool = True) -> ImageSet:
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
        return evaluator.look_at(read_photos(files, "training photos", evaluator.resolution), batch_size, mirror=False)
    digest = hashlib.sha256(f"{evaluator.fingerprint}:{evaluator.conditions['resize']}".encode())
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
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f".{cached.name}.tmp")
    save_file({name: getattr(photos, name) for name in ("pixels", "probabilities", "features")}, temporary)
    os.replace(temporary, cached)
    return photos
