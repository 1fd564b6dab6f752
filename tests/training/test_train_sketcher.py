# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_sketcher

from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher
from diffsketching_pipeline.training import image_to_image
from diffsketching_pipeline.training.discriminators import PatchDiscriminator
from diffsketching_pipeline.training.image_to_image import (
    SketcherArguments,
    check_sketcher_arguments,
    make_dataset,
    minimum_l1,
)


SCRIPT = Path(train_sketcher.__file__)
TINY = [
    "--ngf",
    "4",
    "--n_blocks",
    "1",
    "--ndf",
    "4",
    "--dropout",
    "0.2",
    "--resolution",
    "32",
    "--logging_steps",
    "1",
]
TINY += ["--train_batch_size", "4", "--lr_warmup_steps", "1", "--checkpointing_steps", "2", "--report_to", "none"]


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_sketcher.py", *TINY, *map(str, words)])
    train_sketcher.main()


def states(folder):
    """Every tensor of a checkpoint: both networks, the average, both optimizers."""
    tensors = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors |= {f"{name}/{key}": value for key, value in load_file(path).items()}
        elif path.name.startswith("optimizer") and path.suffix == ".bin":
            for index, state in torch.load(path, weights_only=True)["state"].items():
                tensors |= {f"{name}/{index}/{key}": value for key, value in state.items()}
    return tensors


def test_minimum_l1_is_the_distance_to_the_nearest_drawing():
    rng = np.random.default_rng(0)
    prediction, targets = rng.normal(size=(3, 1, 4, 5)), rng.normal(size=(3, 6, 1, 4, 5))
    nearest = []
    for b in range(3):
        nearest.append(min(np.abs(prediction[b] - targets[b, n]).sum() / 20 for n in range(6)))
    value = minimum_l1(torch.from_numpy(prediction), torch.from_numpy(targets))
    assert value.item() == pytest.approx(sum(nearest) / 3)


def test_strokes_weigh_more_than_paper():
    target = torch.tensor([[1.0, 1.0, 1.0, -1.0]]).view(1, 1, 1, 2, 2)
    blank = torch.ones(1, 1, 2, 2)
    assert minimum_l1(blank, target).item() == pytest.approx(2 / 4)
    assert minimum_l1(blank, target, stroke_weight=5.0).item() == pytest.approx(6 * 2 / (1 + 1 + 1 + 6))


def test_only_the_nearest_drawing_pulls():
    prediction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    targets = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), -0.1)])[None]
    minimum_l1(prediction, targets).backward()
    assert torch.equal(prediction.grad, torch.full((1, 1, 2, 2), 0.25))


def test_script_trains_a_sketcher_that_loads(shapes_dir, cache_dir, tmp_path, script_env):
    paths = ["--train_data_dir", str(shapes_dir), "--cache_dir", str(cache_dir), "--output_dir", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), *TINY, *paths, "--max_train_steps", "2"]
    result = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    model = PhotoSketcher.from_pretrained(tmp_path / "sketcher")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)
    assert (tmp_path / "samples" / "validation-000002.png").is_file()


@pytest.mark.slow
def test_killed_run_resumes_exactly(shapes_dir, cache_dir, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    paths = [
        "--train_data_dir",
        shapes_dir,
        "--cache_dir",
        cache_dir,
        "--max_train_steps",
        "4",
        "--validation_steps",
        0,
    ]
    run_main(monkeypatch, *paths, "--output_dir", tmp_path / "whole")
    # A killed run leaves its last checkpoint and nothing after it.
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    run_main(monkeypatch, *paths, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")

    whole, resumed = (states(tmp_path / name / "checkpoint-4") for name in ("whole", "killed"))
    earlier = states(tmp_path / "whole" / "checkpoint-2")
    assert whole.keys() == resumed.keys()
    for folder in ("discriminator", "sketcher", "sketcher_ema", "optimizer.bin", "optimizer_1.bin"):
        assert any(name.startswith(f"{folder}/") for name in whole), folder
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    changed = [name for name, value in whole.items() if not torch.equal(value, earlier[name])]
    assert any(name.startswith("discriminator/") for name in changed)
    assert any(name.startswith("sketcher/") for name in changed)


@pytest.mark.slow
def test_reverse_direction_makes_photos_from_sketches(shapes_dir, cache_dir, tmp_path, monkeypatch):
    paths = ["--train_data_dir", shapes_dir, "--cache_dir", cache_dir, "--output_dir", tmp_path]
    run_main(monkeypatch, *paths, "--max_train_steps", "1", "--direction", "sketch_to_photo")
    model = PhotoSketcher.from_pretrained(tmp_path / "sketcher")
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)
    args = image_to_image.SketcherArguments(
        direction="sketch_to_photo", pretrained_model_name_or_path=str(tmp_path / "sketcher")
    )
    continued = image_to_image.make_models(args)["sketcher"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), continued.parameters(), strict=True))
    args.direction = "photo_to_sketch"
    with pytest.raises(ValueError, match="must make 1 channels of 3"):
        image_to_image.make_models(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free_hand_share": 1.5}, "`free_hand_share`.* 1.5"),
        ({"free_hand_strength": -1.0}, "`free_hand_strength`.* -1.0"),
        ({"direction": "photo_to_sketch"}, "`free_hand_share` must be 0 where drawings are what is learned"),
    ],
)
def test_redrawn_drawings_that_cannot_be_are_refused(options, message):
    arguments = SketcherArguments(**{"direction": "sketch_to_photo", "free_hand_share": 0.5} | options)
    with pytest.raises(ValueError, match=message):
        check_sketcher_arguments(arguments)


