# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_gan_baseline
from accelerate.state import AcceleratorState
from PIL import Image
from train_gan_baseline import GanBaselineArguments, photo_metrics, with_dropout

from diffsketching_pipeline import PhotoSketcher, SketchProcessor
from diffsketching_pipeline.evaluation.image_sets import read_drawings
from diffsketching_pipeline.evaluation.run import main
from diffsketching_pipeline.training.arguments import parse_args


TINY = (
    "--ngf 4 --n_blocks 2 --ndf 4 --resolution 32 --logging_steps 1 --train_batch_size 4 --lr_warmup_steps 1".split()
)
TINY += ["--report_to", "none", "--checkpointing_steps", "1"]


def run_main(monkeypatch, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["train_gan_baseline.py", *TINY, *map(str, words)])
    train_gan_baseline.main()


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_trains_renders_and_is_evaluated(
    shapes_dir, cache_dir, drawings_dir, arguments, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "gan"
    words = ["--train_data_dir", shapes_dir, "--cache_dir", cache_dir, "--output_dir", out, "--seed", 3]
    render = ["--render_sketches", drawings_dir, "--num_images_per_sketch", 2]
    run_main(monkeypatch, *words, *render, "--max_train_steps", 2)
    assert capsys.readouterr().out.strip() == str(out / "images")
    assert (out / "samples" / "validation-000002.png").is_file() and (out / "checkpoint-2").is_dir()
    files = sorted((out / "images").glob("*/*.png"))
    assert len(files) == 24

    # 1. An image is what the generator makes of the drawing with dropout, by the seed that the file names.
    drawing = read_drawings(drawings_dir)[8]
    first, second = (out / "images" / drawing.label / f"{drawing.name}_{n}.png" for n in (0, 1))
    seed = int(Image.open(second).info["seed"])
    assert seed == 3 + 12 + 8
    generator = PhotoSketcher.from_pretrained(out / "generator")
    assert generator.config.dropout == 0.5 and generator.config.out_channels == 3
    sketch = SketchProcessor(32).preprocess(str(drawing.path))
    with torch.no_grad():
        plain = generator.eval()(sketch)[0]
        torch.manual_seed(seed)
        expected = with_dropout(generator)(sketch)[0]
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels(second) - expected).max() <= 1
    assert not np.array_equal(pixels(first), pixels(second))
    assert not torch.allclose(plain, with_dropout(generator)(sketch)[0], atol=1e-3)

    # 2. A second call trains on from the checkpoint only if asked, and renders only what is missing.
    stamps, before = {file: file.stat().st_mtime_ns for file in files}, pixels(second)
    second.unlink()
    run_main(monkeypatch, "--output_dir", out, "--seed", 3, *render, "--render_only", "true")
    assert {file for file in files if file.stat().st_mtime_ns != stamps[file]} == {second}
    assert np.array_equal(pixels(second), before)
    with pytest.raises(ValueError, match="`render_dir` holds images generated with another seed"):
        run_main(monkeypatch, "--output_dir", out, "--seed", 4, *render, "--render_only", "true")

    # 3. It is a system like any other, with its cost.
    scores = main(arguments(images=[f"gan={out / 'images'}"]))
    assert scores["gan"]["network_evaluations"].value == 1 and scores["gan"]["seconds_per_image"].value > 0
    assert "1 of generator" in scores["gan"]["network_evaluations"].name
    assert scores["gan"]["pairwise_distance"].value > 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["systems"]["gan"]["contour_distance"]["n"] == 24


def test_detail_tells_a_blurred_photo_from_a_sharp_one():
    photos = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = photos.mean((2, 3), keepdim=True).expand_as(photos)
    of_mean, of_photos = photo_metrics(mean, photos[:, None]), photo_metrics(photos, photos[:, None])
    assert of_mean["detail"] == pytest.approx(0, abs=1e-6) and of_photos["l1"] == 0
    assert of_photos["detail"] == of_photos["target_detail"] == of_mean["target_detail"] > 0.5


def test_shipped_config_is_understood():
    config = Path(train_gan_baseline.__file__).parent / "configs" / "gan_baseline_garments64.yaml"
    args = parse_args(GanBaselineArguments, [str(config)])
    assert args.direction == "sketch_to_photo" and args.dropout == 0.5 and args.free_hand_share == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--direction", "photo_to_sketch"], "`direction`.* photo_to_sketch"),
        (["--render_sketches", "nowhere"], "`render_sketches`.*'nowhere'"),
        (["--render_only", "true"], "`render_only` needs `render_sketches`"),
        (["--num_images_per_sketch", "0"], "`num_images_per_sketch`.* 0"),
        (["--render_only", "true", "--render_sketches", "{drawings}"], "`render_only`.*`generator`"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_before_training(words, message, drawings_dir, tmp_path, monkeypatch):
    words = [word.format(drawings=drawings_dir) for word in words]
    with pytest.raises(ValueError, match=message):
        run_main(monkeypatch, "--output_dir", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
