# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and what they print is what they say: measured on a tiny pipeline, no time is asserted."""

import argparse
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from testing_utils import ROOT, randn


pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_dir(tiny_pipeline, tmp_path):
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.weight *= 0.2  # random weights are rougher than any trained network
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_autoencoder_stands_between_the_photos_and_a_small_copy(latent_pipeline, tmp_path, monkeypatch, capsys):
    latent_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "photos" / "validation" / "a").mkdir(parents=True)
    for i in range(3):
        pixels = randn(40, 48, 3, seed=i).mul(60).add(128).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / "validation" / "a" / f"{i}.png")
    arguments = [
        str(tmp_path / "model"),
        str(tmp_path / "photos"),
        "--resolution",
        "32",
        "--unet",
        str(tmp_path / "model"),
    ]
    monkeypatch.setattr(sys, "argv", ["autoencoder.py", *arguments])
    load("autoencoder").main()
    printed = capsys.readouterr().out
    assert printed.startswith("3 photos, 32 x 32, 4 channels, f = 4\n")
    rows = dict(re.findall(r"\| ([^|]+) \| [\d.∞]+ \| ([\d.]+) \|", printed))
    assert float(rows["photos themselves"]) == 0 < float(rows["bicubic, 1/4 and back"])
    decode, evaluation, ratio = map(
        float, re.search(r"decode (\d+), one pass of the UNet (\d+)\ndecoding is ([\d.]+)", printed).groups()
    )
    assert decode >= 0 and evaluation > 0 and ratio > 0


def test_inversion_prints_the_round_trip(model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "b").mkdir()
    photos = [tmp_path / "b" / "one.png", tmp_path / "two.png"]
    for i, photo in enumerate(photos):
        Image.fromarray(randn(16, 16, 3, seed=i).mul(60).add(128).clamp(0, 255).byte().numpy()).save(photo)
    benchmark = load("inversion")
    arguments = [*map(str, photos), "--model", model_dir, "--num_inference_steps", "8", "--iterations", "0", "6"]
    monkeypatch.setattr(sys, "argv", ["inversion.py", *arguments, "--textbook_steps", "16"])
    benchmark.main()
    rows = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) \(([\d.]+)\) \| (\d+) \|", capsys.readouterr().out)
    assert [row[:2] for row in rows] == [("8", "0"), ("8", "6"), ("16", "0")]
    assert [row[4] for row in rows] == ["8", "56", "16"]
    textbook, iterated = float(rows[0][2]), float(rows[1][2])
    assert iterated > textbook + 20 and float(rows[0][3]) <= textbook

    images = torch.zeros(2, 3, 4, 4)
    found = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    torch.testing.assert_close(benchmark.psnr(found, images), torch.tensor([20.0, 40.0]))


@pytest.mark.parametrize(
    ("factory", "memory"), [("tiny_pipeline", True), ("tiny_pipeline", False), ("latent_pipeline", False)]
)
def test_finetuning_measures_one_setting(factory, memory, request, tmp_path):
    request.getfixturevalue(factory).save_pretrained(tmp_path / "model")
    benchmark = load("finetuning")
    args = argparse.Namespace(model=str(tmp_path / "model"), train_batch_size=2, runs=1, memory=memory)
    found = benchmark.one_setting(args, {"gradient_checkpointing": True, "num_train_inference_steps": 2})
    if memory:
        assert found.keys() == {"mebibytes"} and found["mebibytes"] >= 0
    else:
        assert found["seconds"] > 0 and 0 < found["outside"] < 0.9


def test_cost_counts_what_a_convolution_does_and_keeps():
    benchmark = load("cost")
    images = torch.zeros(1, 3, 16, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1))
    cost = benchmark.measure("a", module, lambda net: net(images))
    # Two operations per product: 27 per output of the first, 8 per output of the second.
    assert cost.flops == 2 * 16 * 16 * (8 * 27 + 4 * 8)
    assert cost.parameters == 8 * 27 + 8 + 4 * 8 + 4
    # The input, the input of SiLU and its output; two bytes each; no weight.
    assert cost.activations == 2 * 16 * 16 * (3 + 8 + 8)


def test_cost_of_a_training_step():
    benchmark = load("cost")
    names = ("unet", "sketcher", "perceptual", "identity")
    costs = {name: benchmark.NetworkCost(name, 10.0**i, 10**i, 1) for i, name in enumerate(reversed(names))}
    losses, kept = 3 * 1 + 3 * 10 + 2 * 100, 1 + 10 + 100
    assert benchmark.training_step(costs, "plain", 5) == (15_000 + losses, 5_000 + kept)
    assert benchmark.training_step(costs, "checkpointed", 5) == (20_000 + losses, 1_000 + kept)
    assert benchmark.training_step(costs, "truncated", 5, kept=2) == (9_000 + losses, 2_000 + kept)
    assert benchmark.training_step(costs, "per step", 5) == (pytest.approx(5_000 + losses), 1_000 + kept)
    # Two photos: the larger of two numbers from 0 to 4, averaged over all 25 pairs.
    larger = sum(max(a, b) for a in range(5) for b in range(5)) / 25
    both = benchmark.training_step(costs, "per step", 5, batch_size=2)
    assert both == (pytest.approx(1_000 * (larger + 3) + losses), 1_000 + kept)


