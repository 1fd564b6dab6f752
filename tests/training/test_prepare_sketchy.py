# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys

import finetune_diffsketching
import pytest
import torch
from PIL import Image, ImageDraw
from prepare_sketchy import read_exclusions
from test_finetune_diffsketching import tiny_args
from testing_utils import TRAINING, make_scheduler, make_unet
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import DiffSketchingPipeline


SCRIPT = str(TRAINING / "prepare_sketchy.py")


@pytest.fixture
def sketchy_dir(tmp_path):
    """Two categories: reddish discs and bluish squares, two drawings each; and a photo that is none."""
    for folder in ("photo", "sketch"):
        for category in ("ball", "box"):
            (tmp_path / folder / category).mkdir(parents=True)
    for i in range(6):
        category, color = (("ball", (220, 60, 60)), ("box", (60, 60, 220)))[i % 2]
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).rectangle((6, 6, 20 + i, 24), fill=color)
        picture.save(tmp_path / "photo" / category / f"n0{i}.png")
        for k in (1, 2):
            drawing = Image.new("L", (32, 32), "white")
            ImageDraw.Draw(drawing).rectangle((6, 6, 20 + i, 24), outline="black")
            drawing.save(tmp_path / "sketch" / category / f"n0{i}-{k}.png")
    (tmp_path / "photo" / "box" / "n07.png").write_bytes(b"no photo")
    (tmp_path / "sketch" / "box" / "n07-1.png").write_bytes((tmp_path / "sketch/box/n01-1.png").read_bytes())
    return tmp_path


@pytest.fixture
def classifier_dir(tmp_path):
    """Sees class 3 in what is redder than blue, else class 1."""
    torch.manual_seed(0)
    labels = dict(enumerate(["a", "b", "c", "d, e"]))
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=4, id2label=labels
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        stem = model.resnet.embedder.embedder
        stem.normalization.weight.fill_(1.0)
        stem.convolution.weight[0, :, 3, 3] = torch.tensor([1.0, 0.0, -1.0])
        stem.convolution.weight[1, :, 3, 3] = torch.tensor([-1.0, 0.0, 1.0])
        model.classifier[1].weight[3, 0] = model.classifier[1].weight[1, 1] = 1.0
    # Its one stage adds nothing to what the stem passes on, and shrinks it.
    stage = model.resnet.encoder.stages[0].layers[0]
    if hasattr(stage.shortcut, "convolution"):
        with torch.no_grad():
            stage.shortcut.convolution.weight[range(4), range(4)] = 1.0
            stage.shortcut.normalization.weight.fill_(1.0)
    model.eval().save_pretrained(tmp_path / "classifier")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def run(sketchy_dir, classifier_dir, script_env, *options):
    command = [sys.executable, SCRIPT, "--photo_dir", sketchy_dir / "photo", "--sketch_dir", sketchy_dir / "sketch"]
    command += ["--output_dir", sketchy_dir / "pairs", "--classifier_name_or_path", classifier_dir, *options]
    return subprocess.run(list(map(str, command)), env=script_env, capture_output=True, text=True)


def test_photos_get_the_classes_that_a_classifier_sees(sketchy_dir, classifier_dir, script_env, tmp_path):
    (tmp_path / "bad.txt").write_text("# ambiguous\nbox/n03-2\nball/n04-1.png\nn04-2\n")
    result = run(sketchy_dir, classifier_dir, script_env, "--exclude", tmp_path / "bad.txt", "--batch_size", 4)
    assert result.returncode == 0, result.stderr
    assert "5 photos, 9 drawings" in result.stdout and "n07.png cannot be read" in result.stderr
    pairs = sketchy_dir / "pairs"
    found = sorted(path.relative_to(pairs).as_posix() for path in pairs.rglob("*.png"))
    assert found == [
        *(f"photo/1/box_n0{i}.png" for i in (1, 3, 5)),
        *(f"photo/3/ball_n0{i}.png" for i in (0, 2)),
        *(f"sketch/1/box_n0{i}-{k}.png" for i, k in ((1, 1), (1, 2), (3, 1), (5, 1), (5, 2))),
        *(f"sketch/3/ball_n0{i}-{k}.png" for i in (0, 2) for k in (1, 2)),
    ]
    assert os.path.samefile(pairs / "photo/1/box_n03.png", sketchy_dir / "photo/box/n03.png")
    assert json.loads((pairs / "classes.json").read_text()) == {"ball": {"d, e": 2}, "box": {"b": 3}}

    # A pipeline whose classes have no names takes them by index.
    pipeline = DiffSketchingPipeline(make_unet(in_channels=4, num_class_embeds=4), make_scheduler())
    args = tiny_args(train_data_dir=str(pairs), pretrained_model_name_or_path="x", cache_dir=str(tmp_path / "cache"))
    photos, _ = finetune_diffsketching.load_photos(args, pipeline)
    labels = dict(zip(photos["train"].ids, photos["train"].class_labels, strict=True))
    labels |= dict(zip(photos["validation"].ids, photos["validation"].class_labels, strict=True))
    assert {name.split("/")[-1][:3]: label for name, label in labels.items()} == {"bal": 3, "box": 1}

    again = run(sketchy_dir, classifier_dir, script_env)
    assert again.returncode == 1 and "`output_dir`" in again.stderr and "exists" in again.stderr


def test_lists_of_drawings_to_leave_out(tmp_path):
    (tmp_path / "a").write_text("cat/x-1.png\n\n# why\nx-2\n")
    (tmp_path / "b").write_text("dog/y-3\n")
    assert read_exclusions([tmp_path / "a", tmp_path / "b"]) == {"x-1", "x-2", "y-3"}


@pytest.mark.slow
def test_the_recipe_calls_scripts_with_options_that_they_have():
    """Every option of the shell script is one that the called script knows."""
    text = (TRAINING / "recipes" / "sketchy256.sh").read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", str(TRAINING / "recipes" / "sketchy256.sh")], check=True)
    config = re.search(r"--config_file (\S+)", (TRAINING / "recipes" / "sketchy256.md").read_text())[1]
    assert (TRAINING.parent / config).is_file()
    assert "$training/configs/finetune_sketchy256.yaml" in text and "cd " not in text
    for script in ("assemble.py", "prepare_sketchy.py", "finetune_diffsketching.py"):
        line = next(line for line in text.splitlines() if script in line and not line.startswith("#"))
        options = set(re.findall(r"--[a-z_]+", line.split(script, 1)[1]))
        shown = subprocess.run(
            [sys.executable, str(TRAINING / script), "--help"],
            env={**os.environ, "PYTHONPATH": str(TRAINING.parent)},
            capture_output=True,
            text=True,
        ).stdout
        known = set(re.findall(r"--[a-z_]+", shown))
        assert options and options <= known, (script, options - known)
    assert (TRAINING / "configs" / "finetune_sketchy256.yaml").is_file()
