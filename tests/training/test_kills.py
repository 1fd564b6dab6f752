# SPDX-License-Identifier: Apache-2.0
"""
Runs that are killed at random moments, or whose disk is full from some moment on, and then go on: to the bit, with nothing left
over. A few with each run of the tests; `KILLS=60 python -m pytest tests/training/test_kills.py` for all.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from test_trainer import make_trainer, train

from diffsketching_pipeline import cli
from diffsketching_pipeline.training.run_folder import write_folder


pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "6"))


def in_child(work, kill_after=None, largest_file=None):
    """The exit status of `work` in a process that begins as a copy of this one; killed (-9) after so many seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                sys.stdout = sys.stderr = nowhere
                if largest_file is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                code = work() or 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def content_of(folder, left_out=()):
    """The content of all files; what says when something was is left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def generate(model, drawing, out):
    words = ["generate", drawing, "--model", model, "--output-dir", out, "--num-images", 6, "--batch-size", 2]
    words += ["--steps", 4, "--class-label", "a", "--overwrite", "--device", "cpu"]

    def work():
        sys.argv = ["diffsketching", *map(str, words)]
        cli.main()

    return work


def train_and_publish(out):
    def work():
        options = {"checkpointing_steps": 1, "validation_steps": 3, "checkpoints_total_limit": 2}
        trainer = make_trainer(out, resume_from_checkpoint="latest", **options)
        train(trainer, lambda: ({"value": 1.0}, {"picture": torch.zeros(3, 8, 8)}))
        with write_folder(Path(out) / "published") as folder:
            trainer.ema_copy("net").save_pretrained(folder)

    return work


@pytest.fixture(params=["generate", "train"])
def case(request, tmp_path, tiny_pipeline_factory):
    """`(work(folder), names of files that tell the time)`"""
    if request.param == "train":
        # The state of global generators, which each step sets anew, and the elapsed seconds.
        return train_and_publish, ("trainer_state.json", "random_states_0.pkl", "training_args.yaml", ".lock")
    tiny_pipeline_factory().save_pretrained(tmp_path / "model")
    page = Image.new("L", (80, 80), 255)
    ImageDraw.Draw(page).rectangle((20, 15, 60, 65), outline=0, width=3)
    page.save(tmp_path / "drawing.png")
    return lambda out: generate(tmp_path / "model", tmp_path / "drawing.png", out), ()


def test_a_run_that_is_killed_anywhere_goes_on_to_the_bit_and_leaves_nothing(case, tmp_path):
    work, left_out = case
    began = time.monotonic()
    assert in_child(work(tmp_path / "whole")) == 0
    seconds, rng = time.monotonic() - began, random.Random(0)
    whole = content_of(tmp_path / "whole", left_out)
    for _ in range(KILLS):
        in_child(work(tmp_path / "cut"), kill_after=seconds * rng.random())
        if (tmp_path / "cut" / "published").exists():
            (tmp_path / "cut").rename(tmp_path / f"done-{rng.random()}")
    assert in_child(work(tmp_path / "cut")) == 0
    assert content_of(tmp_path / "cut", left_out) == whole


def test_a_disk_that_is_full_for_a_while_damages_nothing(case, tmp_path):
    work, left_out = case
    assert in_child(work(tmp_path / "whole")) == 0
    whole = content_of(tmp_path / "whole", left_out)
    sizes = sorted({len(content) for content in whole.values()})
    for size in sizes[:: max(1, len(sizes) // max(2, KILLS // 3))]:
        # Every file of more bytes finds the disk full.
        status = in_child(work(tmp_path / "cut"), largest_file=size - 1)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
    assert in_child(work(tmp_path / "cut")) == 0
    assert content_of(tmp_path / "cut", left_out) == whole