def test_cost_prints_both_tables(model_dir, monkeypatch, capsys):
    benchmark = load("cost")
    monkeypatch.setattr(sys, "argv", ["cost.py", "--model", model_dir, "--steps", "2", "3"])
    benchmark.main()
    shown = capsys.readouterr().out
    assert re.search(r"\| UNet \| 0\.\d M \|", shown) and "VGG-16" in shown
    assert len(re.findall(r"^\| (plain|checkpointed|truncated to 1|per step) \| [23] \|", shown, re.M)) == 8


def test_applications_measure_seams_and_retrieval(model_dir, tmp_path, monkeypatch, capsys):
    benchmark = load("applications")
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 90
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    # Eight pairs across the border differ by 90; inside, none does.
    assert benchmark.seam_energy(image, mask, feather=2) == {"border": 90.0, "band": 0.0}
    image[:, 5] = 60
    assert benchmark.seam_energy(image, mask, feather=2)["band"] == pytest.approx(30 * 8 / (8 + 14))

    for label, box in (("a", (20, 20, 50, 100)), ("b", (20, 60, 100, 80))):
        (tmp_path / "sketches" / label).mkdir(parents=True)
        for name in ("one", "two", "three", "four"):
            page = Image.new("L", (128, 128), 255)
            ImageDraw.Draw(page).rectangle(box, outline=0, width=3)
            page.save(tmp_path / "sketches" / label / f"{name}-{label}.png")
    photo = tmp_path / "photos" / "a" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    Image.fromarray(randn(48, 40, 3).mul(60).add(128).clamp(0, 255).byte().numpy()).save(photo)
    monkeypatch.setattr(benchmark, "EDITS", {"lengthen": ("a/photo.jpg", "a", None, [[(0.3, 0.3), (0.6, 0.7)]])})
    for part, expected in (("edit", "edits"), ("retrieve", "R@1")):
        folders = [
            "--photos",
            tmp_path / "photos",
            "--sketches",
            tmp_path / "sketches",
            "--output_dir",
            tmp_path / "out",
        ]
        arguments = [part, *folders, "--model", model_dir, "--num_inference_steps", 2, "--num_drawings", 2]
        monkeypatch.setattr(sys, "argv", ["applications.py", *map(str, arguments)])
        benchmark.main()
        found = json.loads((tmp_path / "out" / f"{part}.json").read_text())
        assert found["largest difference outside"] == 0 and expected in found
        assert (tmp_path / "out" / f"{part}.png").is_file()


def test_class_entropy_chooses_a_limit_on_half_of_the_drawings(model_dir, tmp_path, monkeypatch, capsys):
    benchmark = load("class_entropy")
    for number in range(12):
        page = Image.new("L", (64, 64), 255)
        ImageDraw.Draw(page).rectangle((8, 8, 20 + 3 * number, 50), outline=0, width=2)
        path = tmp_path / "sketches" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    lines = [{"word": word, "drawing": [[[0, 90, k * 20], [0, k * 10, 90]]]} for word in "cdefgh" for k in (1, 2)]
    others = tmp_path / "others.ndjson"
    others.write_text("\n".join(map(json.dumps, lines)))
    arguments = [str(tmp_path / "sketches"), str(others), "--model", model_dir, "--warned", "0.5"]
    monkeypatch.setattr(sys, "argv", ["class_entropy.py", *arguments])
    benchmark.main()
    shown = capsys.readouterr().out
    limit, above = re.search(r"max_class_entropy (0\.\d+), above which is (0\.\d+)", shown).groups()
    rows = {
        name: re.findall(rf"\| {name} \| (\S+) \(N=(\d+)\) \| (\S+) \(N=(\d+)\) \|", shown)[0]
        for name in ("drawings", "other things")
    }
    assert rows["drawings"][0] == above and 0 < float(above) <= 0.5 and 0 < float(limit) < 1
    assert [int(row[1]) + int(row[3]) for row in rows.values()] == [12, 12]
    entropies = np.array([0.4, 0.1, 0.3, 0.2])
    for warned, expected in ((0.0, 0.4), (0.25, 0.4), (0.5, 0.3), (1.0, 0.1)):
        assert benchmark.choose_limit(entropies, warned) == expected
        assert np.mean(entropies > expected) <= warned


@pytest.mark.parametrize("what", ["load", "wait"])
def test_demo_prints_what_clients_got_and_how_long_they_waited(what, model_dir, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install .[demo]")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # a page that is launched lowers it
    benchmark = importlib.import_module("demo")  # by its name, as the process of its clients does
    arguments = ["--model", model_dir, "--clients", "2", "--seconds", "3", "--runs", "1", "--num_images", "1"]
    monkeypatch.setattr(sys, "argv", ["demo.py", what, *arguments])
    benchmark.main()
    shown = capsys.readouterr().out
    if what == "load":
        assert (
            re.search(r"^ +[1-9]\d*  its own photo$", shown, re.M) and "another" not in shown and "failed" not in shown
        )
        assert len(re.findall(r"^ +\d+ s +\d+ MiB$", shown, re.M)) == 10
        assert re.search(r"^from the second quarter to the last: [+-]\d+\.\d MiB$", shown, re.M)
    else:
        assert re.search(r"1 photos, median of 1: first preview after \d+\.\d s, photos after \d+\.\d s", shown)
