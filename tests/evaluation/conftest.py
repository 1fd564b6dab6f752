# SPDX-License-Identifier: Apache-2.0
"""The fixtures that the tests of the evaluation share: photos, an evaluation network and a model, all tiny and untrained."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image, ImageDraw
from transformers import RegNetConfig, RegNetForImageClassification, ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline


LABELS = ["disc", "square"]


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory):
    """Photos of no common size: a bright shape on a dark, shaded ground."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 72)):
        for i in range(count):
            width, height = rng.integers(40, 60, 2)
            photo = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(photo)
            shape = draw.ellipse if i % 2 == 0 else draw.rectangle
            left, top, side = rng.integers(4, 16), rng.integers(4, 16), rng.integers(16, 24)
            shape((left, top, left + side, top + side), fill=tuple(rng.integers(120, 255, 3).tolist()))
            path = root / split / LABELS[i % 2] / f"{split}-{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.save(path)
    return root


@pytest.fixture(scope="session")
def evaluator_dir(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8, "layer_type": "y"}
    config = RegNetConfig(**shape, num_labels=2, id2label=dict(enumerate(LABELS)), label2id={"disc": 0, "square": 1})
    folder = tmp_path_factory.mktemp("evaluator")
    RegNetForImageClassification(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2
    )
    pipeline = DiffSketchingPipeline(
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=0, timestep_spacing="leading"),
        sketch_encoder=ResNetForImageClassification(config),
        id2label=dict(enumerate(LABELS)),
        recommended={"num_inference_steps": 2, "sketch_guidance_scale": 1.5},
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(drawings_dir, photos_dir, evaluator_dir, tmp_path):
    def make(**changes):
        paths = {"sketches": drawings_dir, "reference": photos_dir / "validation", "train": photos_dir / "train"}
        paths |= {"evaluator": evaluator_dir, "output_dir": tmp_path / "out"}
        values = {name: str(path) for name, path in paths.items()}
        from diffsketching_pipeline.evaluation.arguments import EvaluationArguments

        return EvaluationArguments(**values | {"resolution": 32, "num_bootstrap_samples": 20} | changes)

    return make
