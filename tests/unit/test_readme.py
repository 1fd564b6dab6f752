# SPDX-License-Identifier: Apache-2.0
"""Tests that run what the README tells people to paste, as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from testing_utils import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(kind, name):
    found = re.search(rf"<!-- {kind}: {name} -->\s*```\w+\n(.*?)```", README, re.S)
    assert found, f"README.md has no block marked {kind}: {name}"
    return found.group(1).strip()


@pytest.mark.slow
def test_generate_command(tmp_path):
    line = block("command", "generate").split("&&")[-1].strip()
    program, *arguments = shlex.split(line)
    assert program == "diffsketching"
    drawings = [argument for argument in arguments if argument.endswith(".png")]
    assert drawings and all((ROOT / drawing).is_file() for drawing in drawings)
    # Two steps instead of the model's recommendation: the test is of the command, not of the pictures.
    command = [
        sys.executable,
        "-m",
        "diffsketching_pipeline.cli",
        *arguments,
        "--output-dir",
        tmp_path,
        "--steps",
        "2",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = Path(drawings[0]).stem
    assert sorted(os.listdir(tmp_path)) == [
        "metadata.json",
        *(f"{name}_{k}.png" for k in range(4)),
        f"{name}_sheet.png",
    ]


@pytest.mark.slow
def test_python_snippet(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = block("snippet", "run").replace("num_images_per_sketch=4", "num_images_per_sketch=1, num_inference_steps=2")
    assert "num_inference_steps=2" in code
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].images[0].size == (64, 64)
    assert names["out"].class_labels[0] in names["pipe"].id2label.values()


@pytest.mark.slow
def test_edit_snippet(monkeypatch, tmp_path):
    (tmp_path / "outputs").mkdir()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "outputs" / "t-shirt_0.png")
    monkeypatch.chdir(tmp_path)
    code = block("snippet", "edit").replace("sketch=page", "sketch=page, num_inference_steps=2, num_resample_steps=1")
    assert "num_inference_steps=2" in code
    exec(compile(code, "README.md", "exec"), {})
    edited = np.asarray(Image.open("outputs/one-long-sleeve.png"))
    # The sleeve is drawn at the left border.
    assert (edited[30:56, 2:14] != 255).any() and (edited[:, 40:] == 255).all()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("diffsketching ")])
def test_other_command_lines_are_understood(line):
    """Every option in a line of the README exists."""
    _, command, *arguments = shlex.split(line)
    options = [argument for argument in arguments if argument.startswith("--")]
    shown = subprocess.run(
        [sys.executable, "-m", "diffsketching_pipeline.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(option in shown for option in options), (options, shown)


def test_every_file_named_exists():
    for name in re.findall(r"`((?:training|examples|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_own_classes_command(tmp_path):
    """Photos in class folders, one of them a class of the bundled model, and that model by its name."""
    for i in range(6):
        folder = tmp_path / "my_photos" / ("hat", "kite")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    words = shlex.split(block("command", "own-classes"))
    assert words[:3] == ["accelerate", "launch", "training/train_unet.py"]
    command = [sys.executable, ROOT / words[2], *words[3:], "--max_train_steps", "1", "--train_batch_size", "2"]
    command += ["--ddpm_num_inference_steps", "1", "--num_validation_images", "1", "--report_to", "none"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "garments-64: classes kept: hat; new, begin from the mean of the known ones: kite" in done.stderr
    index = json.loads((tmp_path / "diffsketching-unet" / "pipeline" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "hat", "1": "kite"}