def test_only_what_is_given_in_training_is_redrawn(shapes_dir, cache_dir):
    def sketches(split, share):
        options = {"resolution": 32, "cache_dir": str(cache_dir), "free_hand_share": share}
        dataset = make_dataset(SketcherArguments(direction="sketch_to_photo", **options), shapes_dir, split)
        return torch.stack([dataset.sample(i)["sketch"] for i in range(4)])

    assert not torch.equal(sketches("train", 0.0), sketches("train", 1.0))
    assert torch.equal(sketches("validation", 0.0), sketches("validation", 1.0))


def test_losses_are_those_of_the_least_squares_gan():
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "sketch": torch.randn(2, 1, 32, 32)}
    batch["sketches"] = torch.randn(2, 5, 1, 32, 32)
    args = image_to_image.SketcherArguments(ngf=4, n_blocks=1, ndf=4, l1_weight=7.0, gan_weight=3.0, stroke_weight=2.5)
    models = image_to_image.make_models(args)

    class Bare:
        modules = models

        def unwrap(self, name):
            return models[name]

    losses = image_to_image.gan_losses(Bare(), args)
    fake = models["sketcher"](batch["pixel_values"])
    real_scores = models["discriminator"](batch["pixel_values"], batch["sketch"])
    fake_scores = models["discriminator"](batch["pixel_values"], fake)
    expected = ((real_scores - 1) ** 2).mean() / 2 + (fake_scores**2).mean() / 2
    assert losses["discriminator"](batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = 7 * minimum_l1(fake, batch["sketches"], 2.5) + 3 * ((fake_scores - 1) ** 2).mean()
    assert losses["sketcher"](batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["discriminator"](batch)["loss"].backward()
    assert all(p.grad is None for p in models["sketcher"].parameters())


def test_discriminator_judges_each_pair_alone(tmp_path):
    model = PatchDiscriminator(in_channels=4, ndf=4, n_layers=2).train()
    photos, sketches = torch.randn(3, 3, 32, 32), torch.randn(3, 1, 32, 32)
    scores = model(photos, sketches)
    assert scores.shape == (3, 1, 6, 6)
    torch.testing.assert_close(model(photos[1:2], sketches[1:2]), scores[1:2])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PatchDiscriminator.from_pretrained(tmp_path)(photos, sketches), scores)


@pytest.mark.parametrize("how", ["SIGTERM to all", "SIGTERM to the launcher", "Ctrl-C"])
def test_a_script_that_is_told_to_stop_says_so_by_its_exit_code(how, shapes_dir, cache_dir, tmp_path, script_env):
    launch = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *launch] if "launcher" in how else [sys.executable]
    words = ["--train_data_dir", shapes_dir, "--cache_dir", cache_dir, "--output_dir", tmp_path / "run"]
    words += ["--max_train_steps", "100000", "--dataloader_num_workers", "2", "--checkpoints_total_limit", "2"]
    options = {"stderr": subprocess.PIPE, "text": True, "env": script_env, "start_new_session": True}
    # A shell that runs the tests in the background has told them to ignore Ctrl-C.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*launcher, SCRIPT, *TINY, *map(str, words)], **options)

    def steps():
        return sorted(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*"))

    deadline = time.monotonic() + 300
    while not steps():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if "launcher" in how:
        os.kill(process.pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM if "SIGTERM" in how else signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == {"SIGTERM to all": 143, "SIGTERM to the launcher": -15, "Ctrl-C": 130}[how], errors
    assert "Traceback" not in errors and errors.count("train_sketcher.py: stopped; finished files are complete.") == 1
    last = steps()[-1]
    if "SIGTERM" in how:
        # The step that it was at when the signal came, which need not be a multiple of 2.
        assert f"stopped at step {last} of 100000" in errors
    assert not list((tmp_path / "run").glob(".checkpoint-*")) and not (tmp_path / "run" / "sketcher").exists()
    resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", str(last + 2)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY, *map(str, words[:6]), *resumed], env=script_env, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "run" / "sketcher").is_dir(), done.stderr
