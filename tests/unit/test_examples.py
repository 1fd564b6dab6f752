# SPDX-License-Identifier: Apache-2.0
"""The examples run on a reader's own files and say where the result went."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from testing_utils import ROOT


pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
SIZE = (48, 40)


@pytest.fixture(scope="module")
def model(tiny_pipeline_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_pipeline_factory().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    for name, line in (("one", (12, 12, 12, 28, 30, 28)), ("two", (30, 10, 12, 30))):
        page = Image.new("L", SIZE, 255)
        ImageDraw.Draw(page).line(line, fill=0, width=2)
        page.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in ("photo", "one", "two")}


@pytest.fixture
def run(model, monkeypatch, capsys):
    def run(name, *arguments):
        command = [name, *map(str, arguments), "--model", model, "--num_inference_steps", "2"]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
        return Path(re.search(r"\S+\.(png|gif)", printed)[0])

    return run


def test_edit(run, files):
    image, photo = Image.open(run("edit", files["photo"], files["one"])), Image.open(files["photo"])
    assert image.size == photo.size
    changed = (np.asarray(image) != np.asarray(photo)).any(axis=2)
    assert changed[20, 18] and not changed[2].any() and not changed[:, 44:].any()


def test_interpolate(run, files):
    film = Image.open(run("interpolate", files["one"], files["two"], "--num_frames", 4))
    assert film.n_frames == 6 and film.size == (256, 256)


def test_matrix(run, files):
    arguments = ("--class_label", "a", "--class_label", "c", "--num_seeds", 2, "--palette", "navy")
    sheet = Image.open(run("matrix", files["one"], *arguments))
    assert sheet.size == (110 + 2 * 128, 3 * 128)


def test_invert(run, files):
    assert Image.open(run("invert", files["photo"], files["one"], "--class_label", "b")).size == (3 * 16 * 4, 16 * 4)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
